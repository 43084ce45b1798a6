"""The one loop: read the prompts in chunks, then draw, feed, draw. It knows ids and embeddings, never text."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache import Cache
from mlx_qwen35.errors import InputError
from mlx_qwen35.model import Model, Visual
from mlx_qwen35.positions import Run, positions
from mlx_qwen35.sampling import Sampler

CLEAR_EVERY = 256  # steps between returning MLX's unused buffers to the system


class Row(NamedTuple):
    """One prompt as the model reads it."""

    tokens: Sequence[int]
    runs: Sequence[Run] = ()  # its placeholders
    embeddings: mx.array | None = None  # (n, D): what stands in their place, in order


def read(
    model: Model,
    cache: Cache,
    rows: Sequence[Row],
    step: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> mx.array:
    """Feed prompts of any lengths, one a row, in chunks of `step` columns; (B, D), each row's last hidden.

    A chunk may end inside an image. progress is told the number of tokens after each chunk.
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
        here = model.hidden(padded, cache, None if min(lengths) == width else lengths, visual, positions, ends)[:, 0]
        last = here if last is None else mx.where(mx.array([n > 0 for n in lengths])[:, None], here, last)
        cache.evaluate()
        mx.eval(last)
        mx.clear_cache()
        progress(sum(lengths))
    return last


class _Places:
    """Where one row's placeholders are, and all its positions."""

    def __init__(self, row: Row, first: int):
        self.columns = np.concatenate([np.arange(run.start, run.stop) for run in row.runs] or [np.zeros(0, int)])
        count = 0 if row.embeddings is None else len(row.embeddings)
        if count != len(self.columns):
            raise InputError(
                f"there must be one embedding for each placeholder; there are {count} for {len(self.columns)}"
            )
        self.embeddings, self.first = row.embeddings, first
        self.positions = positions(len(row.tokens), row.runs, first)


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


def decode(
    model: Model,
    cache: Cache,
    hidden: mx.array,
    sampler: Sampler,
    limits: Sequence[int],
    stop_ids: Collection[int],
    finished: Callable[[int], bool] = lambda row: False,
) -> Iterator[list[int | None]]:
    """Draw tokens after `read` and yield one for each row a step, None for rows that have ended.

    A row ends with a stop id, which is yielded, at its limit, or when finished(row) says so after its token was
    yielded. The next step is under way while a token is looked at. So the cache has read every token that was yielded,
    except, where all rows reached their limits, the last ones.

    Raises InputError when the first logits are not finite.
    """
    logits = model.logits(hidden)
    if not mx.isfinite(logits).all().item():
        raise InputError(
            "the logits of this checkpoint are not finite: it is damaged, or its values overflow this dtype. "
            "Try --dtype bfloat16 or float32, or convert it again"
        )
    running = [limit > 0 for limit in limits]
    tokens = sampler.draw(logits)
    mx.async_eval(tokens)
    for count in range(1, max(limits) + 1):
        following = None
        if count < max(limits):
            following = sampler.draw(_feed(model, cache, tokens, running))
            mx.async_eval(following)
        drawn = tokens.tolist()
        yield [token if active else None for token, active in zip(drawn, running, strict=True)]
        running = [
            active and token not in stop_ids and count < limit and not finished(row)
            for row, (active, token, limit) in enumerate(zip(running, drawn, limits, strict=True))
        ]
        if following is None or not any(running):
            return
        tokens = following
        if count % CLEAR_EVERY == 0:
            mx.clear_cache()


def _feed(model: Model, cache: Cache, tokens: mx.array, running: Sequence[bool]) -> mx.array:
    """One token a row -> (B, V) logits; rows that have ended read nothing."""
    lengths = None if all(running) else [int(active) for active in running]
    return model.logits(model.hidden(tokens[:, None], cache, lengths)[:, 0])
