"""Whether this machine multiplies float32 matrices as float32.

Where a chip has units for matrices (M5 and later, NVIDIA), MLX rounds the operands of float32 products, packed ones and
attention included, to 10 bits of mantissa, as many as float16 has, unless the environment says MLX_ENABLE_TF32=0 when
it first meets one. Sums, elementwise operations and our kernels keep float32 whole; on an M5 so do products of one row.
"""

import warnings

import mlx.core as mx

from mlx_qwen35.backend import TF32

SIDE = 128  # of a matrix that is not too small for such units


def shortened() -> bool:
    """Whether operands are rounded, seen in a product that float32 holds. MLX keeps to its setting from then on."""
    whole = mx.full((SIDE, SIDE), 1 + 2.0**-12)
    return not mx.array_equal(whole @ mx.eye(SIDE), whole).item()


def warn_shortened_products() -> None:
    """Warn where float32 was asked for and products are not of it."""
    if shortened():
        warnings.warn(
            "float32 was chosen, but MLX multiplies float32 matrices on this machine with operands rounded to 10 bits "
            f"of mantissa, so answers have about three digits. Set {TF32}=0 in the environment before the program "
            "starts, as the commands do where nothing is set, or choose another dtype",
            RuntimeWarning,
            stacklevel=2,
        )
