"""FP8 weights as Qwen publishes them: codes of 8 bits, and a factor for each block of them."""

from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.dtypes import STORED
from mlx_qwen35.errors import InputError
from mlx_qwen35.values import is_whole, shown

_BLOCK = (128, 128)  # weights that share a factor, unless config.json says otherwise


def e4m3() -> np.ndarray:
    """(256,) float32: the value of every FP8 code of sign, 4 bits of exponent, 3 of mantissa. The last one is NaN."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.ldexp(mantissa + 8.0 * (exponent > 0), np.maximum(exponent, 1) - 10)
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


_E4M3 = e4m3()


def block_of(folder: Path, claim: Any, checkpoint: Checkpoint) -> tuple[int, int]:
    """Rows and columns of a block, once config.json and the shapes of the factors agree.

    claim: what config.json says of the quantization.
    """
    if not isinstance(claim, dict) or claim.get("quant_method") != "fp8":
        raise InputError(
            "quantization_unsupported",
            f"FP8 weights need a quantization_config of quant_method 'fp8'; that of {folder} is {brief(claim)}",
        )
    size = claim.get("weight_block_size", _BLOCK)
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(is_whole(n) and n > 0 for n in size)):
        raise InputError(
            "config_field_invalid",
            f"config.json of {folder}: weight_block_size must be [rows, columns], got {shown(size)}",
        )
    for name, scales in checkpoint.block_scales.items():
        weight = checkpoint.entries.get(name)
        shape = tuple(-(-n // block) for n, block in zip(weight.shape, size, strict=False)) if weight else None
        fits = weight is not None and (len(weight.shape), weight.dtype) == (2, "F8_E4M3")
        if not fits or scales.shape != shape or scales.dtype not in STORED.values():
            raise InputError(
                "tensors_mismatch",
                f"factors of FP8 blocks must be one for each {size[0]} x {size[1]} of an F8_E4M3 matrix; "
                f"{scales.stored_name} is {list(scales.shape)} {scales.dtype} and its weight is "
                f"{f'{weight.dtype} {list(weight.shape)}' if weight else 'absent'}. Download the source again",
            )
    return tuple(size)


def brief(claim: Any) -> str:
    """What config.json says of the quantization, without lists and without what it says of single layers."""
    if isinstance(claim, dict):
        claim = {key: value for key, value in claim.items() if not isinstance(value, dict | list)}
    return shown(claim)


def decode(codes: np.ndarray, factors: np.ndarray, block: tuple[int, int], start: int) -> np.ndarray:
    """(rows, columns) float32: the values of rows from `start` on.

    codes: (rows, columns) uint8. factors: float32, of the blocks that these rows lie in, (blocks down, blocks across).
    """
    high, wide = block
    values = _E4M3[codes]
    rows = np.repeat(factors[np.arange(start, start + len(codes)) // high - start // high], wide, axis=1)
    values *= rows[:, : values.shape[1]]
    return values
