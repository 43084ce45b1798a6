"""The weights of a layer with an adapter fused into them: the model that a conversion with an adapter starts from."""

from collections.abc import Callable
from dataclasses import asdict, replace

import mlx.core as mx

from mlx_qwen35.checkpoint import float16
from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.arrays import to_raw
from mlx_qwen35.checkpoint.fusing import fuse
from mlx_qwen35.checkpoint.names import is_zero_centred, takes_dtype
from mlx_qwen35.checkpoint.tensors import Entry
from mlx_qwen35.model.weights import Weights
from mlx_qwen35.quantization import Quantization


def adapted(
    weights: Weights, adapter: Adapter, read: Callable[[Entry], mx.array], rows: mx.array | slice = slice(None)
) -> Weights:
    """The same weights, those that the adapter changes not quantized, and in float32 where it has a low-rank part.

    rows: which rows of the whole tensors these are, along the first axis. read: reads them of a stored tensor.
    """
    arrays = dict(weights.arrays)
    changed = {name for part in (adapter.stored, adapter.pairs) for name in part if name in arrays}
    for name in changed:
        arrays[name] = _unpacked(arrays, name, weights.quantization(name))
        if name in adapter.stored:
            whole = read(adapter.stored[name])
            arrays[name] = whole if adapter.format == "peft" else to_raw(name, whole, is_zero_centred(name))
        if name in adapter.pairs:
            arrays[name] = fuse(adapter, name, arrays[name], rows)
    kept = dict.fromkeys(weights.keep_fp32, "")
    if weights.dtype == mx.float16:
        kept |= float16.unfit((name, arrays[name]) for name in changed if takes_dtype(name))

    def quantization_of(name: str) -> Quantization | None:
        return None if name in changed else weights.quantization(name)

    return replace(weights, arrays=arrays, quantization=quantization_of, keep_fp32=kept)


def _unpacked(arrays: dict[str, mx.array], name: str, quantization: Quantization | None) -> mx.array:
    """The values of a tensor; its scales and biases are taken out of the arrays."""
    if quantization is None:
        return arrays[name]
    stem, biases = name.removesuffix("weight"), None
    scales = arrays.pop(f"{stem}scales")
    if quantization.mode == "affine":
        biases = arrays.pop(f"{stem}biases")
    return mx.dequantize(arrays[name], scales, biases, **asdict(quantization), dtype=mx.float32)
