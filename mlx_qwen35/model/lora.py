"""The loaded adapters of a model, and their low-rank parts beside its products.

An adapter is an argument of a forward pass and no state of the model: `ActiveAdapters` says which adapter each row of a
pass has. A product of several maps (`Joined`) gets one low-rank part, A of its maps stacked and B block by block, so
that nothing is taken apart.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.checkpoint.adapter import Adapter, Pair
from mlx_qwen35.checkpoint.adapter_choice import BASE, NONE, check_beside, check_name, not_beside
from mlx_qwen35.checkpoint.names import MTP, VISION
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.low_rank import ActiveAdapters, LowRank, Maps
from mlx_qwen35.model.layers import Linear
from mlx_qwen35.values import shown

Part = TypeVar("Part", bound=nn.Module)
_MIXTURES = 64  # of adapters in a batch, whose places are kept


def stacked(maps: Maps, adapters: Mapping[int, Mapping[str, Pair]], before: LowRank | None = None) -> LowRank | None:
    """The low-rank parts of a product: those before, and behind them the pairs of more adapters.

    adapters: index of an adapter among all -> its pairs, by the weight's name. None: there is no part.
    """
    parts: dict[int, tuple[mx.array, mx.array]] = {}
    if before is not None:
        parts = {owner: (before.a[at], before.b[at]) for at, owner in enumerate(before.owners)}
    parts |= {i: _of_one(maps, pairs) for i, pairs in adapters.items() if any(name in pairs for name, _ in maps)}
    if not parts:
        return None
    rank = max(len(a) for a, _ in parts.values())
    own = [(_padded(a, 0, rank), _padded(b, 1, rank)) for a, b in parts.values()]
    return LowRank(mx.stack([a for a, _ in own]), mx.stack([b for _, b in own]), tuple(parts))


def _padded(array: mx.array, axis: int, size: int) -> mx.array:
    """Zeros behind an array, up to a size."""
    short = size - array.shape[axis]
    return mx.pad(array, [(0, short if i == axis else 0) for i in range(array.ndim)]) if short else array


def _of_one(maps: Maps, pairs: Mapping[str, Pair]) -> tuple[mx.array, mx.array]:
    """One adapter's A (R, in) and B (out, R) for a product, the scale inside B."""
    there = [pairs[name] for name, _ in maps if name in pairs]
    rank, at, blocks = sum(len(pair.a) for pair in there), 0, []
    for name, rows in maps:
        pair = pairs.get(name)
        if pair is None:
            blocks.append(mx.zeros((rows, rank), there[0].b.dtype))
            continue
        own = len(pair.a)
        blocks.append(mx.pad(pair.b * pair.scale, [(0, 0), (at, rank - at - own)]))
        at += own
    return mx.concatenate([pair.a for pair in there]), mx.concatenate(blocks)


@dataclass(frozen=True)
class LoadedAdapter:
    """What is known of an adapter whose tensors are in a model.

    format: as `Adapter.format`. fingerprint: tells it from all others, whatever its name. rank: the highest of its
    parts. whole: whether tensors of it stand in the place of the checkpoint's. sees: whether it changes the vision
    encoder. drafts: whether it changes the draft head.
    """

    name: str
    path: Path
    format: str
    fingerprint: str
    rank: int
    whole: bool
    sees: bool
    drafts: bool


