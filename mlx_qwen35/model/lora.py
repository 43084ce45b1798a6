"""The loaded adapters of a model, and their low-rank parts beside its products.

An adapter is an argument of a forward pass and no state of the model: `ActiveAdapters` says which adapter each row of a
pass has. A product of several maps (`Joined`) gets one low-rank part, A of its maps stacked and B block by block, so
that nothing is taken apart.
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter import Adapter, Pair
from mlx_qwen35.checkpoint.names import VISION
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.low_rank import ActiveAdapters, LowRank, Maps
from mlx_qwen35.values import shown

BASE = "base"  # the name that asks for no adapter
NONE = ""  # stands for no adapter in the rows of a cache


def stacked(maps: Maps, adapters: Sequence[Mapping[str, Pair]]) -> LowRank | None:
    """The low-rank parts of a product, from the pairs of each adapter by the weight's name."""
    if not any(name in pairs for pairs in adapters for name, _ in maps):
        return None
    own = [_of_one(maps, pairs) for pairs in adapters]
    width = next(a.shape[1] for a, _ in own if a is not None)
    rank = max(a.shape[0] for a, _ in own if a is not None)
    out = sum(rows for _, rows in maps)
    made = []
    for a, b in own:
        if a is None or b is None:
            made.append((mx.zeros((rank, width)), mx.zeros((out, rank))))
        else:
            short = rank - a.shape[0]
            made.append((mx.pad(a, [(0, short), (0, 0)]), mx.pad(b, [(0, 0), (0, short)])) if short else (a, b))
    return LowRank(mx.stack([a for a, _ in made]), mx.stack([b for _, b in made]))


def _of_one(maps: Maps, pairs: Mapping[str, Pair]) -> tuple[mx.array | None, mx.array | None]:
    """One adapter's A (R, in) and B (out, R) for a product."""
    there = [name for name, _ in maps if name in pairs]
    if not there:
        return None, None
    if len(maps) == 1:
        pair = pairs[there[0]]
        return pair.a, pair.b * pair.scale
    rank, at, blocks = sum(len(pairs[name].a) for name in there), 0, []
    for name, rows in maps:
        if name not in pairs:
            blocks.append(mx.zeros((rows, rank)))
            continue
        pair = pairs[name]
        own = pair.a.shape[0]
        blocks.append(mx.pad(pair.b * pair.scale, [(0, 0), (at, rank - at - own)]))
        at += own
    return mx.concatenate([pairs[name].a for name in there]), mx.concatenate(blocks)


class AdapterSet:
    """The loaded adapters of a model, by name. dtype: in which they are held, that of activations."""

    def __init__(self, dtype: mx.Dtype):
        self.dtype = dtype
        self.default = NONE  # the adapter of a request that names none
        self._adapters: dict[str, Adapter] = {}
        self._products: dict[str, LowRank | None] = {}  # by the name of a product's first map

    @property
    def names(self) -> list[str]:
        return list(self._adapters)

    def __bool__(self) -> bool:
        return bool(self._adapters)

    def __getitem__(self, name: str) -> Adapter:
        return self._adapters[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(adapter.nbytes for adapter in self._adapters.values())

    def add(self, name: str, adapter: Adapter) -> None:
        """Hold one more, which was checked against the checkpoint. InputError for a name that is taken."""
        if name in self._adapters or name in (BASE, NONE):
            raise InputError("option_invalid", f"each adapter needs a name of its own, and not {BASE!r}; got {name!r}")
        self._adapters[name] = adapter
        self._products.clear()

    def named(self, name: str | None) -> str:
        """The adapter that a request names, as caches note it: NONE for "base" and NONE, the default for None."""
        if name is None:
            return self.default
        if name in (BASE, NONE):
            return NONE
        if name not in self._adapters:
            listed = ", ".join([BASE, *self._adapters])
            raise InputError("adapter_unknown", f"adapter must be one of {listed}, got {shown(name)}")
        return name

    def fingerprint(self, name: str) -> str:
        """What tells an adapter from all others, whatever its name; "" for NONE."""
        return self._adapters[name].fingerprint if name else ""

    def of_vision(self, name: str) -> str:
        """The adapter whose images an adapter sees: itself where it changes the vision encoder, else NONE."""
        changes = name and any(weight.startswith(VISION) for weight in self._adapters[name].pairs)
        return name if changes else NONE

    def active(self, rows: Sequence[str]) -> ActiveAdapters | None:
        """The adapters of a pass, the name of each row's; None: no row has one."""
        if not any(rows):
            return None
        index = {name: i for i, name in enumerate(self._adapters, 1)} | {NONE: 0}
        first = index[rows[0]]
        if all(index[row] == first for row in rows):
            return ActiveAdapters(self._product, first)
        return ActiveAdapters(self._product, mx.array([index[row] for row in rows], mx.uint32))

    def _product(self, maps: Maps) -> LowRank | None:
        key = maps[0][0]
        if key not in self._products:
            low = stacked(maps, [{}, *(adapter.pairs for adapter in self._adapters.values())])
            self._products[key] = low and LowRank(low.a.astype(self.dtype), low.b.astype(self.dtype))
            mx.eval(self._products[key])
        return self._products[key]
