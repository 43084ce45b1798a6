"""Places of one conversation <-> the arrays of a session.

The deepest place has all its arrays. An earlier one shares its keys and values, which are the first columns of the
deepest, and has DeltaNet states of its own: layers.3.keys, layers.0.recurrent_state, marks.0.layers.0.recurrent_state.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import mlx.core as mx

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.layer import CachePosition, LayerCache
from mlx_qwen35.checkpoint.tensors import Entry

ROOM = 1024  # columns behind those that were read: so many tokens follow without a copy of them
_OF_LAYER = re.compile(r"(?:marks\.(\d+)\.)?layers\.(\d+)\..+")


def session_arrays(places: Sequence[Cache], blank: Cache) -> dict[str, mx.array]:
    """The arrays of caches of one row, each of which begins the next one, the shortest first. They are views.

    blank: an empty cache of the same model.
    """
    own = [place.arrays() for place in places]
    return {stored: own[number][name] for stored, (number, name) in _stored(len(places), blank).items()}


def misfits(entries: Mapping[str, Entry], blank: Cache, lengths: Sequence[int]) -> list[str]:
    """The arrays of layers that a file lacks, has in another shape, or should not have. lengths: of the places."""
    found = {name: entry.shape for name, entry in entries.items() if _OF_LAYER.fullmatch(name)}
    shapes = {name: array.shape for name, array in blank.arrays().items()}
    expected = {
        stored: tuple(size or lengths[number] for size in shapes[name])
        for stored, (number, name) in _stored(len(lengths), blank).items()
    }
    return sorted(name for name in found | expected if found.get(name) != expected.get(name))


def _stored(places: int, blank: Cache) -> dict[str, tuple[int, str]]:
    """Name in the file -> number of the place, and name in its cache. The deepest place comes first."""
    last, arrays = places - 1, blank.arrays()
    deepest = {name: (last, name) for name in arrays} if places else {}
    states = [name for name, array in arrays.items() if array.size]  # the others have a column for each token
    return deepest | {f"marks.{number}.{name}": (number, name) for number in range(last) for name in states}


def read_places(
    arrays: Iterable[tuple[str, mx.array]], blank: Cache, positions: Sequence[CachePosition]
) -> tuple[list[Cache], dict[str, mx.array]]:
    """The caches of a session at these positions, in order, and the arrays that are of no layer.

    arrays: names and arrays as they were written; a layer is made as soon as its own are there. So beside the caches
    memory holds the arrays of one layer.
    """
    last = len(positions) - 1
    layers: dict[tuple[int, int], LayerCache] = {}
    others: dict[str, mx.array] = {}
    for place, group in groupby(arrays, lambda pair: _place(pair[0], last)):
        if place is None:
            others |= group
            continue
        number, layer = place
        state = {name.partition(f"layers.{layer}.")[2]: array for name, array in group}
        layers[place] = type(blank.layers[layer]).from_state([state], ROOM if number == last else 0)
        mx.eval(layers[place].arrays())
    caches = []
    for number, position in enumerate(positions):
        beyond = [positions[last].lengths[0] - position.lengths[0]]
        cache = blank.copy()
        cache.layers = [
            layers[number, i] if (number, i) in layers else layers[last, i].rollback(beyond, [0])
            for i in range(len(blank.layers))
        ]
        cache.position = position
        caches.append(cache)
    return caches, others


def _place(name: str, last: int) -> tuple[int, int] | None:
    """The number of the place, and the layer, of an array; None for one of no layer."""
    match = _OF_LAYER.fullmatch(name)
    return match and (last if match[1] is None else int(match[1]), int(match[2]))