class AdapterSet:
    """The loaded adapters of a model, by name, with their low-rank parts.

    A part is stacked when the layers are there that it stands beside; what was read is then let go.
    """

    def __init__(self, dtype: mx.Dtype):
        """dtype: in which they are held, that of activations."""
        self.dtype = dtype
        self.default = NONE  # the adapter of a request that names none
        self._loaded: dict[str, LoadedAdapter] = {}
        self._unstacked: dict[str, dict[int, Pair]] = {}  # by the weight's name, then by the adapter's index
        self._products: dict[str, LowRank] = {}  # by the name of a product's first map
        self._active: dict[tuple[str, ...], ActiveAdapters | None] = {}

    @property
    def names(self) -> list[str]:
        """The names of the loaded adapters, in the order in which they were loaded."""
        return list(self._loaded)

    def __bool__(self) -> bool:
        return bool(self._loaded)

    def __getitem__(self, name: str) -> LoadedAdapter:
        return self._loaded[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all low-rank parts."""
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> list[mx.array]:
        """Every array that is held."""
        pairs = [pair for own in self._unstacked.values() for pair in own.values()]
        return [array for low in (*self._products.values(), *pairs) for array in low[:2]]

    # --- loading ---

    def add(self, name: str, adapter: Adapter, whole: Collection[str] = ()) -> None:
        """Hold one more, which was checked against the checkpoint.

        whole: names of its tensors that the model was built with, as `load` does for one adapter alone.

        Raises InputError: option_invalid for a name that is taken, adapter_unsupported for what cannot stand beside the
        weights.
        """
        check_name(name)
        if name in self._loaded:
            raise InputError("option_invalid", f"each adapter needs a name of its own; two are called {name}")
        if fixed := self._fixed:
            raise not_beside(fixed.name, fixed.path, "whole tensors, which leave no room for another adapter")
        check_beside(name, adapter, alone=False)
        index, changed = len(self._loaded), {*adapter.pairs, *whole}
        for weight, pair in adapter.pairs.items():
            held = Pair(pair.a.astype(self.dtype), (pair.b * pair.scale).astype(self.dtype), 1.0)
            self._unstacked.setdefault(weight, {})[index] = held
        self._loaded[name] = LoadedAdapter(
            name, adapter.path, adapter.format, adapter.fingerprint,
            max((len(pair.a) for pair in adapter.pairs.values()), default=0), bool(whole),
            any(weight.startswith(VISION) for weight in changed), any(weight.startswith(MTP) for weight in changed),
        )  # fmt: skip
        self._active.clear()
        mx.eval(self.arrays())  # so that any thread may compute with them, and what was read is let go

    def stack(self, part: Part) -> Part:
        """Stack the low-rank parts beside the products of a part of the model that is loaded now. Returns the part."""
        for _, layer in part.named_modules() if self._unstacked else ():
            if isinstance(layer, Linear):
                for maps in layer.beside:
                    self._product(maps)
        return part

    def _product(self, maps: Maps) -> LowRank | None:
        key = maps[0][0]
        if self._unstacked:
            new: dict[int, dict[str, Pair]] = {}
            for name, _ in maps:
                for index, pair in self._unstacked.pop(name, {}).items():
                    new.setdefault(index, {})[name] = pair
            if new:
                low = stacked(maps, new, self._products.get(key))
                assert low is not None
                mx.eval(low)
                self._products[key] = low
        return self._products.get(key)

    # --- use ---

    @property
    def _fixed(self) -> LoadedAdapter | None:
        """The adapter whose whole tensors stand in the model, so that it cannot do without."""
        return next((own for own in self._loaded.values() if own.whole), None)

    def named(self, name: str | None) -> str:
        """The adapter that a request names, as caches note it: NONE for "base" and NONE, the default for None.

        Raises InputError: adapter_unknown, adapter_unsupported.
        """
        if name is None:
            return self.default
        if name in (BASE, NONE):
            if fixed := self._fixed:
                raise InputError(
                    "adapter_unsupported",
                    f"the model cannot answer without the adapter {fixed.name}: its whole tensors were loaded in "
                    "the place of the checkpoint's. Load the model once more without it",
                )
            return NONE
        if name not in self._loaded:
            listed = ", ".join([BASE, *self._loaded])
            raise InputError("adapter_unknown", f"adapter must be one of {listed}, got {shown(name)}")
        return name

    def fingerprint(self, name: str) -> str:
        """What tells an adapter from all others, whatever its name; "" for NONE."""
        return self._loaded[name].fingerprint if name else ""

    def of_vision(self, name: str) -> str:
        """The adapter whose images an adapter sees: itself where it changes the vision encoder, else NONE."""
        return name if name and self._loaded[name].sees else NONE

    def active(self, rows: Sequence[str]) -> ActiveAdapters | None:
        """The adapters of a pass, the name of each row's; None: no row has one. InputError for one not loaded."""
        if not any(rows):
            return None
        key = tuple(rows)
        if key not in self._active:
            index = {name: i for i, name in enumerate(self._loaded)} | {NONE: -1}
            if unknown := [name for name in key if name not in index]:
                self.named(unknown[0])
            found = [index[name] for name in key]
            if len(self._active) >= _MIXTURES:
                self._active.clear()
            self._active[key] = ActiveAdapters(self._product, found[0] if len(set(found)) == 1 else found)
        return self._active[key]
