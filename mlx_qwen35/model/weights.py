"""Tensors by name, handed to the parts of the model in the form that each computes with."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.checkpoint import float16
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.names import takes_dtype
from mlx_qwen35.checkpoint.tensors import open_arrays
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.layers import Embedding, Joined, Linear, RMSNorm
from mlx_qwen35.quantization import Quantization

Progress = Callable[[int, int], None]  # told what was read, of how much in all


class Weights:
    """A view of a checkpoint's tensors under one prefix.

    Args:
        arrays: Hugging Face name -> array, raw layout (conv1d [C, 1, K]) with gamma - 1 norms in float32 or narrower.
        packing: name of a weight -> how it is packed, None when it is not.
        dtype: of activations; matrices, or the scales of packed ones, are cast to it.
        eps: of the RMS norms; the vision tower has none.
        kept: names of tensors that stay in float32, for `dtype` cannot hold them.
    """

    def __init__(
        self,
        arrays: Mapping[str, mx.array],
        packing: Callable[[str], Quantization | None],
        dtype: mx.Dtype,
        eps: float,
        kept: Collection[str] = (),
        prefix: str = "",
    ):
        self.arrays, self.packing, self.dtype, self.eps, self.kept = arrays, packing, dtype, eps, kept
        self.prefix = prefix

    def at(self, prefix: str) -> "Weights":
        return Weights(self.arrays, self.packing, self.dtype, self.eps, self.kept, f"{self.prefix}{prefix}.")

    def float32(self, name: str) -> mx.array:
        return self.arrays[self.prefix + name].astype(mx.float32)

    def vector(self, name: str) -> mx.array:
        path = self.prefix + name
        return self.arrays[path].astype(mx.float32 if path in self.kept else self.dtype)

    def norm(self, name: str) -> RMSNorm:
        """A zero-centred norm: the one is added here, in float32."""
        return RMSNorm(1.0 + self.float32(f"{name}.weight"), self.eps)

    def conv(self, name: str) -> mx.array:
        """[C, 1, K] -> (K, C) float32, taps in rows."""
        return mx.contiguous(self.float32(f"{name}.weight")[:, 0].T)

    def _matrix(self, name: str) -> tuple[dict[str, mx.array], Quantization | None]:
        path = f"{self.prefix}{name}."
        packing = self.packing(f"{path}weight")
        suffixes = packing.parts((1, packing.group_size)) if packing else ("weight",)
        suffixes = (*suffixes, "bias") if f"{path}bias" in self.arrays else suffixes
        parts = {suffix: self.arrays[path + suffix] for suffix in suffixes}
        dtype = mx.float32 if any(path + suffix in self.kept for suffix in suffixes) else self.dtype
        return {k: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a for k, a in parts.items()}, packing

    def linear(self, name: str) -> Linear:
        """A matrix, its bias where there is one; a convolution over patches that do not overlap is a matrix too."""
        parts, packing = self._matrix(name)
        return Linear(parts | {"weight": parts["weight"].flatten(1)}, packing)

    def joined(self, *names: str) -> Joined:
        """Several matrices of the same width, in as few products as their packings allow; on the CPU each by itself.

        There a product costs no launch, and what follows is slower on a part of a row than on a row.
        """
        groups: dict[Any, list[dict[str, mx.array]]] = {}
        packings: dict[Any, Quantization | None] = {}
        places = []
        for name in names:
            parts, packing = self._matrix(name)
            alike = (packing, *(array.dtype for array in parts.values())) if backend().joins_projections else name
            group = groups.setdefault(alike, [])
            packings[alike] = packing
            start = sum(len(other["weight"]) for other in group)
            places.append((list(groups).index(alike), slice(start, start + len(parts["weight"]))))
            group.append(parts)
        products = [
            Linear({suffix: _stacked([parts[suffix] for parts in group]) for suffix in group[0]}, packing)
            for group, packing in zip(groups.values(), packings.values(), strict=True)
        ]
        return Joined(products, places)

    def embedding(self, name: str) -> Embedding:
        return Embedding(*self._matrix(name), self.dtype)


def _stacked(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)


# --- from disk -------------------------------------------------------------------------------------------------------


def read_weights(
    checkpoint: Checkpoint, names: list[str], dtype: mx.Dtype, progress: Progress = lambda done, total: None
) -> Weights:
    """The tensors of these names, still on disk, with those that float16 cannot hold marked to stay in float32."""
    _check_finite(checkpoint, names)
    kept: dict[str, str] = {}
    if dtype == mx.float16:
        wide = [name for name in names if checkpoint.entries[name].dtype in ("BF16", "F32", "F64")]
        # Each array is read, looked at and let go: with those that are computed with, all would stay.
        wide = [name for name in wide if takes_dtype(name)]
        kept = float16.unfit(
            (name, _lazy_arrays(checkpoint, [name])[name]) for name in _counted(checkpoint, wide, progress)
        )
        if kept:
            float16.tell(kept)
    arrays = _lazy_arrays(checkpoint, names)
    return Weights(arrays, checkpoint.quantization, dtype, checkpoint.config.text.rms_norm_eps, kept)


def _counted(checkpoint: Checkpoint, names: list[str], progress: Progress) -> Iterator[str]:
    """The names, with the bytes of those before told at each."""
    done, total = 0, sum(checkpoint.entries[name].nbytes for name in names)
    for name in names:
        yield name
        done += checkpoint.entries[name].nbytes
        progress(done, total)


def _lazy_arrays(checkpoint: Checkpoint, names: list[str]) -> dict[str, mx.array]:
    """Arrays that read themselves from disk when computed, in raw layout: conv1d [C, 1, K], norms gamma - 1."""
    arrays = open_arrays({name: checkpoint.fp32_original.get(name, checkpoint.entries[name]) for name in names})
    if checkpoint.raw:
        return arrays
    return {name: _to_raw(name, array, checkpoint.is_folded(name)) for name, array in arrays.items()}


def _to_raw(name: str, array: mx.array, folded: bool) -> mx.array:
    """Undo what an MLX program did: move the convolutions' axes back, take the one off in float32, which is exact."""
    if name.endswith("conv1d.weight"):
        return array.swapaxes(1, 2)
    if name.endswith("patch_embed.proj.weight"):
        return mx.moveaxis(array, -1, 1)
    return array.astype(mx.float32) - 1.0 if folded else array


def _check_finite(checkpoint: Checkpoint, names: list[str]) -> None:
    """Norms, scales and the other small tensors: a damaged one spoils every answer. Matrices are not scanned."""
    ends = (".scales", ".biases", "conv1d.weight")
    names = [name for name in names if len(checkpoint.entries[name].shape) == 1 or name.endswith(ends)]
    small = {n: a for n, a in _lazy_arrays(checkpoint, names).items() if mx.issubdtype(a.dtype, mx.floating)}
    counts = [(~mx.isfinite(a)).sum() for a in small.values()]
    mx.eval(counts)
    if bad := [f"{name} ({count.item()})" for name, count in zip(small, counts, strict=True) if count.item()]:
        raise InputError(
            "weights_not_finite",
            f"{checkpoint.folder}: scales and norms must be finite; NaN or infinity in {', '.join(bad[:8])}. "
            "The file is damaged or was converted wrongly; download or convert it again",
        )
