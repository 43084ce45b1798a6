"""lm-eval's requests become questions, which are asked in batches and kept in the log of a run."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from itertools import groupby
from sys import stderr
from typing import Any, Protocol, Self

from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.items import Line
from mlx_qwen35.evaluate.subject import Subject
from mlx_qwen35.evaluate.task import TOO_LONG, Asked

ROLLING = "loglikelihood_rolling"  # requests about whole texts
IMAGE = "<image>"  # where lm-eval's prompts have an image
END = "<|im_end|>"  # before a text that has nothing before it, unless the tokenizer names another end token


class Request(Protocol):
    """What is used of lm-eval's `Instance`. args: context, then a continuation or settings, then images."""

    request_type: str
    args: tuple[Any, ...]
    task_name: str | None
    doc_id: int | None


class Chat(str):
    """Messages as JSON text, so that lm-eval can hand them around as the prompt that they are not yet."""

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> Self:
        """add_generation_prompt: False where the answer goes on with the last message, an assistant's."""
        return cls(json.dumps({"messages": list(messages), "go_on": not add_generation_prompt}))


class TooLong(Exception):
    """The context has no room for some documents. places: their tasks' names in lm-eval, and their numbers there."""

    def __init__(self, places: set[tuple[str, int]]):
        super().__init__(places)
        self.places = places


class Answers:
    """What lm-eval asks of a model, whose answers stand in the log of a run.

    subject: the model. task: name of the log. numbers: task of lm-eval -> the numbers of the documents that are asked;
    lm-eval counts those alone. many: whether the log is of several tasks.
    """

    def __init__(self, subject: Subject, task: str, numbers: Mapping[str, Sequence[int]], many: bool):
        super().__init__()
        self._subject, self._task, self._numbers, self._many = subject, task, numbers, many
        self._end = subject.processor.tokenizer.special_tokens.get("eos_token", END)
        self.keys: dict[tuple[str, int], list[str]] = {}  # (task, document) -> its questions
        self.asking = False  # whether an error is none of lm-eval's

    def generate_until(self, requests: list[Request], disable_tqdm: bool = False) -> list[str]:
        """The text behind the reasoning, up to one of the strings `until`, which reasoning is not searched for."""
        return [line["answer"] for line in self._asked([[own] for own in requests])]

    def loglikelihood(self, requests: list[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of continuations, without reasoning: the sum of logprobs, and whether greedy decoding would write it."""
        lines = self._asked([[*own] for _, own in groupby(requests, lambda own: (*_place(own), own.args[0]))])
        return [pair for line in lines for pair in zip(line["logprobs"], line["greedy"], strict=True)]

    def loglikelihood_rolling(self, requests: list[Request], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, behind the end token."""
        return [line["logprobs"][0] for line in self._asked([[own] for own in requests])]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages as JSON: whether they are rendered with thinking depends on what is asked of them."""
        return Chat.of(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        return self._subject.name

    def _asked(self, sets: Sequence[Sequence[Request]]) -> list[Line]:
        """The lines of sets of requests, those of a set about one prompt. Raises TooLong once the others are asked."""
        self.asking = True
        places = [(task, self._numbers[task][document]) for task, document in (_place(own[0]) for own in sets)]
        whole = {"answer": ""} if sets[0][0].request_type == ROLLING else {}  # its text is no answer
        questions: dict[str, Callable[[], Asked]] = {}
        for own, (task, number) in zip(sets, places, strict=True):
            key = f"{f'{task}/' if self._many else ''}{number}-{_digest(own)}"
            while key in questions:  # the same request, to be answered several times
                key += "+"
            questions[key] = lambda own=own: asked(own, self._end)  # type: ignore[misc]
            self.keys.setdefault((task, number), []).append(key)
        with redirect_stderr(stderr):
            lines = self._subject.ask(self._task, questions, lambda key, answer: {"score": None} | whole)
        long = {place for place, line in zip(places, lines, strict=True) if line["finish_reason"] == TOO_LONG}
        if long:
            raise TooLong(long)
        self.asking = False
        return lines


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's bars. What `Harness` shows is shown."""
    with redirect_stderr(StringIO()):
        yield


def asked(requests: Sequence[Request], end: str = END) -> Asked:
    """What the model is asked, for requests about one prompt. InputError task_invalid where it cannot be."""
    own = requests[0]
    if own.request_type == ROLLING:
        return Asked(end, {"ignore_chat_template": True}, [own.args[0]])
    prompt, options = _prompt(own, end)
    if own.request_type == "loglikelihood":
        return Asked(prompt, options, [other.args[1] for other in requests])
    until = own.args[1].get("until") or []
    stop = [text for text in ([until] if isinstance(until, str) else until) if text]
    return Asked(prompt, options | ({"stop": stop} if stop else {}))


def _prompt(own: Request, end: str) -> tuple[Any, dict[str, Any]]:
    context = own.args[0]
    media: Mapping[str, Any] = own.args[2] if len(own.args) > 2 else {}
    if media.get("audio"):
        raise InputError("task_invalid", f"{own.task_name} asks about sounds, which the model does not hear")
    if not isinstance(context, Chat):
        return context or end, {"ignore_chat_template": True}
    found = json.loads(context)
    messages = with_images(found["messages"], media["visual"]) if media.get("visual") else found["messages"]
    return messages, {"continue_final_message": True} if found["go_on"] else {}


def with_images(messages: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages with images in the place of "<image>"; those without a place stand before the last message's text."""
    left, made = list(images), []
    places = sum(message["content"].count(IMAGE) for message in messages)
    if places > len(left):
        raise InputError(
            "task_invalid", f"a question must have an image for each {IMAGE}; one has {places}, and {len(left)} images"
        )
    for number, message in enumerate(messages, start=1):
        first, *others = message["content"].split(IMAGE)
        ahead = left[: len(left) - places] if number == len(messages) else []
        own: list[dict[str, Any]] = [{"type": "image", "image": image} for image in ahead]
        left = left[len(ahead) :]
        own += [{"type": "text", "text": first}] if first else []
        for text in others:
            own += [{"type": "image", "image": left.pop(0)}, *([{"type": "text", "text": text}] if text else [])]
            places -= 1
        made.append({**message, "content": own if ahead or others else first})
    return made


def _place(own: Request) -> tuple[str, int]:
    assert own.task_name is not None and own.doc_id is not None, "lm-eval's tasks name both"
    return own.task_name, own.doc_id


def _digest(requests: Sequence[Request]) -> str:
    """Of all that is asked: an answer that was given to another question is not used again."""
    own, made = requests[0], hashlib.sha256()
    texts = [other.args[1] for other in requests] if own.request_type == "loglikelihood" else own.args[1:2]
    made.update(json.dumps([own.request_type, own.args[0], texts], sort_keys=True, default=str).encode())
    for image in own.args[2].get("visual", ()) if len(own.args) > 2 else ():
        made.update(image.convert("RGBA").tobytes())
    return made.hexdigest()[:8]
