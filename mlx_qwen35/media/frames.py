"""Sampling of a video's frames, and the sampled video: upright, resized RGB frames with their times."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.decoded import Size, resize
from mlx_qwen35.values import number, whole

TEMPORAL_PATCH = 2  # the model reads frames in pairs

Fit = Callable[[int, int, int], Size]  # (number of sampled frames, height, width) -> the size to resize them to
_Frame = TypeVar("_Frame")


@dataclass(frozen=True)
class FrameSampling:
    """How many frames of a video are used, spread evenly from its first to its last.

    fps: frames a second, held between min_frames and max_frames, never more than the video has.
    num_frames: exactly so many; frames repeat where the video has fewer. Neither: all frames, held between min_frames
    and max_frames. The rules are those of transformers 5.23 (Qwen3VLVideoProcessor.sample_frames). Raises InputError.
    """

    fps: float | None
    num_frames: int | None
    min_frames: int
    max_frames: int

    def __post_init__(self) -> None:
        if self.fps is not None and self.num_frames is not None:
            raise InputError(
                "option_conflict",
                f"fps ({self.fps}) and num_frames ({self.num_frames}) must not be given together. Leave one out",
            )
        if self.fps is not None:
            object.__setattr__(self, "fps", frame_rate("fps", self.fps))
        for name in ("num_frames", "min_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None or name != "num_frames":
                object.__setattr__(self, name, whole(name, value, TEMPORAL_PATCH))
        if self.max_frames < self.min_frames:
            raise InputError(
                "option_invalid", f"max_frames must not be below min_frames, {self.min_frames}; got {self.max_frames}"
            )

    def count(self, total: int, source_fps: float) -> int:
        """How many of `total` frames, `source_fps` a second, are used. InputError for fewer than two frames."""
        source_fps = frame_rate("the source's frames a second", source_fps)
        if total < TEMPORAL_PATCH:
            raise too_short("the video", total)
        if self.num_frames is not None:
            return self.num_frames
        if self.fps is None:
            return min(max(total, self.min_frames), self.max_frames)
        return min(max(int(total / source_fps * self.fps), self.min_frames), self.max_frames, total)

    def indices(self, total: int, source_fps: float) -> list[int]:
        """The frames used, counted from 0, ascending: evenly spaced from first to last, rounded half-even."""
        return np.linspace(0, total - 1, self.count(total, source_fps)).round().astype(int).tolist()


def too_short(name: str, total: int) -> InputError:
    has = "has one. Give it as an image" if total else "has none. Export it again"
    return InputError("video_too_short", f"a video must have at least two frames; {name} {has}")


def frame_rate(name: str, value: Any) -> float:
    """Frames a second. InputError unless `value` is a number above 0, of a size that a video may have."""
    return number(name, value, "a number above 0 and finite, from 0.000001 to 1,000,000", 1e-6, 1e6)


@dataclass(frozen=True)
class Timeline:
    """The frames of a source: how many, how many a second (on average), and for a variable rate when each is shown.

    times: seconds from the first frame, ascending; None for a constant rate, where frame i is shown at i / fps.
    """

    total: int
    fps: float
    times: np.ndarray | None

    def pick(self, sampling: FrameSampling) -> tuple[list[int], tuple[float, ...]]:
        """The frames to use, and their times. With a variable rate: the nearest to evenly spaced times, so a frame that
        is shown for long may be picked more than once."""
        if self.times is None:
            picks = sampling.indices(self.total, self.fps)
            return picks, tuple(index / self.fps for index in picks)
        targets = np.linspace(0, self.times[-1], sampling.count(self.total, self.fps))
        halfway = (self.times[1:] + self.times[:-1]) / 2
        picks = np.searchsorted(halfway, targets).tolist()
        return picks, tuple(self.times[picks].tolist())


@dataclass(frozen=True)
class Video:
    """The sampled frames of one video.

    frames: (n, height, width, 3) uint8, RGB, upright, resized. times: seconds of each frame from the first frame of
    the source. size: the source's (height, width), upright. total: frames in the source. source_fps: frames a second
    in the source, the average where the rate varies.
    """

    frames: np.ndarray
    times: tuple[float, ...]
    size: Size
    total: int
    source_fps: float


def collect(
    frames: Iterable[_Frame],
    timeline: Timeline,
    sampling: FrameSampling,
    fit: Fit,
    to_rgb: Callable[[_Frame], np.ndarray],
    size_of: Callable[[_Frame], Size],
) -> tuple[Video, int]:
    """Read all frames once and keep the sampled ones, resized as they come.

    Args:
        frames: any frames, in order; each may be forgotten once the next is asked for.
        timeline: of these frames.
        fit: called once, with the number of sampled frames and the size of the first.
        to_rgb: a frame -> (H, W, 3) uint8, upright. Called for sampled frames only.
        size_of: a frame's (height, width) as stored. Raises InputError if it changes.

    Returns: the video, and the number of frames that came.
    """
    picks, times = timeline.pick(sampling)
    kept: np.ndarray = np.zeros(0, np.uint8)
    source, stored, count = (0, 0), None, 0
    for count, frame in enumerate(frames, start=1):
        stored = stored or size_of(frame)
        if size_of(frame) != stored:
            at_first, now = (f"{width} x {height}" for height, width in (stored, size_of(frame)))
            raise InputError(
                "video_sizes_differ",
                f"all frames of a video must have one size; the first is {at_first} pixels, frame {count} is {now}. "
                "Resize them first, or leave out what does not belong",
            )
        first, last = bisect_left(picks, count - 1), bisect_right(picks, count - 1)
        if first < last:
            pixels = to_rgb(frame)
            if not kept.size:
                source = (pixels.shape[0], pixels.shape[1])
                kept = np.empty((len(picks), *fit(len(picks), *source), 3), np.uint8)
            kept[first:last] = resize(pixels, kept.shape[1:3])
    return Video(kept, times, source, timeline.total, timeline.fps), count
