"""The dtypes that models compute in: their names in options, in MLX and in safetensors files."""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.values import choice

# Name -> the dtype, its name in a safetensors file, other names that are accepted.
_TABLE = {
    "float32": (mx.float32, "F32", ("fp32", "f32")),
    "float16": (mx.float16, "F16", ("fp16", "f16", "half")),
    "bfloat16": (mx.bfloat16, "BF16", ("bf16",)),
}
DTYPES = {name: dtype for name, (dtype, _, _) in _TABLE.items()}
STORED = {name: stored for name, (_, stored, _) in _TABLE.items()}
COMPUTED = {"F64": mx.float32, **{STORED[name]: DTYPES[name] for name in _TABLE}}  # by its name in a file
_ALIASES = {alias: name for name, (_, _, aliases) in _TABLE.items() for alias in aliases}


def check_dtype(name: str, value: Any) -> str:
    """The name of a dtype that is given by a name, or as MLX or numpy has it.

    InputError, which calls the option `name`, for any other value.
    """
    if isinstance(value, mx.Dtype):
        value = dtype_name(value)
    elif isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        value = np.dtype(value).name
    return choice(name, _ALIASES.get(value, value) if isinstance(value, str) else value, DTYPES)


def dtype_name(dtype: mx.Dtype) -> str:
    """The name of any dtype of MLX, as "float32"."""
    return str(dtype).removeprefix("mlx.core.")
