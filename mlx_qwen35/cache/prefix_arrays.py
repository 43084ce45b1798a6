"""A snapshot <-> arrays of its own, and columns of keys and values from one place of a prompt to the next.

So several places of a prompt are kept without a column twice: each has its DeltaNet states, and the columns behind the
place before it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import mlx.core as mx

from mlx_qwen35.cache.cache import Cache, Snapshot
from mlx_qwen35.cache.layer import CachePosition, DeltaCache, KVCache
from mlx_qwen35.cache.session_arrays import ROOM
from mlx_qwen35.machine.process import LOCK

Arrays = Iterable[tuple[str, mx.array]]


def columns(cache: Cache, start: int) -> dict[str, mx.array]:
    """Keys and values behind the first `start` tokens, by name: layers.3.keys. They are views."""
    kept = [(i, layer) for i, layer in enumerate(cache.layers) if isinstance(layer, KVCache)]
    return {f"layers.{i}.{name}": a[:, :, start:] for i, layer in kept for name, a in layer.view(0).items()}


def states(cache: Cache) -> dict[str, mx.array]:
    """DeltaNet states, by name: layers.0.conv_state. They are views."""
    kept = [(i, layer) for i, layer in enumerate(cache.layers) if isinstance(layer, DeltaCache)]
    return {f"layers.{i}.{name}": a for i, layer in kept for name, a in layer.view(0).items()}


def restored(
    empty: Callable[[], Cache], position: CachePosition, pieces: Iterable[Sequence[tuple[str, mx.array]]]
) -> Snapshot:
    """A snapshot of a cache at this position. empty: makes a cache of the same model.

    pieces: arrays as `columns` gave them, in order, and last those of `states`. Between two pieces others compute.
    """
    with LOCK:
        blank = empty()
        blank.reserve(position.lengths[0] + ROOM)
    for piece in pieces:
        with LOCK:
            for i, own in _by_layer(piece).items():
                layer = blank.layers[i]
                if isinstance(layer, KVCache):
                    layer.rows[0].append(own, next(iter(own.values())).shape[2])
                else:
                    blank.layers[i] = DeltaCache.from_state([own])
                mx.eval(blank.layers[i].arrays())
    blank.position = position
    lengths = {row.length for layer in blank.layers if isinstance(layer, KVCache) for row in layer.rows}
    if lengths - {*position.lengths}:
        raise ValueError(f"columns of {lengths} tokens must be of {position.lengths}")
    for layer in blank.layers:
        for row in layer.rows if isinstance(layer, KVCache) else ():
            row.claimed = row.length
    return blank.snapshot()


def _by_layer(piece: Arrays) -> Mapping[int, dict[str, mx.array]]:
    found: dict[int, dict[str, mx.array]] = {}
    for name, array in piece:
        _, layer, own = name.split(".", 2)
        found.setdefault(int(layer), {})[own] = array
    return found
