"""Prefill: a prompt into a cache, chunk by chunk. It takes token ids and embeddings, never text."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.model import Model, Visual
from mlx_qwen35.model.pace import Pace
from mlx_qwen35.prompt.positions import Placeholder, positions


class PromptRow(NamedTuple):
    """A prompt as the model takes it."""

    tokens: Sequence[int]
    placeholders: Sequence[Placeholder] = ()
    embeddings: mx.array | None = None  # (n, D), for the placeholders in order


def prefill(
    model: Model, cache: Cache, row: PromptRow, step: int, progress: Callable[[int], None] = lambda tokens: None
) -> mx.array:
    """Append a prompt to a cache of one row in chunks of `step` tokens; (1, D), its last hidden state.

    progress is called with the tokens of each chunk.
    """
    for chunk in chunks(model, cache, row, lambda: step):
        progress(chunk.tokens)
    return chunk.hidden


class ReadingSpeed:
    """How fast prompts are read, as measured of the chunks before."""

    LEAST = 32  # tokens of a chunk that tells: what each chunk takes once shows less in it

    def __init__(self) -> None:
        self._token: float | None = None  # seconds a token

    def within(self, seconds: float) -> int:
        """Tokens that are read in so many seconds: a multiple of LEAST, where it is as many."""
        if not self._token:
            return self.LEAST
        tokens = int(seconds / self._token)
        return max(1, tokens - tokens % self.LEAST if tokens >= self.LEAST else tokens)

    def measured(self, tokens: int, asked: int, seconds: float) -> None:
        """A chunk took so long. asked: its tokens, if it had not ended at a mark."""
        if self._token is None or tokens >= min(asked, self.LEAST):
            self._token = seconds / tokens


class Chunk(NamedTuple):
    """A chunk that is in the cache: its tokens, and the hidden state (1, D) of the last one."""

    tokens: int
    hidden: mx.array


def chunks(
    model: Model, cache: Cache, row: PromptRow, step: Callable[[], int], ends: Sequence[int] = ()
) -> Iterator[Chunk]:
    """The chunks of `prefill`, each computed when it is asked for.

    step: the most tokens of the next chunk. ends: numbers of tokens at which a chunk must end.

    A chunk may end inside an image. If tokens are drafted, the draft head follows, and the last layer computes every
    token instead of the last one.
    """
    total = len(row.tokens)
    cache.reserve(total)
    columns = _placeholder_columns(row)
    table = positions(total, row.placeholders, cache.next_positions[0])[:, None] if row.placeholders else None
    stop, ends = 0, [*ends, total]
    while stop < total:
        start, stop = stop, min(stop + step(), *(end for end in ends if end > stop))
        tokens = mx.array([list(row.tokens[start:stop])])
        visual = _visual(row, columns, start, stop)
        own = None if table is None else table[:, :, start:stop]
        if isinstance(cache.follower, DraftFollower):
            first = cache.next_positions
            hidden = model.hidden(tokens, cache, None, visual, own, None, Pace())
            cache.follower.prefill(model, tokens, hidden, [stop - start], first, visual, own)
            hidden = hidden[:, -1]
        else:
            hidden = model.hidden(tokens, cache, None, visual, own, mx.array([stop - start - 1]), Pace())[:, 0]
        cache.evaluate()
        mx.eval(hidden)
        mx.clear_cache()
        yield Chunk(stop - start, hidden)


def _placeholder_columns(row: PromptRow) -> np.ndarray:
    """(n,) the places of a prompt's placeholders, each with an embedding."""
    columns = np.array([column for p in row.placeholders for column in range(p.start, p.stop)], np.int32)
    count = 0 if row.embeddings is None else len(row.embeddings)
    if count != len(columns):
        raise InputError(
            "embeddings_mismatch",
            f"there must be one embedding for each placeholder; there are {count} for {len(columns)}",
        )
    return columns


def _visual(row: PromptRow, columns: np.ndarray, start: int, stop: int) -> Visual | None:
    """The embeddings for the placeholders in columns `start` to `stop`, which are a chunk; None if it has none."""
    low, high = np.searchsorted(columns, (start, stop))
    if row.embeddings is None or low == high:
        return None
    own = mx.array(columns[low:high] - start)
    return Visual(mx.zeros_like(own), own, row.embeddings[low:high])
