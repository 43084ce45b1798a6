"""A few rows of the data answered by the model, and how many of the draft head's tokens it accepts meanwhile.

A row's question is what stands before its last answer. Drafts change no answer, so one generation gives both.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.checkpoint.adapter import Adapter, Pair
from mlx_qwen35.engine.drafts.speculate import DraftPolicy, choose_drafts
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.engine.sequence import Sequence as Request
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.lora import NONE, AdapterSet
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.train.rows import Row, RowFile

COUNT, MOST_TOKENS = 8, 64  # questions, and tokens of an answer
GREEDY = Sampling(temp=0)
TRAINED = "trained"  # the adapter's name while it answers
_TURN = re.compile(r".*<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)
_MEDIA = re.compile(r"<\|vision_start\|>.*?<\|vision_end\|>", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """What a row asks, and the answer that it teaches. shown: the last words of the user. line: of the file."""

    prompt: Prompt
    shown: str
    right: str
    line: int


@dataclass(frozen=True)
class Answers:
    """The greedy answers to some questions, and the draft head's tokens at one draft a step; None: it has no head."""

    texts: tuple[str, ...]
    drafted: int | None = None
    accepted: int | None = None

    @property
    def acceptance(self) -> float | None:
        """Accepted of drafted tokens, 0 to 1; None where none were drafted."""
        return None if not self.drafted or self.accepted is None else self.accepted / self.drafted


def questions(rows: RowFile | Sequence[Row], processor: Processor, count: int = COUNT) -> list[Question]:
    """At most `count` questions, of rows that are spread evenly over all. Only so many rows are rendered.

    A row that was cut at its end asks something only where all are cut.
    """
    total, step = len(rows), max(1, len(rows) // count)
    order = [i for first in range(step) for i in range(first, total, step)]
    found: list[Row] = []
    for i in order[: 4 * count]:
        row = rows[i]
        if any(row.targets):
            found.append(row)
        if sum(not row.cut for row in found) == count:
            break
    return [_question(row, processor) for row in sorted(found, key=lambda row: row.cut > 0)[:count]]


def _question(row: Row, processor: Processor) -> Question:
    """What stands before the last run of targets; of a text, all of which is a target, the first half is the prompt."""
    targets = list(row.targets)
    stop = max(i for i, target in enumerate(targets) if target) + 1
    start = next((i for i in range(stop - 1, 0, -1) if not targets[i]), 0) + 1
    if start == 1:
        start = max(1, stop // 2)
    media = tuple(placed for placed in row.media if placed.placeholders[-1].stop <= start)
    prompt = Prompt(row.tokens[:start], processor.opens_thinking(row.tokens[:start]), media)
    shown, right = _shown(processor.decode(prompt.tokens)), _answer(row.tokens[start:stop], processor)
    return Question(prompt, shown, right, row.line)


def _shown(text: str) -> str:
    """The user's last words in a prompt's text, or the end of a raw text; an image is (image)."""
    found = _TURN.match(text)
    return _MEDIA.sub("(image) ", found.group(1) if found else text[-200:]).strip()


def _answer(tokens: Sequence[int], processor: Processor) -> str:
    return processor.decode([token for token in tokens if token not in processor.stop_ids]).strip()


def answers(
    model: Model,
    processor: Processor,
    asked: Sequence[Question],
    pairs: Mapping[str, Pair] | None = None,
    most: int = MOST_TOKENS,
) -> Answers:
    """Answer each question greedily, one after the other, with at most `most` tokens.

    pairs: the low-rank parts that are beside the weights meanwhile, by Hugging Face name; None: the base alone.
    """
    drafts = DraftPolicy(0)
    if model.mtp is not None:
        drafts = _one_draft(model, most)
    with _beside(model, pairs) as name:
        requests = [_answered(model, processor, question.prompt, name, drafts, most) for question in asked]
    texts = tuple(_answer(request.tokens, processor) for request in requests)
    if not drafts.depth:
        return Answers(texts)
    made = [request.drafts.statistics() for request in requests]
    return Answers(texts, sum(own.drafted for own in made), sum(own.accepted for own in made))


def _one_draft(model: Model, tokens: int) -> DraftPolicy:
    """One draft a step, none where the head is damaged or memory has no room for it."""
    try:
        return choose_drafts(model, "on", 1, 1, tokens)
    except InputError:
        return DraftPolicy(0)


def _answered(
    model: Model, processor: Processor, prompt: Prompt, adapter: str, drafts: DraftPolicy, most: int
) -> Request:
    sampler = Sampler(GREEDY, 0, len(prompt.tokens), processor.vocabulary)
    chunk = model.chunk(len(prompt.tokens))
    request = Request(
        prompt, sampler, most, prefill_step_size=chunk, stop_ids=processor.stop_ids, drafts=drafts, adapter=adapter
    )
    engine = Engine(model)
    engine.add(request)
    while not engine.idle:
        engine.step()
    if request.error:
        raise request.error
    return request


@contextmanager
def _beside(model: Model, pairs: Mapping[str, Pair] | None) -> Iterator[str]:
    """The name of an adapter of these pairs, which is the model's only one within the block."""
    if not pairs:
        yield NONE
        return
    before, model.adapters = model.adapters, AdapterSet(model.dtype)
    try:
        model.adapters.add(TRAINED, Adapter(Path(TRAINED), "peft", pairs))
        yield TRAINED
    finally:
        model.adapters = before
