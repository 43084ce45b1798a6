"""A video however it is given (file, URL, frames in a folder, list or array) -> sampled, resized frames, and times."""

import os
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.container import VideoFile
from mlx_qwen35.media.fetch import fetch_file, is_remote, name_of
from mlx_qwen35.media.frames import Clip, Fit, FrameSampling, Timeline, collect, frame_rate, resize
from mlx_qwen35.media.image import read_image
from mlx_qwen35.media.video_frame import stored_size, upright_rgb
from mlx_qwen35.options import spelled

__all__ = ["Clip", "FrameSampling", "read_video", "resize"]


def read_video(
    source: Any, sampling: FrameSampling, fit: Fit, *, source_fps: float | None = None, allow_private_urls: bool = False
) -> Clip:
    """Read the frames that `sampling` asks for, resized one by one, so that memory holds one source frame at a time.

    Args:
        source: a file (mp4, mov, webm, mkv, gif) as path, http(s) URL, data: URI or bytes; a folder of pictures, in
            the natural order of their names; a list or tuple of frames, each anything that read_image takes; an
            (n, H, W, 3) uint8 RGB array.
        sampling: which frames are used.
        fit: (number of sampled frames, height, width) -> (height, width) to resize to. Called once, with the upright
            size of the source.
        source_fps: frames a second of a folder, a list or an array. A file knows its own.
        allow_private_urls: whether a URL may lead to this machine or into its network, see `fetch`.

    Raises InputError where the source is no video, is damaged anywhere, or does not suit source_fps.
    """
    if isinstance(source, np.ndarray):
        frames = _check_array(source)
        return _read_frames("an array", iter(frames), len(frames), sampling, fit, source_fps)
    if isinstance(source, (list, tuple)):
        name = "a list of frames"
        pictures = _read_pictures(name, source, allow_private_urls)
        return _read_frames(name, pictures, len(source), sampling, fit, source_fps)
    if isinstance(source, (str, os.PathLike)) and not is_remote(str(source)):
        return _read_path(source, sampling, fit, source_fps)
    if isinstance(source, str):
        with fetch_file(source, "video", allow_private_urls) as file:
            return _read_file(VideoFile(name_of(source), file), sampling, fit, source_fps)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_file(VideoFile("the video", BytesIO(source)), sampling, fit, source_fps)
    raise InputError(
        "media_source_invalid",
        "a video must be a path, a URL, bytes, a folder, a list of frames or an (n, H, W, 3) uint8 array, "
        f"got {type(source).__name__}",
    )


def _read_path(source: str | os.PathLike, sampling: FrameSampling, fit: Fit, source_fps: float | None) -> Clip:
    path, name = os.path.expanduser(source), name_of(os.fspath(source))
    if os.path.isdir(path):
        pictures, name = _pictures(Path(path), name), f"the folder {name}"
        return _read_frames(name, _read_pictures(name, pictures), len(pictures), sampling, fit, source_fps)
    if not os.path.isfile(path):
        raise InputError(
            "media_not_found",
            f"a video must be a file, a folder of frames or a URL; there is none at {name}. Look at the path",
        )
    with _opened(path, name) as file:
        return _read_file(VideoFile(name, file), sampling, fit, source_fps)


def _opened(path: str, name: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise InputError(
            "media_unreadable",
            f"a video must be a file that can be read; {name} cannot: {error.strerror}. Look at its rights",
        ) from error


def _read_file(file: VideoFile, sampling: FrameSampling, fit: Fit, source_fps: float | None) -> Clip:
    if source_fps is not None:
        raise InputError(
            "option_no_effect",
            f"{spelled('source_fps')} is for frames without a container; {file.name} is a video file and has its own "
            f"rate, so {source_fps!r} would have no effect. Leave it out",
        )
    timeline = file.timeline()
    picks, times = timeline.pick(sampling)
    # The last frame is always picked, so the file is read to its end, and every frame in it is checked on the way.
    frames, size, count = collect(file.frames(timeline.total), picks, fit, stored_size, upright_rgb)
    if count != timeline.total:
        raise file.broken(count, timeline.total, "the rest cannot be decoded")
    return Clip(frames, times, size, timeline.total, timeline.fps)


def _read_frames(
    name: str, frames: Iterator[np.ndarray], total: int, sampling: FrameSampling, fit: Fit, source_fps: float | None
) -> Clip:
    if not total:
        raise InputError("video_too_short", f"a video must have frames; {name} has none")
    if source_fps is None:
        raise InputError(
            "option_missing",
            f"frames without a container have no rate; {name} came without {spelled('source_fps')}. Say how many are "
            "in a second",
        )
    source_fps = frame_rate(spelled("source_fps"), source_fps)
    picks, times = Timeline(total, source_fps, None).pick(sampling)
    # Every frame is read, so that a broken one, or a stranger among them, is noticed whatever the sampling.
    kept, size, _ = collect(frames, picks, fit, lambda frame: frame.shape[:2], lambda frame: frame)
    return Clip(kept, times, size, total, source_fps)


def _read_pictures(name: str, frames: Sequence[Any], allow_private_urls: bool = False) -> Iterator[np.ndarray]:
    for number, frame in enumerate(frames, start=1):
        try:
            yield read_image(frame, allow_private_urls=allow_private_urls)
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


def _pictures(folder: Path, name: str) -> list[Path]:
    """The files of a folder, hidden ones left out, frame2 before frame10."""
    try:
        paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise InputError(
            "media_unreadable",
            f"a folder of frames must be open to reading; {name} is not: {error.strerror}. Look at its rights",
        ) from error
    return sorted(paths, key=lambda path: _natural(path.name))


def _natural(name: str) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
