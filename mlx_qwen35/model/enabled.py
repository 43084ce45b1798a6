"""The layers of a model in which each Metal kernel runs, found at load and shown by mlx_qwen35.doctor."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import add_norm, attention, fused_delta, norm_rotary, packed_attention
from mlx_qwen35.kernels.fused_delta import Heads
from mlx_qwen35.kernels.norm_rotary import Geometry
from mlx_qwen35.model.layers import Joined
from mlx_qwen35.model.model import Model


class EnabledLayers(NamedTuple):
    """In how many layers a kernel runs, and how many it is made for."""

    layers: int
    of: int

    def __str__(self) -> str:
        return f"{self.layers} of {self.of} layers"


class _Kernel(NamedTuple):
    self_check: Callable[[], bool]
    fits: dict[int, bool]  # layer that it is made for -> whether it takes the products of the layer's projections


def enabled_kernels(model: Model) -> dict[str, EnabledLayers]:
    """Kernel -> the layers in which it runs. On a GPU each kernel is checked, once a process; elsewhere none runs."""
    found = {}
    for name, kernel in _kernels(model).items():
        runs = backend().fused_kernels and any(kernel.fits.values()) and kernel.self_check()
        found[name] = EnabledLayers(sum(kernel.fits.values()) if runs else 0, len(kernel.fits))
    return found


def warn_unfit_layers(model: Model) -> None:
    """Where kernels run, warn of layers whose projections come in other products than a kernel takes."""
    if not backend().fused_kernels:
        return
    for name, (_, fits) in _kernels(model).items():
        if unfit := [i for i, fit in fits.items() if not fit]:
            listed = ", ".join(map(str, unfit[:8])) + (" ..." if len(unfit) > 8 else "")
            warnings.warn(
                f"the kernel {name} does not run in {len(unfit)} of {len(fits)} layers ({listed}): it does not support "
                "their sizes, or their projections are quantized in different ways. MLX operations take its place, "
                "which is slower. It takes projections of a layer that are quantized alike, b and a perhaps apart",
                RuntimeWarning,
                stacklevel=2,
            )


def _kernels(model: Model) -> dict[str, _Kernel]:
    config, dtype, layers = model.held, model.dtype, dict(enumerate(model.layers))
    heads, sizes = Heads(*config.delta_heads), Geometry(*config.attention_heads)
    delta = {i: layer.linear_attn.in_proj for i, layer in layers.items() if "linear_attn" in layer}
    full = {i: layer.self_attn.qkv_proj for i, layer in layers.items() if "self_attn" in layer}
    kernels = {
        "gated_delta": _Kernel(
            partial(fused_delta.self_check, heads, dtype),
            {i: fused_delta.fits(_widths(joined), heads) for i, joined in delta.items()},
        ),
        "norm_rotary": _Kernel(
            partial(norm_rotary.self_check, sizes, dtype),
            {i: norm_rotary.fits(_widths(joined), sizes) for i, joined in full.items()},
        ),
        "add_norm": _Kernel(partial(add_norm.self_check, config.hidden_size, dtype), dict.fromkeys(layers, True)),
        "attention without scores": _Kernel(
            partial(attention.fused_self_check, config.head_dim, dtype), dict.fromkeys(full, True)
        ),
    }
    if model.kv.quantized:
        rows = config.num_attention_heads // config.num_key_value_heads
        packed = packed_attention.Geometry(rows, config.head_dim, model.kv.key_bits, model.kv.value_bits)
        check = partial(packed_attention.self_check, packed, dtype)
        kernels["packed_attention"] = _Kernel(check, dict.fromkeys(full, packed.supported))
    return kernels


def _widths(joined: Joined) -> list[int]:
    return [len(product.weight) for product in joined.products]
