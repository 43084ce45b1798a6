"""A checkpoint's tensors as arrays in raw layout, whatever layout its files have."""

import mlx.core as mx

from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.tensors import open_arrays
from mlx_qwen35.errors import InputError


def lazy_arrays(checkpoint: Checkpoint, names: list[str]) -> dict[str, mx.array]:
    """Arrays read from disk when computed, in raw layout: conv1d [C, 1, K], norms gamma - 1."""
    own = [name for name in names if name not in checkpoint.replaced]
    arrays = open_arrays({name: checkpoint.fp32_original.get(name, checkpoint.entries[name]) for name in own})
    if not checkpoint.raw:
        arrays = {name: to_raw(name, array, checkpoint.is_folded(name)) for name, array in arrays.items()}
    return arrays | {name: array for name, array in checkpoint.replaced.items() if name in names}


def is_read_at_once(checkpoint: Checkpoint, name: str) -> bool:
    """Whether `lazy_arrays` reads this tensor when it is called: a part of one in a file, that is not empty."""
    entry = checkpoint.entries[name]
    return entry.partial and entry.nbytes > 0 and name not in checkpoint.replaced


def read_array(checkpoint: Checkpoint, name: str, dtype: mx.Dtype | None) -> mx.array:
    """A tensor in memory, in raw layout. dtype: of floating point numbers; None: as stored."""
    array = lazy_arrays(checkpoint, [name])[name]
    if dtype is not None and mx.issubdtype(array.dtype, mx.floating):
        array = array.astype(dtype)
    mx.eval(array)
    return array


def to_raw(name: str, array: mx.array, folded: bool) -> mx.array:
    """An array in MLX's layout -> in raw layout. The 1 is subtracted from folded norms in float32, which is exact."""
    if name.endswith("conv1d.weight"):
        return array.swapaxes(1, 2)
    if name.endswith("patch_embed.proj.weight"):
        return mx.moveaxis(array, -1, 1)
    return array.astype(mx.float32) - 1.0 if folded else array


def check_finite(checkpoint: Checkpoint, names: list[str]) -> None:
    """Refuse NaN and infinity in norms, scales and other small tensors. Matrices are not scanned."""
    ends = (".scales", ".biases", "conv1d.weight")
    names = [name for name in names if len(checkpoint.entries[name].shape) == 1 or name.endswith(ends)]
    small = {n: a for n, a in lazy_arrays(checkpoint, names).items() if mx.issubdtype(a.dtype, mx.floating)}
    counts = [(~mx.isfinite(a)).sum() for a in small.values()]
    mx.eval(counts)
    if bad := [f"{name} ({count.item()})" for name, count in zip(small, counts, strict=True) if count.item()]:
        raise InputError(
            "weights_not_finite",
            f"{checkpoint.folder}: scales and norms must be finite; NaN or infinity in {', '.join(bad[:8])}. "
            "The file is damaged or was converted wrongly; download or convert it again",
        )
