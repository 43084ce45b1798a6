"""How much memory a model may take, and what follows from it.

A limit is in bytes. It belongs to one loaded model; None is as much as suits the machine.
"""

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import spelled

MOST_GIGABYTES = 1e9  # what MLX is told must fit into 64 bits


def usable_bytes(limit: int | None) -> int:
    """Bytes that a model with this limit may take."""
    return backend().usable_memory() if limit is None else limit


def limit_of(gigabytes: float | None) -> int:
    """The limit that a user gives in GB (10^9 bytes), whatever the machine has, in bytes."""
    return usable_bytes(None if gigabytes is None else int(gigabytes * 1e9))


# Up to so much usable memory: the bytes that prefill may take. The buffers that MLX keeps for reuse take half as much.
# A Mac with 8 GB has 5.7e9 usable bytes, one with 16 GB 11.5e9.
_PREFILL = ((6e9, 80e6), (12e9, 200e6), (float("inf"), 400e6))


def prefill_room(limit: float) -> int:
    """Bytes that prefill may take beside weights and caches, where a model may take `limit`."""
    return int(next(room for most, room in _PREFILL if limit <= most))


def buffer_bytes(limit: float) -> int:
    """Bytes of freed buffers that MLX may keep."""
    return prefill_room(limit) // 2


def set_limits(limit: int) -> None:
    """Tell MLX how many freed buffers to keep, and from where on to wait before it allocates.

    MLX has one setting for the process, so each model that begins to compute sets its own. The wired limit is never
    raised: that has ended in kernel panics.
    """
    mx.set_cache_limit(buffer_bytes(limit))
    mx.set_memory_limit(limit)


def check_decoding_fits(name: str, width: int, height: int, needed: int, limit: int | None) -> None:
    """Refuse an image, or a video's frame, whose decoding takes `needed` bytes and has no room.

    The message gives the most pixels of an image like this one.
    """
    left = usable_bytes(limit) - mx.get_active_memory()
    if needed > left:
        most = max(0, left) * width * height // needed
        raise InputError(
            "media_too_large",
            f"of its kind, an image or a frame may have at most {most:,} pixels here, as much as memory has room for; "
            f"{name} has {width} x {height}, which take {needed / 1e9:.1f} GB to decode. Make it smaller, or raise "
            + spelled("memory_limit"),
        )


# Up to so much usable memory: the most pixels of an image, and of all frames of a video. A prompt's tokens, KV cache
# and time grow with pixels. With more memory the checkpoint's published limits hold (16.8 million, and 25.2 million
# for a video).
_PIXELS = ((6e9, 1 << 20, 6 << 20), (12e9, 4 << 20, 12 << 20))


def most_pixels(limit: int | None) -> tuple[float, float]:
    """The most pixels of an image, and of all frames of a video, that suit so much memory."""
    usable = usable_bytes(limit)
    return next(((image, video) for most, image, video in _PIXELS if usable <= most), (float("inf"), float("inf")))
