"""In how many layers of a model each Metal kernel runs, counted when it is loaded and shown by mlx_qwen35.doctor."""

import warnings
from typing import NamedTuple

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import add_norm, attention, fused_delta, norm_rotary
from mlx_qwen35.kernels.fused_delta import Heads
from mlx_qwen35.kernels.norm_rotary import Geometry
from mlx_qwen35.model.layers import Joined
from mlx_qwen35.model.model import Model


class EnabledLayers(NamedTuple):
    """Layers in which a kernel runs, of those that it is made for."""

    layers: int
    of: int

    def __str__(self) -> str:
        return f"{self.layers} of {self.of} layers"


def enabled_kernels(model: Model) -> dict[str, EnabledLayers]:
    """Kernel -> where it runs. On a GPU this has each run once against its reference; elsewhere none runs."""
    config, dtype, on = model.config, model.dtype, backend().fused_kernels
    heads, sizes = Heads(*config.delta_heads), Geometry(*config.attention_heads)
    fitting, attentions = _fitting(model), sum("self_attn" in layer for layer in model.layers)
    checks = {
        "gated_delta": on and fused_delta.self_check(heads, dtype),
        "norm_rotary": on and sizes.supported and norm_rotary.self_check(sizes, dtype),
    }
    found = {
        name: EnabledLayers(sum(fitting[name].values()) if self_check else 0, len(fitting[name]))
        for name, self_check in checks.items()
    }
    norms = on and add_norm.self_check(config.hidden_size, dtype)
    found["add_norm"] = EnabledLayers(len(model.layers) if norms else 0, len(model.layers))
    forced = on and attention.fused_self_check(config.head_dim, dtype)
    found["attention without scores"] = EnabledLayers(attentions if forced else 0, attentions)
    return found


def warn_unfit_layers(model: Model) -> None:
    """Where kernels run, warn of layers whose projections come in other products than a kernel reads."""
    if not backend().fused_kernels:
        return
    for name, layers in _fitting(model).items():
        if unfit := [i for i, fits in layers.items() if not fits]:
            listed = ", ".join(map(str, unfit[:8])) + (" ..." if len(unfit) > 8 else "")
            warnings.warn(
                f"the kernel {name} does not run in {len(unfit)} of {len(layers)} layers ({listed}): their sizes "
                "have no plan, or their projections are packed in different ways. MLX operations take its place, which "
                "is slower. Projections of a layer that are packed alike, b and a perhaps apart, are what it reads",
                RuntimeWarning,
                stacklevel=2,
            )


def _fitting(model: Model) -> dict[str, dict[int, bool]]:
    """Kernel -> layer -> whether the products of its projections are those that the kernel reads."""
    heads, sizes = Heads(*model.config.delta_heads), Geometry(*model.config.attention_heads)
    layers = dict(enumerate(model.layers))
    return {
        "gated_delta": {
            i: fused_delta.fits(_widths(layer.linear_attn.in_proj), heads)
            for i, layer in layers.items() if "linear_attn" in layer
        },
        "norm_rotary": {
            i: norm_rotary.fits(_widths(layer.self_attn.qkv_proj), sizes)
            for i, layer in layers.items() if "self_attn" in layer
        },
    }  # fmt: skip


def _widths(joined: Joined) -> list[int]:
    return [len(product.weight) for product in joined.products]
