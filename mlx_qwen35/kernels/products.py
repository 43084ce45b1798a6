"""Whether this machine multiplies float32 matrices in full float32.

On chips with matrix units (M5 and later, NVIDIA) MLX rounds the operands of float32 products, quantized ones and
attention included, to 10 bits of mantissa, as in float16. MLX_ENABLE_TF32=0 turns that off; MLX reads it at the first
such product. Sums, elementwise operations and our kernels compute in full float32. On an M5 so do products of one row.
"""

import warnings

import mlx.core as mx

from mlx_qwen35.backend import TF32

SIDE = 128  # of a matrix large enough for matrix units


def shortened() -> bool:
    """Whether operands are rounded, by a product that is exact in float32. It fixes MLX's setting for the process."""
    whole = mx.full((SIDE, SIDE), 1 + 2.0**-12)
    return not mx.array_equal(whole @ mx.eye(SIDE), whole).item()


def warn_shortened_products() -> None:
    """Warn if the operands of float32 products are rounded. For a model whose dtype is float32."""
    if shortened():
        warnings.warn(
            "float32 was chosen, but MLX multiplies float32 matrices on this machine with operands rounded to 10 bits "
            f"of mantissa, so answers have about three digits. Set {TF32}=0 in the environment before the program "
            "starts, as the commands do where nothing is set, or choose another dtype",
            RuntimeWarning,
            stacklevel=2,
        )
