"""Tensors by name, in the form and dtype that each part of the model computes with."""

from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.checkpoint import float16
from mlx_qwen35.checkpoint.arrays import check_finite, is_read_at_once, lazy_arrays, read_array
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.names import HEAD, takes_dtype
from mlx_qwen35.kernels.low_rank import Maps
from mlx_qwen35.model.layers import Embedding, Joined, Linear, RMSNorm
from mlx_qwen35.quantization import Quantization

Progress = Callable[[int, int], None]  # called with the bytes read so far, and all bytes


@dataclass(frozen=True)
class Weights:
    """A view of a checkpoint's tensors under one prefix.

    arrays: Hugging Face name -> array, raw layout (conv1d [C, 1, K]) with gamma - 1 norms in float32 or narrower.
    quantization: name of a weight -> its quantization, or None.
    dtype: of activations; matrices, or the scales of quantized ones, are cast to it.
    eps: of the RMS norms; the vision encoder has none.
    keep_fp32: names of tensors beyond the range of `dtype`, which stay in float32.
    """

    arrays: dict[str, mx.array]
    quantization: Callable[[str], Quantization | None]
    dtype: mx.Dtype
    eps: float
    keep_fp32: Collection[str] = ()
    prefix: str = ""

    def at(self, prefix: str) -> "Weights":
        return replace(self, prefix=f"{self.prefix}{prefix}.")

    def float32(self, name: str) -> mx.array:
        return self.arrays[self.prefix + name].astype(mx.float32)

    def vector(self, name: str) -> mx.array:
        path = self.prefix + name
        return self.arrays[path].astype(mx.float32 if path in self.keep_fp32 else self.dtype)

    def norm(self, name: str) -> RMSNorm:
        """A zero-centred norm: gamma is 1 + w, in float32."""
        return RMSNorm(1.0 + self.float32(f"{name}.weight"), self.eps)

    def conv(self, name: str) -> mx.array:
        """[C, 1, K] -> (K, C) float32, taps in rows."""
        return mx.contiguous(self.float32(f"{name}.weight")[:, 0].T)

    def _matrix(self, name: str) -> tuple[dict[str, mx.array], Quantization | None]:
        """The tensors of a matrix by suffix (weight, scales, biases, bias), and its quantization."""
        path = f"{self.prefix}{name}."
        quantization = self.quantization(f"{path}weight")
        suffixes = [*quantization.parts((1, quantization.group_size))] if quantization else ["weight"]
        suffixes += ["bias"] * (f"{path}bias" in self.arrays)
        parts = {suffix: self.arrays[path + suffix] for suffix in suffixes}
        dtype = mx.float32 if any(path + suffix in self.keep_fp32 for suffix in suffixes) else self.dtype
        floating = {suffix: a.astype(dtype) for suffix, a in parts.items() if mx.issubdtype(a.dtype, mx.floating)}
        return parts | floating, quantization

    def linear(self, name: str) -> Linear:
        """A matrix, and its bias if it has one. A convolution over separate patches is a matrix too."""
        parts, quantization = self._matrix(name)
        return Linear(parts | {"weight": parts["weight"].flatten(1)}, quantization, self._maps(parts, name))

    def joined(self, *names: str) -> Joined:
        """Several matrices of the same width, joined where quantization and dtypes agree; on the CPU each by itself.

        There a product costs no launch, and operations on a part of a row are slower than on a whole row.
        """
        matrices = {name: self._matrix(name) for name in names}
        groups: dict[Hashable, list[str]] = {}
        for name, (parts, quantization) in matrices.items():
            alike = (quantization, *(array.dtype for array in parts.values())) if backend().joins_projections else name
            groups.setdefault(alike, []).append(name)
        products, slices = [], {}
        for i, group in enumerate(groups.values()):
            start = 0
            for name in group:
                stop = start + len(matrices[name][0]["weight"])
                slices[name], start = (i, slice(start, stop)), stop
            parts, quantization = matrices[group[0]]
            if len(group) > 1:
                parts = {suffix: mx.concatenate([matrices[name][0][suffix] for name in group]) for suffix in parts}
            maps = [self._maps(matrices[name][0], name) for name in group]
            products.append(Linear(parts, quantization, sum(maps, ())))
        return Joined(products, [slices[name] for name in names])

    def embedding(self, name: str) -> Embedding:
        parts, quantization = self._matrix(name)
        head = ((HEAD, len(parts["weight"])),)
        return Embedding(parts, quantization, self.dtype, self._maps(parts, name), head)

    def _maps(self, parts: dict[str, mx.array], name: str) -> Maps:
        return ((f"{self.prefix}{name}.weight", len(parts["weight"])),)


# --- from disk -------------------------------------------------------------------------------------------------------


def read_weights(
    checkpoint: Checkpoint, names: list[str], dtype: mx.Dtype, progress: Progress = lambda done, total: None
) -> Weights:
    """The tensors of these names, lazily read; parts of tensors are read here.

    Tensors beyond the range of float16 stay in float32, with a warning.
    """
    check_finite(checkpoint, names)
    keep_fp32: dict[str, str] = {}
    if dtype == mx.float16:
        stored = {name: checkpoint.entries[name].dtype for name in names if takes_dtype(name)}
        wide = [name for name in stored if stored[name] in ("BF16", "F32", "F64")]
        # Arrays of their own, freed after the check: the ones returned would stay in memory, all of them.
        keep_fp32 = float16.unfit(
            (name, lazy_arrays(checkpoint, [name])[name]) for name in _counted(checkpoint, wide, progress)
        )
        if keep_fp32:
            float16.tell(keep_fp32)
    parts = [name for name in names if is_read_at_once(checkpoint, name)]
    arrays = lazy_arrays(checkpoint, [name for name in names if name not in set(parts)])
    apart = {name.rpartition(".")[0] for name in keep_fp32}  # modules whose tensors are cast to float32 together
    for name in _counted(checkpoint, parts, progress):  # each is cast before the next is read
        cast = takes_dtype(name) and name.rpartition(".")[0] not in apart
        arrays[name] = read_array(checkpoint, name, dtype if cast else None)
    return Weights(arrays, checkpoint.quantization, dtype, checkpoint.config.text.rms_norm_eps, keep_fp32)


def _counted(checkpoint: Checkpoint, names: list[str], progress: Progress) -> Iterator[str]:
    """The names; calls progress after each with the bytes so far."""
    done, total = 0, sum(checkpoint.entries[name].nbytes for name in names)
    for name in names:
        yield name
        done += checkpoint.entries[name].nbytes
        progress(done, total)
