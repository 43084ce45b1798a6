"""A video however it is given (file, URL, frames in a folder, list or array) -> sampled, resized frames, and times."""

import os
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.container import VideoFile, upright_rgb
from mlx_qwen35.media.fetch import fetch_file, is_remote, name_of
from mlx_qwen35.media.frames import Fit, FrameSampling, Timeline, Video, collect, frame_rate, too_short
from mlx_qwen35.media.image import read_image
from mlx_qwen35.options import spelled


def read_video(
    source: Any,
    sampling: FrameSampling,
    fit: Fit,
    *,
    source_fps: float | None = None,
    allow_private_urls: bool = False,
    memory_limit: int | None = None,
) -> Video:
    """Read the frames that `sampling` asks for, resized one by one, so that memory holds one source frame at a time.

    Args:
        source: a file (mp4, mov, webm, mkv, gif) as path, http(s) URL, data: URI or bytes; a folder of images, in
            the natural order of their names; a list or tuple of frames, each anything that read_image takes; an
            (n, H, W, 3) uint8 RGB array.
        sampling: which frames are used.
        fit: (number of sampled frames, height, width) -> (height, width) to resize to. Called once, with the upright
            size of the source.
        source_fps: frames a second of a folder, a list or an array. A file knows its own.
        allow_private_urls: whether a URL may lead to this machine or into its network, see `fetch`.
        memory_limit: see read_image.

    Raises InputError if the source is no video, is damaged anywhere, does not suit source_fps, or its frames do not fit
    into memory.
    """

    def read_frames(frames: Sequence[Any] | np.ndarray, name: str) -> Video:
        images = (
            _check_array(frames)
            if isinstance(frames, np.ndarray)
            else _images(frames, name, allow_private_urls, memory_limit)
        )
        return _read_frames(images, len(frames), name, source_fps, sampling, fit)

    def read_file(name: str, file: BinaryIO) -> Video:
        return _read_file(VideoFile(name, file, memory_limit), source_fps, sampling, fit)

    if isinstance(source, (np.ndarray, list, tuple)):
        return read_frames(source, "an array" if isinstance(source, np.ndarray) else "a list of frames")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return read_file("the video", BytesIO(source))
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            "media_source_invalid",
            "a video must be a path, a URL, bytes, a folder, a list of frames or an (n, H, W, 3) uint8 array, "
            f"got {type(source).__name__}",
        )
    name = name_of(os.fspath(source))
    if isinstance(source, str) and is_remote(source):
        with fetch_file(source, "video", allow_private_urls) as file:
            return read_file(name, file)
    path = Path(os.path.expanduser(source))
    try:
        if os.path.isdir(path):
            return read_frames(_files(path), f"the folder {name}")
        if os.path.isfile(path):
            with path.open("rb") as file:
                return read_file(name, file)
    except OSError as error:
        raise InputError(
            "media_unreadable", f"{name} must be readable: {error.strerror}. Look at its rights"
        ) from error
    raise InputError("media_not_found", f"a video must be a file, a folder or a URL; {name} is none. Look at the path")


def _read_file(file: VideoFile, source_fps: float | None, sampling: FrameSampling, fit: Fit) -> Video:
    if source_fps is not None:
        raise InputError(
            "option_no_effect",
            f"{spelled('source_fps')} ({source_fps!r}) must not be given: {file.name} has its own rate",
        )
    timeline = file.timeline()
    # The last frame is always picked, so the file is read to its end, and every frame in it is checked.
    frames = file.frames(timeline.total)
    video, count = collect(frames, timeline, sampling, fit, upright_rgb, lambda frame: (frame.height, frame.width))
    if count != timeline.total:
        raise file.broken(count, timeline.total, "the rest cannot be decoded")
    return video


def _read_frames(
    images: Iterator[np.ndarray] | np.ndarray,
    total: int,
    name: str,
    source_fps: float | None,
    sampling: FrameSampling,
    fit: Fit,
) -> Video:
    if not total:
        raise too_short(name, 0)
    if source_fps is None:
        raise InputError(
            "option_missing", f"{spelled('source_fps')} must be given: how many frames of {name} are in a second"
        )
    timeline = Timeline(total, frame_rate(spelled("source_fps"), source_fps), None)
    # Every frame is read, so that a broken one, or one of another size, is noticed whatever the sampling.
    video, _ = collect(images, timeline, sampling, fit, lambda image: image, lambda image: image.shape[:2])
    return video


def _images(
    frames: Sequence[Any], name: str, allow_private_urls: bool, memory_limit: int | None
) -> Iterator[np.ndarray]:
    for number, frame in enumerate(frames, start=1):
        try:
            yield read_image(frame, allow_private_urls=allow_private_urls, memory_limit=memory_limit)
        except InputError as error:
            raise InputError(
                error.code, f"frame {number} of {len(frames)} in {name} cannot be read: {error}"
            ) from error


def _check_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape[1:]:
        raise InputError(
            "array_invalid",
            f"a video array must be (n, height, width, 3) uint8, RGB; got {array.shape} {array.dtype}. "
            "Values from 0 to 1 must be multiplied by 255 and rounded",
        )
    return array


def _files(folder: Path) -> list[Path]:
    """The files of a folder, hidden ones left out, frame2 before frame10."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=_natural)


def _natural(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", path.name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name
