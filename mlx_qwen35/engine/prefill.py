"""Prompts into the cache, chunk by chunk. It knows ids and embeddings, never text."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.backend import backend
from mlx_qwen35.budget.chunk import LAYERS_IN_FLIGHT
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.model import Model, Visual
from mlx_qwen35.prompt.positions import Placeholder, positions


class PromptRow(NamedTuple):
    """One prompt as the model reads it."""

    tokens: Sequence[int]
    placeholders: Sequence[Placeholder] = ()  # its placeholders
    embeddings: mx.array | None = None  # (n, D): what stands in their place, in order


def prefill(
    model: Model,
    cache: Cache,
    rows: Sequence[PromptRow],
    step: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> mx.array:
    """Feed prompts of any lengths, one a row, in chunks of `step` columns; (B, D), each row's last hidden.

    A chunk may end inside an image. progress is told the number of tokens after each chunk. Where the cache has drafts,
    the draft head follows: the last layer then computes every column.
    """
    longest = max(len(row.tokens) for row in rows)
    cache.reserve(longest)
    places = [_Places(row, first) for row, first in zip(rows, cache.next_positions, strict=True)]
    last: mx.array | None = None
    for start in range(0, longest, step):
        chunk = [row.tokens[start : start + step] for row in rows]
        width = max(map(len, chunk))
        lengths = [len(tokens) for tokens in chunk]
        padded = mx.array([[*tokens, *[0] * (width - len(tokens))] for tokens in chunk])
        visual, positions = _looks(places, start, width)
        ends = mx.array([max(0, n - 1) for n in lengths])
        uneven = None if min(lengths) == width else lengths
        if isinstance(cache.follower, DraftFollower):
            first = cache.next_positions
            hidden = model.hidden(padded, cache, uneven, visual, positions, None, Pace())
            here = mx.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0]
            cache.follower.prefill(model, padded, hidden, lengths, first, visual, positions)
        else:
            here = model.hidden(padded, cache, uneven, visual, positions, ends, Pace())[:, 0]
        last = here if last is None else mx.where(mx.array([n > 0 for n in lengths])[:, None], here, last)
        cache.evaluate()
        mx.eval(last)
        mx.clear_cache()
        progress(sum(lengths))
    return last


class Pace:
    """Hands layers over to the GPU as their graphs are made, and waits so that at most LAYERS_IN_FLIGHT are under way.

    Else MLX runs ahead, up to ten command buffers, and what they name stays in memory until they end. On the CPU it
    does not, and there the order of a whole graph takes less memory (163 against 194 MB, 1,024 tokens, mid geometry).
    """

    def __init__(self) -> None:
        self.under_way: deque[list[mx.array]] = deque()

    def __call__(self, arrays: list[mx.array]) -> None:
        if not backend().queues_layers:
            return
        mx.async_eval(arrays)
        self.under_way.append(arrays)
        if len(self.under_way) == LAYERS_IN_FLIGHT:
            mx.eval(self.under_way.popleft())


class _Places:
    """Where one row's placeholders are, and all its positions."""

    def __init__(self, row: PromptRow, first: int):
        self.columns = np.concatenate([np.arange(p.start, p.stop) for p in row.placeholders] or [np.zeros(0, int)])
        count = 0 if row.embeddings is None else len(row.embeddings)
        if count != len(self.columns):
            raise InputError(
                "embeddings_mismatch",
                f"there must be one embedding for each placeholder; there are {count} for {len(self.columns)}",
            )
        self.embeddings, self.first = row.embeddings, first
        self.positions = positions(len(row.tokens), row.placeholders, first)


def _looks(places: Sequence[_Places], start: int, width: int) -> tuple[Visual | None, np.ndarray | None]:
    """What a chunk of columns shows, and its positions; neither for prompts of text, which go on counting."""
    if not any(len(row.columns) for row in places):
        return None, None
    table = np.zeros((3, len(places), width), np.int32)
    rows, columns, embeddings = [], [], []
    for i, row in enumerate(places):
        own = row.positions[:, start : start + width]
        table[:, i, : own.shape[1]] = own
        low, high = np.searchsorted(row.columns, (start, start + width))
        if low < high:
            rows.append(np.full(high - low, i))
            columns.append(row.columns[low:high] - start)
            embeddings.append(row.embeddings[low:high])
    if not rows:
        return None, table
    indices = [np.concatenate(part).astype(np.int32) for part in (rows, columns)]
    assert indices[1].max() < width, "MLX writes to wherever an index says"
    return Visual(*map(mx.array, indices), mx.concatenate(embeddings)), table
