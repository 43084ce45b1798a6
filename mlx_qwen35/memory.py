"""How much memory this machine has for a model."""

import os

import mlx.core as mx

from mlx_qwen35.errors import InputError

RESERVE = 0.4e9  # bytes for activations, a short context and MLX's own buffers


def usable_bytes() -> int:
    """What a model may take: on a Mac the GPU's recommended working set, elsewhere the machine's memory."""
    if mx.metal.is_available():
        return int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_fits(name: str, weight_bytes: int, convertible: bool) -> None:
    """Refuse a model whose weights leave no room on this machine, before anything is read.

    convertible: whether our converter can make it smaller, which is then the advice.
    """
    limit = usable_bytes()
    if weight_bytes + RESERVE <= limit:
        return
    if not convertible:
        raise InputError(
            f"{name} needs {weight_bytes / 1e9:.1f} GB for its text weights, this machine has {limit / 1e9:.1f} GB for "
            "a model. Choose a folder with fewer bits, or a smaller model of the family"
        )
    raise InputError(
        f"{name} needs {weight_bytes / 1e9:.1f} GB for its text weights, this machine has {limit / 1e9:.1f} GB for "
        f"a model. Convert it to 4 bit, about 3.5 times smaller:\n"
        f"  mlx_qwen35.convert --hf-path {name} --mlx-path {name.rstrip('/').split('/')[-1]}-4bit -q --q-bits 4"
    )
