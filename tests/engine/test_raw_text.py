"""Raw text in a call: what may come in it, and where it ends, so that the parser of answers ends it there too."""

import random

import numpy as np
import pytest
from engine.grammars import allowed, read_calls

from mlx_qwen35 import load
from mlx_qwen35.engine.constraints.compiler import compiler_of
from mlx_qwen35.engine.constraints.raw import TAGS, Raw, Scan, scan
from mlx_qwen35.engine.constraints.states import Chain, End

HEAD, TAIL = "<tool_call>\n<function=f>\n<parameter=s>\n", "</function>\n</tool_call>"


@pytest.fixture(scope="module")
def processor():
    return load("nano")[1]


@pytest.fixture(scope="module")
def raw(processor):
    return compiler_of(processor).raw


def end_of(text: str) -> int | None:
    """Where the value in a text ends, behind the line that closes it; -1 if it goes on; None for what must not come."""
    state: Scan | None = Scan()
    for place, byte in enumerate(text.encode()):
        state = state and scan(state, bytes([byte]))
        if state is None:
            return None
        if state.ended == 2:
            return place + 1
    return -1


@pytest.mark.parametrize(
    "value",
    [
        "Oslo", "", "a\nb", "\nx\n", "<p>1 < 2</p>\n<br/>", "a</para>", "x </function> y </tool_call> z", "a\r", "日本",
        'return "</parameter>" + x', "a </parameter> b", "  </parameter> b", "a </parameter>", "</parame\n",
        "<parameter",
        "<parameter=path>\n/b\n</parameter>\n", "<tool_call>\n<function=g>\n<parameter=p>\n/b\n</parameter>\n"
        "</function>\n</tool_call>\nEnd.", "<function=g></function>x", "<parameter=a>\n</parameter1>\n</parameter>",
    ],
)  # fmt: skip
def test_a_value_ends_at_its_own_closer(value):
    text = f"{value}\n</parameter>\n"
    assert end_of(text) == len(text.encode())
    assert read_calls(f"{HEAD}{text}{TAIL}") == [("f", {"s": value})]


def test_an_empty_value_may_lack_its_line():
    assert end_of("</parameter>\n") == len("</parameter>\n")


@pytest.mark.parametrize(
    "text",
    [
        "a\n</parameter1>", "a\n</parameter b", "a\n</parameter></", "a\n</parameter>x",  # at a line start it ends
        "a</parameter>\n<parameter=", "a</parameter> <function=", "a</parameter></function>",  # more of a call
        "a</function>\n</tool_call>", "a</function>\n<function=", "a</function></function>",
        "<parameter=a></function>", "<function=a></parameter>", "<tool_call></function>", "<parameter=a></tool_call>",
        "<parameter=a></parameter><parameter=", "<function=a></function>\n</tool_call>",
    ],
)  # fmt: skip
def test_what_could_be_more_of_the_call_must_not_come(text):
    assert end_of(text) is None


def test_bytes_in_any_pieces_lead_to_the_same_place():
    rng = random.Random(0)
    pieces = [tag.decode() for tag in TAGS] + ["\n", " ", "x", "<", "</", ">", "1>", "</param"]
    for _ in range(2000):
        data = "".join(rng.choices(pieces, k=rng.randint(1, 9))).encode()
        state, place = Scan(), 0
        while place < len(data) and state:
            step = rng.randint(1, 20)
            state, place = scan(state, data[place : place + step]), place + step
        whole = scan(Scan(), data)
        assert state == whole, data


def test_the_mask_is_what_the_bytes_of_each_token_lead_to(processor, raw):
    """At every place that random texts of tags lead to; and at nearly all others it is one and the same array."""
    rng, data = random.Random(0), raw.vocabulary.bytes
    pieces = [tag.decode() for tag in TAGS] + ["\n", " ", "x", "<", "</", "</param", "<fun"]
    seen = set()
    for _ in range(700):
        place = scan(Scan(), "".join(rng.choices(pieces, k=rng.randint(0, 5))).encode())
        if place is None or place.ended is not None or place in seen:
            continue
        seen.add(place)
        expected = [token for token, text in enumerate(data) if text and scan(place, text) is not None]
        assert allowed(Chain(Raw(raw, lambda: End(raw.vocabulary), place)), processor) == expected, place
    assert len(seen) > 60
    assert len({id(raw.mask(place)) for place in seen}) < len(seen)


def test_no_control_token_and_no_stop_token_may_come(processor, raw):
    added = set(processor.tokenizer.backend.get_added_tokens_decoder())
    mask = np.flatnonzero(np.unpackbits(raw.mask(Scan()).view(np.uint8), bitorder="little"))
    assert set(mask.tolist()) == set(range(processor.vocabulary)) - added
    assert processor.stop_ids <= added


def test_masks_are_shared_and_cannot_be_written(raw):
    for place in (Scan(), Scan(tail=b"</parameter", line_start=False)):
        with pytest.raises(ValueError):
            raw.mask(place)[0] = 0
