"""The one loop: read the prompts in chunks, then draw, feed, draw. It knows ids and embeddings, never text."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache import Cache
from mlx_qwen35.chunk import LAYERS_IN_FLIGHT
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
        uneven = None if min(lengths) == width else lengths
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
        if mx.default_device() == mx.cpu:
            return
        mx.async_eval(arrays)
        self.under_way.append(arrays)
        if len(self.under_way) == LAYERS_IN_FLIGHT:
            mx.eval(self.under_way.popleft())


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

    Raises InputError when logits are not finite, before a token of them is yielded; the cache is then of no use.
    """
    logits = model.logits(hidden)
    running = [limit > 0 for limit in limits]
    tokens, finite = sampler.draw(logits), _finite(logits)
    mx.async_eval(tokens, finite)
    for count in range(1, max(limits) + 1):
        following = None
        if count < max(limits):
            logits = _feed(model, cache, tokens, running)
            following = sampler.draw(logits), _finite(logits)
            mx.async_eval(*following)
        _require_finite(finite, running, cache, model)
        drawn = tokens.tolist()
        yield [token if active else None for token, active in zip(drawn, running, strict=True)]
        running = [
            active and token not in stop_ids and count < limit and not finished(row)
            for row, (active, token, limit) in enumerate(zip(running, drawn, limits, strict=True))
        ]
        if following is None or not any(running):
            return
        tokens, finite = following
        if count % CLEAR_EVERY == 0:
            mx.clear_cache()


def _feed(model: Model, cache: Cache, tokens: mx.array, running: Sequence[bool]) -> mx.array:
    """One token a row -> (B, V) logits; rows that have ended read nothing."""
    lengths = None if all(running) else [int(active) for active in running]
    return model.logits(model.hidden(tokens[:, None], cache, lengths)[:, 0])


def _finite(logits: mx.array) -> mx.array:
    """(B, V) -> (B,) boolean: whether all logits of a row are."""
    return (mx.abs(logits) < mx.inf).all(-1)


def _require_finite(finite: mx.array, running: Sequence[bool], cache: Cache, model: Model) -> None:
    """Stop where a logit of a running row is not finite, and say where such a value was remembered first."""
    bad = [row for row, (fine, active) in enumerate(zip(finite.tolist(), running, strict=True)) if active and not fine]
    if not bad:
        return
    layer = cache.first_not_finite(bad[0])
    if layer is None:
        origin = "the last layer or the head made them so, for no layer has read such a value"
    else:  # what a layer remembers is made from its input
        origin = f"layer {layer} is the first that has read such a value, or made one of what it read"
    raise InputError(
        f"logits must be finite, and are not; {origin}. Activations left the range of {_name(model.dtype)}, or the "
        "checkpoint is damaged. Try --dtype bfloat16, then float32, or convert it again; the largest activation of "
        "each layer is shown by mlx_qwen35.doctor --model MODEL --probe"
    )


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
