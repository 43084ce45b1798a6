"""Tokens one by one -> text: whole characters, reasoning apart from the answer, stop strings."""

import pytest

from mlx_qwen35 import Processor
from mlx_qwen35.checkpoint.config import read_config
from mlx_qwen35.checkpoint.hub import resolve


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(resolve("nano"), read_config(resolve("nano")))


def stream(processor: Processor, text: str, thinking: bool = False, stop: tuple[str, ...] = ()):
    """The pieces of each token of a text, and of the end."""
    out = processor.text_stream(thinking, stop)
    return [out.add(token) for token in processor.encode_text(text).tokens] + [out.finish()]


def joined(pieces, reasoning: bool = False) -> str:
    return "".join(piece.text for step in pieces for piece in step if piece.reasoning == reasoning)


@pytest.mark.parametrize(
    "text", ["Hello, world", " leading space", "two\n\nparagraphs\n", "naïve 🙂👩‍🚀 日本語 ก็", "a  b   c"]
)
def test_the_pieces_add_up_to_the_text(processor: Processor, text: str):
    assert joined(stream(processor, text)) == text


def test_no_piece_holds_half_a_character(processor: Processor):
    steps = stream(processor, "日本🙂")
    assert len(steps) > 10, "the small vocabulary spells these in bytes, else this test shows nothing"
    assert all("\ufffd" not in piece.text for step in steps for piece in step)


def test_bytes_that_never_become_a_character_are_dropped_at_the_end(processor: Processor):
    out = processor.text_stream(thinking=False)
    first_byte = processor.encode_text("🙂").tokens[0]
    assert out.add(first_byte) + out.finish() == []


def test_reasoning_and_answer_are_told_apart(processor: Processor):
    steps = stream(processor, "8+6=14\n</think>\n\n14", thinking=True)
    assert joined(steps, reasoning=True) == "8+6=14\n"
    assert joined(steps) == "14"


def test_a_thinking_block_that_the_model_opens_itself_is_reasoning(processor: Processor):
    steps = stream(processor, "<think>\nhm\n</think>\n\nyes")
    assert (joined(steps, reasoning=True), joined(steps)) == ("hm\n", "yes")


def test_a_raw_completion_keeps_its_leading_line_breaks(processor: Processor):
    assert joined(stream(processor, "\n\nHello")) == "\n\nHello"


@pytest.mark.parametrize("stop", ["END", "E", "two END"])
def test_a_stop_string_ends_the_answer_before_it_wherever_tokens_split_it(processor: Processor, stop: str):
    text = "one two END three"
    out = processor.text_stream(False, (stop,))
    pieces = []
    for token in processor.encode_text(text).tokens:
        pieces.append(out.add(token))
        if out.stopped:
            break
    assert out.stopped
    assert joined(pieces) == text[: text.index(stop)]
    assert out.finish() == []


def test_the_earliest_of_several_stop_strings_counts(processor: Processor):
    assert joined(stream(processor, "a b c d", stop=("d", "c", "zz"))) == "a b "


def test_text_that_might_become_a_stop_string_is_held_back_and_given_in_the_end(processor: Processor):
    steps = stream(processor, "ab EN", stop=("END",))
    assert joined(steps[:-1]) == "ab "
    assert joined(steps) == "ab EN"


def test_stop_strings_do_not_end_the_reasoning(processor: Processor):
    steps = stream(processor, "a. b\n</think>\n\nc. d", thinking=True, stop=(".",))
    assert (joined(steps, reasoning=True), joined(steps)) == ("a. b\n", "c")


def test_which_stop_string_came_and_how_many_tokens_were_reasoning_is_told(processor: Processor):
    out = processor.text_stream(True, ("d", "c"))
    for token in processor.encode_text("c d\n</think>\n\na b c d").tokens:
        out.add(token)
    closing = processor.encode_text("c d\n</think>").tokens
    assert (out.stopped, out.thought) == ("c", len(closing))
