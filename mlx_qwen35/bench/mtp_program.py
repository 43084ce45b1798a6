"""Our model in a worker process, decoding with and without drafts: rows computed, steps and seconds."""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx

from mlx_qwen35.bench.acceptance import QUESTIONS, Text, acceptance
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.engine.drafts.speculate import Choice, Drafting, Speculation, attach, choose
from mlx_qwen35.engine.loop import decode
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.engine.sampling import Sampler, Sampling
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import DTYPES, load_model
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Processor

STEP = 1024  # prompt tokens a pass
PROMPT = 32  # random tokens, where there is no tokenizer


class Account(Speculation):
    """Speculation that remembers each round of a single row: how many tokens were drafted, how many accepted."""

    def __init__(self, model: Model, cache: Cache, choice: Choice):
        super().__init__(model, cache, choice)
        self.rounds: list[tuple[int, int]] = []

    def record(self, lengths: Sequence[int], tokens: Sequence[Sequence[int]], paused: float) -> None:
        super().record(lengths, tokens, paused)
        if lengths[0]:
            self.rounds.append((lengths[0] - 1, len(tokens[0]) - 1))


@dataclass(frozen=True)
class Decoded:
    """One answer. rows: that the model computed behind the prompt; rounds: (drafted, accepted) of each of its steps."""

    tokens: tuple[int, ...]
    rows: int
    seconds: float  # from the first token to the last
    rounds: tuple[tuple[int, int], ...]
    drafting: Drafting


@contextmanager
def _rows_of(model: Model) -> Iterator[list[int]]:
    """The rows of each pass of the model, while the block runs."""
    rows: list[int] = []

    def hidden(tokens: mx.array, *args: Any, **options: Any) -> mx.array:
        rows.append(tokens.size)
        return type(model).hidden(model, tokens, *args, **options)

    model.hidden = hidden
    try:
        yield rows
    finally:
        del model.hidden


def answer(
    model: Model,
    row: PromptRow,
    choice: Choice,
    limit: int,
    sampling: Sampling = Sampling(temp=0),  # noqa: B008 (frozen)
    seed: int = 0,
    stop_ids: Collection[int] = (),
    vocabulary: int = 0,
) -> Decoded:
    """Answer one prompt as generate does, by ids: with no stop ids up to the limit."""
    cache = model.make_cache()
    attach(model, cache, choice)
    hidden = prefill(model, cache, [row], STEP)
    sampler = Sampler(sampling, [seed], [len(row.tokens)], vocabulary)
    account = Account(model, cache, choice) if choice.depth else None
    tokens, stamps = [], []
    with _rows_of(model) as rows:
        for (token,) in decode(model, cache, hidden, sampler, [limit], stop_ids, speculation=account):
            tokens.append(token)
            stamps.append(time.perf_counter())
    rounds = tuple(account.rounds) if account else ((0, 0),) * (len(tokens) - 1)
    drafting = account.statistics(0) if account else Drafting(choice.why, steps=len(rounds))
    return Decoded(tuple(tokens), sum(rows), stamps[-1] - stamps[0], rounds, drafting)


def shares(rounds: Sequence[tuple[int, int]], depth: int) -> list[float | None]:
    """p_1 to p_depth: of the drafts j whose predecessors were accepted, how many were; None where there were none."""
    found: list[float | None] = []
    for j in range(depth):
        asked = [accepted > j for drafted, accepted in rounds if drafted > j and accepted >= j]
        found.append(sum(asked) / len(asked) if asked else None)
    return found


def show(model: Model, tokens: Sequence[int], drafts: bool) -> float:
    """Seconds of reading a prompt, with the draft head following or without."""
    cache = model.make_cache()
    if drafts:
        attach(model, cache, Choice(1))
    start = time.perf_counter()
    prefill(model, cache, [PromptRow(tokens)], STEP)
    return time.perf_counter() - start


class MtpProgram:
    """The model and its draft head, and its processor where the folder has a tokenizer."""

    def __init__(self, folder: Path, dtype: str):
        checkpoint = open_checkpoint(folder)
        self.model = load_model(checkpoint, DTYPES[dtype], str(folder))
        if self.model.mtp is None:
            raise InputError("draft_head_missing", "the checkpoint has no draft head (tensors mtp.*)")
        named = (folder / "tokenizer.json").is_file()
        self.processor = Processor.from_folder(folder, checkpoint.config) if named else None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"mode", "depth", "tokens"}, {"reading": tokens, "drafts"} or {"acceptance": seeds, "limit"}."""
        if "reading" in request:
            tokens = self._noise(request["reading"])
            return {"seconds": show(self.model, tokens, bool(request["drafts"]))}
        if "acceptance" in request:
            return self._acceptance(request["acceptance"], request["limit"])
        return self._decode(request["mode"], request["depth"], request["tokens"])

    def _noise(self, count: int) -> list[int]:
        draw = Random(0)
        return [draw.randrange(self.model.config.vocab_size // 2) for _ in range(count)]  # special tokens come last

    def _decode(self, mode: str, depth: int | None, tokens: int) -> dict[str, Any]:
        """Greedily, on past any end of the answer. What former runs have measured is forgotten."""
        self.model.mtp.costs.clear()
        choice = choose(self.model, mode, depth, 1, tokens)
        prompt = self._prompts()[0] if self.processor else self._noise(PROMPT)
        vocabulary = self.processor.vocabulary if self.processor else 0
        done = answer(self.model, PromptRow(prompt), choice, tokens, vocabulary=vocabulary)
        found = {"seconds": done.seconds, "rows": done.rows, "tokens": done.tokens}
        return asdict(done.drafting) | found

    def _prompts(self) -> list[tuple[int, ...]]:
        asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
        return [tuple(self.processor.encode_messages(messages).tokens) for messages in asked]

    def _acceptance(self, seeds: int, limit: int) -> dict[str, Any]:
        """Over the model's own greedy answers to QUESTIONS; without a tokenizer, over what it says to noise."""
        rounds, texts = [], []
        stop_ids = self.processor.stop_ids if self.processor else ()
        vocabulary = self.processor.vocabulary if self.processor else 0
        for prompt in self._prompts() if self.processor else [self._noise(PROMPT)]:
            done = answer(self.model, PromptRow(prompt), Choice(3, fixed=True), limit, stop_ids=stop_ids)
            rounds += done.rounds
            texts.append(Text((*prompt, *done.tokens), len(prompt)))
        after, before = (
            acceptance(self.model, texts, 1.0, range(seeds), vocabulary, before_norm) for before_norm in (False, True)
        )
        return {"shares": shares(rounds, 3), "after_norm": asdict(after), "before_norm": asdict(before)}
