"""MLX's products as chips with units for matrices make them: float32 operands are rounded to 10 bits of mantissa."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import mlx.core as mx

PRODUCTS = (
    "matmul", "addmm", "einsum", "inner", "tensordot", "quantized_matmul", "gather_mm", "gather_qmm", "block_masked_mm",
    "conv1d", "conv2d", "conv3d", "conv_general",
)  # fmt: skip


def rounded(x: Any) -> Any:
    """A float32 array with 10 bits of mantissa, to nearest, ties to even; anything else as it is."""
    if not isinstance(x, mx.array) or x.dtype != mx.float32:
        return x
    bits = x.view(mx.uint32)
    return (bits + 0xFFF + (bits >> 13 & 1) & 0xFFFFE000).view(mx.float32)


def _attention(real: Callable[..., mx.array], forced: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """MLX's attention, which has a kernel to be forced here."""

    def attention(*arrays: mx.array, force_fused: bool = False, **options: Any) -> mx.array:
        out = real(*map(rounded, arrays), **options)
        return forced(out) if force_fused else out

    return attention


@contextlib.contextmanager
def shortened_products(forced: Callable[..., mx.array] = rounded) -> Iterator[None]:
    """Within, all products and attention are of shortened operands. forced: what becomes of attention's answer in the
    kernel without scores, which adds up in another order."""

    def short(real: Callable[..., mx.array], whole: int = 0) -> Callable[..., mx.array]:
        return lambda *given, **options: real(*given[:whole], *map(rounded, given[whole:]), **options)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(mx.array, "__matmul__", short(mx.matmul)))
        for name in PRODUCTS:
            patches.enter_context(mock.patch.object(mx, name, short(getattr(mx, name), name == "addmm")))
        own = mx.fast.scaled_dot_product_attention
        patches.enter_context(mock.patch.object(mx.fast, "scaled_dot_product_attention", _attention(own, forced)))
        yield
