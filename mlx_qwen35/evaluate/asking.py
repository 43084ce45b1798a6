"""Questions go to the model several at a time: neighbours change no answer, and memory says how many fit."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from mlx_qwen35.budget.rows import RowNeeds, RowsPlan
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.generation import request as begin
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.room import encoding_bytes, rows_plan
from mlx_qwen35.engine.sequence import Sequence as Request
from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.choosing import scores
from mlx_qwen35.evaluate.task import TOO_LONG, Asked
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import options_of, spelled
from mlx_qwen35.prompt.processor import Processor

NO_ROOM = "context_length_exceeded"  # the code of an error: the context has no room for a question
OF_IMAGES = ("min_pixels", "max_pixels")
THINKING = {"preset", "enable_thinking", "thinking_budget", "reasoning_effort"}
# What a user's choice takes the place of among a task's own options.
REPLACED = {
    "preset": THINKING | {"max_tokens", *options_of(Sampling)}, "enable_thinking": THINKING,
    "thinking_budget": THINKING,
}  # fmt: skip


def seed_of(task: str, key: str, seed: int) -> int:
    """The seed of a question: the same for every model, batch and order."""
    return zlib.crc32(f"{seed} {task} {key}".encode())


def merged(asked: Asked, given: Mapping[str, Any]) -> dict[str, Any]:
    """A question's own options of `generate` under those that the user gave, without those of images where there is
    none: of a task's questions some may show one.
    """
    replaced = {name for choice, names in REPLACED.items() if choice in given for name in names}
    found = {name: value for name, value in asked.options.items() if name not in replaced} | dict(given)
    return found if shows_media(asked) else {name: value for name, value in found.items() if name not in OF_IMAGES}


def shows_media(asked: Asked) -> bool:
    """Whether a question has images or videos, in its options or in its messages."""
    contents = [] if isinstance(asked.prompt, str) else [message.get("content") for message in asked.prompt]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    given = any(asked.options.get(name) for name in ("images", "videos"))
    return given or any(isinstance(part, Mapping) and part.get("type") != "text" for part in parts)


@contextmanager
def about(key: str) -> Iterator[None]:
    """Errors in the block name the question, but for those of options, which are of all questions."""
    try:
        yield
    except InputError as error:
        if error.code.startswith("option_"):
            raise
        raise InputError(error.code, f"question {key}: {error.fault}", *error.args[2:]) from error


class Question(NamedTuple):
    """What is asked of the model, and under which key and seed."""

    key: str
    seed: int
    asked: Asked


class Asker:
    """A loaded model, and how it is asked.

    given: options of `generate` that the user gave; they win over a task's. rows: most questions at a time; where
    memory has no room for their whole answers there are fewer.
    """

    def __init__(self, model: Model, processor: Processor, given: Mapping[str, Any], rows: int):
        self.model, self.processor, self.given, self.rows = model, processor, dict(given), rows
        self._plan = rows_plan(model)

    def answers(self, questions: Iterable[Question]) -> Iterator[dict[str, Any]]:
        """What comes of each question, in the order in which they end.

        key, seed; prompt_tokens, and image_tokens where it shows something; tokens: of the answer, reasoning_tokens of
        them of the reasoning; finish_reason: see `Result`; cut_at_limit: whether the most tokens of an answer, or the
        context, ended it; answer: the text behind the reasoning. Of a question with choices finish_reason is "choice",
        and there are logprobs, of each choice, and greedy, whether greedy decoding would write it; prompt_tokens are
        those of the choices too. A question that the context has no room for is not asked: it has the finish_reason
        TOO_LONG.

        Raises InputError for a question that the model cannot be asked, and whatever ends a generation.
        """
        engine, left = Engine(self.model), iter(questions)
        running: dict[int, _Running] = {}  # by id of the request
        waiting = next(left, None)
        try:
            while waiting or running:
                while waiting and len(running) < self.rows:
                    line, own = self._tried(waiting, [*running.values()])
                    if line:
                        yield line
                    elif own:
                        engine.add(own.request)
                        running[id(own.request)] = own
                    else:
                        break
                    waiting = next(left, None)
                for request in engine.step() if running else ():
                    if request.finished:
                        yield running.pop(id(request)).line()
        finally:
            for own in running.values():
                engine.cancel(own.request)

    def _tried(
        self, question: Question, others: Sequence["_Running"]
    ) -> tuple[dict[str, Any] | None, "_Running | None"]:
        """The line of a question that has no answer to wait for, or what is to run; see `_begun`."""
        try:
            with about(question.key):
                if question.asked.choices:
                    return self._chosen(question), None
                return None, self._begun(question, others)
        except InputError as error:
            if error.code != NO_ROOM:
                raise
        counts = {"prompt_tokens": 0, "tokens": 0, "reasoning_tokens": 0}
        told = {"finish_reason": TOO_LONG, "cut_at_limit": False, "answer": ""}
        return {"key": question.key, "seed": question.seed, **counts, **told}, None

    def options(self, asked: Asked) -> dict[str, Any]:
        """The options of `generate` that a question is asked with, but for its seed."""
        return merged(asked, self.given)

    def _begun(self, question: Question, others: Sequence["_Running"]) -> "_Running | None":
        """Ready for the engine; None while memory has no room for its longest answer beside the others'."""
        options: Any = self.options(question.asked) | {"seed": question.seed}
        prompt: Any = question.asked.prompt
        try:
            own = _Running(question, begin(self.model, self.processor, prompt, **options), self.processor, self._plan)
            if own.request.limited_by == "memory":
                raise InputError(
                    "memory_exceeded",
                    f"memory has room for {own.request.limit:,} tokens of an answer, and the settings allow more, so "
                    "that the answer would depend on the machine. Lower "
                    f"{spelled('max_tokens')}, choose a folder with fewer bits, or {spelled('kv_bits', '8')}",
                )
        except InputError as error:
            if error.code == "memory_exceeded" and others:
                return None
            raise
        return own if not others or self._plan.fits([other.needs for other in (*others, own)]) else None

    def _chosen(self, question: Question) -> dict[str, Any]:
        """The choice that is the most probable text behind the prompt, without reasoning."""
        asked = question.asked
        found = scores(self.model, self.processor, asked.prompt, asked.choices, self.options(asked))
        sums = [own.sum for own in found]
        best = max(range(len(sums)), key=sums.__getitem__)
        read = sum(map(len, {own.context for own in found})) + sum(len(own.tokens) for own in found)
        return {
            "key": question.key, "seed": question.seed, "prompt_tokens": read, "tokens": 0,
            "finish_reason": "choice", "cut_at_limit": False, "answer": asked.choices[best], "logprobs": sums,
            "greedy": [own.is_greedy for own in found],
        }  # fmt: skip


class _Running:
    """A question that the model is asked now."""

    def __init__(self, question: Question, request: Request, processor: Processor, plan: RowsPlan):
        self.question, self.request = question, request
        prompt = request.prompt  # which the request lets go at its end
        self.seen = sum(place.stop - place.start for place in prompt.placeholders)
        encoding = encoding_bytes(prompt, processor.config.vision, plan.machine)
        self._needs = RowNeeds(len(prompt.tokens), request.limit, request.drafts.policy.depth, encoding)

    @property
    def needs(self) -> RowNeeds:
        return replace(self._needs, waits=not self.request.tokens)

    def line(self) -> dict[str, Any]:
        """What came of it. Raises what ended it, where that was an error."""
        result = self.request.result()
        if result.error is not None:
            raise result.error
        return {
            "key": self.question.key, "seed": self.question.seed, "prompt_tokens": result.prompt_tokens,
            **({"image_tokens": self.seen} if self.seen else {}), "tokens": result.generation_tokens,
            "reasoning_tokens": result.reasoning_tokens, "finish_reason": result.finish_reason,
            "cut_at_limit": result.finish_reason == "length", "answer": result.text,
        }  # fmt: skip
