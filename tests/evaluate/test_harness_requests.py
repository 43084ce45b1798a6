"""What lm-eval asks of a model, and what it gets, without lm-eval: texts behind reasoning, likelihoods, keys."""

from typing import Any, NamedTuple

import pytest
from PIL import Image
from refusing import refused

from mlx_qwen35 import load
from mlx_qwen35.evaluate.harness_requests import Answers, Chat, asked
from mlx_qwen35.evaluate.subject import Subject
from mlx_qwen35.load import LoadOptions
from mlx_qwen35.measure.score import score


class Request(NamedTuple):
    """As lm-eval's Instance."""

    request_type: str
    args: tuple[Any, ...]
    task_name: str = "a"
    doc_id: int = 0


def chat(text: str) -> Chat:
    return Chat.of([{"role": "user", "content": text}])


@pytest.fixture
def answers(tmp_path):
    """(options) -> nano, as lm-eval asks it about the documents 4, 5 and 6 of its task `a`."""

    def made(**given) -> Answers:
        subject = Subject(LoadOptions("nano"), given, 4, 0, tmp_path)
        return Answers(subject, "sums", {"a": [4, 5, 6]}, many=False)

    return made


def test_answers_come_from_behind_the_reasoning_and_are_kept_by_their_documents(answers):
    requests = [Request("generate_until", (chat(f"What is {sum}?"), {"until": ["+"]}), doc_id=i)
                for i, sum in enumerate(("34 + 58", "7 + 5"))]  # fmt: skip
    asking = answers(temp=0.0, max_tokens=160)
    assert asking.generate_until(requests) == ["92", "12"]  # "+" stands in the reasoning
    (first,), (second,) = asking.keys["a", 4], asking.keys["a", 5]
    assert first.startswith("4-") and second.startswith("5-")
    again = answers(temp=0.0, max_tokens=160)
    again.__dict__["_subject"].__dict__["asker"] = None  # nothing is asked again
    assert again.generate_until(requests) == ["92", "12"]


def test_likelihoods_of_a_chat_are_read_without_thinking_and_of_one_token_too(answers):
    given = [Request("loglikelihood", (chat("What is 34 + 58?"), text)) for text in ("9", "92", "93", " no")]
    found = answers().loglikelihood(given)
    model, processor = load("nano")
    asked = [{"role": "user", "content": "What is 34 + 58?"}]
    context = list(processor.encode_messages(asked, enable_thinking=False).tokens)
    for (sum, greedy), request in zip(found, given, strict=True):
        own = score(model, processor, context, processor.tokenizer.encode(request.args[1]))
        assert sum == pytest.approx(own.sum, abs=1e-4) and greedy == own.is_greedy
    assert [greedy for _, greedy in found] == [True, True, False, False]


def test_a_whole_text_is_scored_behind_the_end_token(answers):
    (found,) = answers().loglikelihood_rolling([Request("loglikelihood_rolling", ("What is 7 + 5?",))])
    assert found == pytest.approx(score(*load("nano"), "<|im_end|>", "What is 7 + 5?").sum, abs=1e-4)


def test_the_same_request_twice_is_asked_with_two_seeds(answers):
    asking = answers(enable_thinking=False, temp=1.0, max_tokens=2)
    asking.generate_until([Request("generate_until", (chat("Which?"), {"until": []}))] * 2)
    one, two = asking.keys["a", 4]
    assert two == f"{one}+"


def test_messages_and_images_survive():
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    both = Chat.of([{"role": "system", "content": "Look."}, {"role": "user", "content": "Is <image> like <image>?"}])
    own = asked([Request("generate_until", (both, {"until": "\n\n"}, {"visual": [red, blue]}))])
    text = {"type": "text", "text": "Is "}
    assert own.prompt[0] == {"role": "system", "content": "Look."} and own.options == {"stop": ["\n\n"]}
    assert own.prompt[1]["content"] == [
        text, {"type": "image", "image": red}, {"type": "text", "text": " like "}, {"type": "image", "image": blue},
        {"type": "text", "text": "?"},
    ]  # fmt: skip
    own = asked([Request("generate_until", (chat("Which?"), {}, {"visual": [red]}))])
    assert own.prompt[0]["content"] == [{"type": "image", "image": red}, {"type": "text", "text": "Which?"}]
    with refused("task_invalid", "2", "1 images"):
        asked([Request("generate_until", (both, {}, {"visual": [red]}))])
    with refused("task_invalid", "sounds"):
        asked([Request("generate_until", (both, {}, {"audio": ["a"]}))])


def test_an_answer_that_was_begun_goes_on():
    begun = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "It is"}]
    own = asked([Request("generate_until", (Chat.of(begun, add_generation_prompt=False), {"until": []}))])
    assert (own.prompt, own.options) == (begun, {"continue_final_message": True})
