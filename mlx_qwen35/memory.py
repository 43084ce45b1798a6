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


def check_tower_fits(tower_bytes: int) -> None:
    """Refuse to load the vision tower where it leaves no room beside the model, before anything is read."""
    limit, used = usable_bytes(), mx.get_active_memory()
    if used + tower_bytes + RESERVE > limit:
        raise InputError(
            f"the vision tower needs {tower_bytes / 1e9:.1f} GB; this machine has {limit / 1e9:.1f} GB for a model, of "
            f"which {used / 1e9:.1f} GB are in use. Choose a folder with fewer bits, or shorten the conversation"
        )


def check_encoding_fits(kind: str, size: str, working_bytes: int) -> None:
    """Refuse an image or a video (`kind`) whose encoding would not fit beside what is in memory."""
    limit, used = usable_bytes(), mx.get_active_memory()
    if used + working_bytes > limit:
        raise InputError(
            f"to be encoded, this {kind} ({size}) needs {working_bytes / 1e9:.1f} GB; the machine has "
            f"{limit / 1e9:.1f} GB for a model, of which {used / 1e9:.1f} GB are in use. Lower "
            + {"image": "max_pixels", "video": "video_total_pixels"}[kind]
        )


# Up to this much usable memory, an image gets at most so many pixels, and a clip so many in all its frames: what a
# prompt's tokens cost in KV cache and in time grows with them. A Mac with 8 GB has 5.7e9 usable bytes, one with 16 GB
# 11.5e9. With more memory the checkpoint's published limits hold (16.8 million, and 25.2 million for a clip).
_PIXELS = ((6e9, 1 << 20, 6 << 20), (12e9, 4 << 20, 12 << 20))


def machine_pixels() -> tuple[float, float]:
    """The most pixels of an image, and of all frames of a clip, that suit this machine's memory."""
    usable = usable_bytes()
    for limit, image, clip in _PIXELS:
        if usable <= limit:
            return image, clip
    return float("inf"), float("inf")
