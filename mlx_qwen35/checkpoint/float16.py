"""Weights in float16: the tensors that it cannot hold are named and stay float32.

float16 has more digits than bfloat16 and a smaller range: infinity above 65,504, fewer and fewer digits below 6.1e-5,
zero below 3e-8. M1 and M2 compute in it natively and not in bfloat16.
"""

import math
import warnings
from collections.abc import Iterable, Mapping

import mlx.core as mx
import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.options import spelled

LARGEST = 65504.0
# Rounding to float16 is at most 2**-25 off below its normal range, rounding to bfloat16 at most 2**-9 of the value.
# Where the largest number of a row is smaller than this, float16 holds it with fewer digits than bfloat16 does.
SMALLEST = 2.0**-16


def unfit(arrays: Iterable[tuple[str, mx.array]]) -> dict[str, str]:
    """Name -> the reason, for each floating point array that float16 cannot hold.

    A row of a matrix (one output; one row of scales) vanishes when its largest magnitude is not 0 and below SMALLEST.
    Small numbers beside larger ones do not matter. A vector is one row.
    """
    found = {}
    for name, array in arrays:
        if not array.size:  # the table of a machine that has no row of it
            continue
        high, low = array.max(-1), array.min(-1)
        largest = mx.maximum(high, -low).astype(mx.float32)
        top = float(np.asarray(largest.max()))
        vanishing = int(np.asarray(((largest > 0) & (largest < SMALLEST)).sum()))
        if not math.isfinite(top):
            raise InputError("weights_not_finite", f"{name} holds NaN or infinity: download or convert it again")
        if why := reason(top, vanishing, largest.size):
            found[name] = why
    return found


def reason(largest: float, vanishing: int, rows: int) -> str | None:
    """Why float16 cannot hold a tensor of this largest magnitude and these vanishing rows; None where it can."""
    if largest > LARGEST:
        return f"holds {largest:.3g}"
    return f"{vanishing} of {rows} rows are below {SMALLEST:.1e}" if vanishing else None


def listed(found: Mapping[str, str], most: int = 8) -> str:
    """The first tensors by name, each with its reason, and the number of the others."""
    named = "; ".join(f"{name} ({why})" for name, why in list(found.items())[:most])
    return named + (f"; and {len(found) - most} more" if len(found) > most else "")


def tell(found: Mapping[str, str]) -> None:
    """Warn of the tensors that stay in float32."""
    warnings.warn(
        f"{len(found)} tensor{'s'[: len(found) > 1]} kept in float32, for float16 cannot hold them: {listed(found)}. "
        f"With {spelled('dtype', 'bfloat16')} nothing is kept apart",
        RuntimeWarning,
        stacklevel=2,
    )
