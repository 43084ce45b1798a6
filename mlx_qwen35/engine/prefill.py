"""Prefill: prompts into the cache, chunk by chunk. It takes token ids and embeddings, never text."""

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
    """One prompt of a batch."""

    tokens: Sequence[int]
    placeholders: Sequence[Placeholder] = ()
    embeddings: mx.array | None = None  # (n, D), for the placeholders in order


def prefill(
    model: Model,
    cache: Cache,
    rows: Sequence[PromptRow],
    step: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> mx.array:
    """Append prompts of any lengths, one a row, in chunks of `step` columns; (B, D), each row's last hidden state.

    A chunk may end inside an image. progress is called with the tokens of each chunk. If tokens are drafted, the draft
    head follows, and the last layer computes every column instead of one a row.
    """
    longest = max(len(row.tokens) for row in rows)
    cache.reserve(longest)
    columns = [_placeholder_columns(row) for row in rows]
    table = _position_table(rows, longest, cache.next_positions)
    last = mx.zeros((len(rows), model.config.hidden_size), model.dtype)
    for start in range(0, longest, step):
        chunk = [row.tokens[start : start + step] for row in rows]
        lengths = [len(tokens) for tokens in chunk]
        width = max(lengths)
        padded = mx.array([[*tokens, *[0] * (width - len(tokens))] for tokens in chunk])
        visual = _visual(rows, columns, start, start + width)
        positions = None if table is None else table[:, :, start : start + width]
        uneven = None if min(lengths) == width else lengths
        ends = mx.array([max(0, n - 1) for n in lengths])
        if isinstance(cache.follower, DraftFollower):
            first = cache.next_positions
            hidden = model.hidden(padded, cache, uneven, visual, positions, None, Pace())
            cache.follower.prefill(model, padded, hidden, lengths, first, visual, positions)
            hidden = mx.take_along_axis(hidden, ends[:, None, None], axis=1)
        else:
            hidden = model.hidden(padded, cache, uneven, visual, positions, ends, Pace())
        last = mx.where(mx.array(lengths)[:, None] > 0, hidden[:, 0], last)
        cache.evaluate()
        mx.eval(last)
        mx.clear_cache()
        progress(sum(lengths))
    return last


class Pace:
    """Hands layers to the GPU as their graphs are built, and waits so that at most LAYERS_IN_FLIGHT are computed.

    Otherwise MLX runs ahead by up to ten command buffers, whose arrays stay in memory. On the CPU it does not run
    ahead, and the order of a whole graph takes less memory (163 against 194 MB, 1,024 tokens, mid geometry).
    """

    def __init__(self) -> None:
        self.in_flight: deque[list[mx.array]] = deque()

    def __call__(self, arrays: list[mx.array]) -> None:
        if not backend().queues_layers:
            return
        mx.async_eval(arrays)
        self.in_flight.append(arrays)
        if len(self.in_flight) == LAYERS_IN_FLIGHT:
            mx.eval(self.in_flight.popleft())


def _placeholder_columns(row: PromptRow) -> np.ndarray:
    """(n,) columns of a row's placeholders, each with an embedding."""
    columns = np.array([column for p in row.placeholders for column in range(p.start, p.stop)], np.int32)
    count = 0 if row.embeddings is None else len(row.embeddings)
    if count != len(columns):
        raise InputError(
            "embeddings_mismatch",
            f"there must be one embedding for each placeholder; there are {count} for {len(columns)}",
        )
    return columns


def _position_table(rows: Sequence[PromptRow], longest: int, firsts: Sequence[int]) -> np.ndarray | None:
    """(3, B, longest) int32 positions, 0 at padding; None for prompts of text alone, which count on."""
    if not any(row.placeholders for row in rows):
        return None
    table = np.zeros((3, len(rows), longest), np.int32)
    for i, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        table[:, i, : len(row.tokens)] = positions(len(row.tokens), row.placeholders, first)
    return table


def _visual(rows: Sequence[PromptRow], columns: Sequence[np.ndarray], start: int, stop: int) -> Visual | None:
    """The embeddings for the placeholders in columns `start` to `stop`, which are a chunk; None if it has none."""
    owners, own_columns, embeddings = [], [], []
    for i, (row, own) in enumerate(zip(rows, columns, strict=True)):
        low, high = np.searchsorted(own, (start, stop))
        if row.embeddings is not None and low < high:
            owners += [i] * (high - low)
            own_columns.append(own[low:high] - start)
            embeddings.append(row.embeddings[low:high])
    if not embeddings:
        return None
    return Visual(mx.array(owners), mx.array(np.concatenate(own_columns)), mx.concatenate(embeddings))
