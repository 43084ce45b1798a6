"""Preprocessing for the vision encoder: the size that an image or a video becomes, and its patches.

Everything here equals transformers' Qwen2VLImageProcessor and Qwen3VLVideoProcessor, in numpy. Resized pixels stay
bytes until a slice of them is encoded: float32 patches would take eight times as much memory.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mlx_qwen35.checkpoint.config import VisionConfig
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.memory import most_pixels
from mlx_qwen35.media.decoded import Size
from mlx_qwen35.media.frames import FrameSampling
from mlx_qwen35.media.image import read_resized
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.media.pdf import DPI, POINTS, Document
from mlx_qwen35.media.video import read_video
from mlx_qwen35.options import spelled

MAX_RATIO = 200  # of the longer side to the shorter


@dataclass(frozen=True, eq=False)
class Media:
    """One image or video, resized: the input of the vision encoder. Accepted wherever an image or a video is.

    pixels: (frames, height, width, 3) uint8 RGB; one frame for an image, an even number for a video.
    times: seconds of each pair of frames of a video; empty for an image.
    original: (height, width) before resizing.
    """

    pixels: np.ndarray = field(repr=False)
    times: tuple[float, ...]
    original: tuple[int, int]
    config: VisionConfig = field(repr=False)
    values: np.ndarray = field(repr=False)  # (3, 256) float32: what each byte of each channel becomes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pixels."""
        return self.pixels.shape

    @property
    def size(self) -> Size:
        return self.shape[1], self.shape[2]

    @property
    def is_video(self) -> bool:
        return bool(self.times)

    @property
    def kind(self) -> str:
        return "video" if self.is_video else "image"

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches in time, height and width."""
        height, width = self.size
        return max(1, len(self.times)), height // self.config.patch_size, width // self.config.patch_size

    @property
    def tokens(self) -> int:
        return math.prod(self.grid) // self.config.spatial_merge_size**2

    @cached_property
    def digest(self) -> str:
        """The identity: SHA-256 of grid and pixels, whatever their source."""
        digest = hashlib.sha256(repr(self.grid).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()

    def __str__(self) -> str:
        (old_height, old_width), (height, width) = self.original, self.size
        size = f"{old_width}x{old_height}"
        size += f" resized to {width}x{height}" if self.resized else ""
        frames = f", {len(self.pixels)} frames" if self.is_video else ""
        return f"{size}{frames}, {self.tokens:,} tokens"

    @property
    def resized(self) -> bool:
        return self.size != tuple(self.original)

    def patches(self, frames: slice = slice(None), rows: slice = slice(None)) -> np.ndarray:
        """(F, n, P) float32: these rows of the patches of these pairs of frames. No others are computed."""
        step = self.config.temporal_patch_size
        shape = (self.grid[0], step if self.is_video else 1, *self.size, 3)
        pairs = np.broadcast_to(self.pixels.reshape(shape), (shape[0], step, *shape[2:]))[frames]
        height, width = self.grid[1:]
        start, stop, _ = rows.indices(height * width)
        merge = self.config.spatial_merge_size
        line = width * merge  # patches of one line of squares
        first, last = start // line, -(-stop // line)
        side = merge * self.config.patch_size
        lines = patches(pairs[:, :, first * side : last * side], self.config)
        wanted = lines[:, start - first * line : stop - first * line]
        return self.values[np.arange(3)[:, None], wanted].reshape(*wanted.shape[:2], -1)


class Page(Media):
    """A page of a document. Its size is known; it is drawn whenever its pixels are asked for.

    number: in the document, from 1 on. original: its (height, width) at the dots per inch that were asked for; dpi:
    those that it has.
    """

    document: Document
    number: int
    dpi: float
    _size: Size

    def __init__(
        self, document: Document, number: int, dpi: int, original: Size, size: Size, config: VisionConfig,
        values: np.ndarray,
    ):  # fmt: skip
        vars(self).update(
            document=document, number=number, dpi=dpi * size[0] / original[0], times=(), original=original, _size=size,
            config=config, values=values,
        )  # fmt: skip

    @property
    def pixels(self) -> np.ndarray:
        return self.document.drawn(self.number, self.size)[None]

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, *self._size, 3

    def held(self) -> Media:
        """An image that holds its pixels."""
        return Media(self.pixels, (), self.original, self.config, self.values)

    def __str__(self) -> str:
        height, width = self.size
        return f"{width}x{height} at {self.dpi:.0f} dpi, {self.tokens:,} tokens"


def patches(pairs: np.ndarray, config: VisionConfig) -> np.ndarray:
    """(F, 2, height, width, 3) -> (F, N, 3, 2 * 16^2), N = height * width / 16^2.

    Patches come in squares of merge x merge, which become one token each; a row is laid out as (channel, time, y, x).
    """
    F, T, height, width, C = pairs.shape
    patch, merge = config.patch_size, config.spatial_merge_size
    x = pairs.reshape(F, T, height // patch // merge, merge, patch, width // patch // merge, merge, patch, C)
    return x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(F, -1, C, T * patch * patch)


def image_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """The nearest size with sides that are multiples of `factor` and an area from `least` to `most`, of about the same
    ratio. Ties round to even (transformers, smart_resize)."""
    _check_ratio(height, width)
    rounded = round(height / factor) * factor, round(width / factor) * factor
    return _within(math.prod(rounded), height * width, rounded, (height, width), factor, least, most)


def video_size(frames: int, height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Like image_size for every frame of a video, where `least` and `most` bound frames * height * width."""
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_ratio(height, width)
    rounded = round(height / factor) * factor, round(width / factor) * factor
    volume = round(frames / 2) * 2 * math.prod(rounded)
    return _within(volume, frames * height * width, rounded, (height, width), factor, least, most)


def _within(
    new: int, old: int, rounded: tuple[int, int], sides: tuple[int, int], factor: int, least: int, most: int
) -> tuple[int, int]:
    """The rounded sides, or where their area or volume is out of bounds, the sides scaled by the old one."""
    if new > most:
        scale = math.sqrt(old / most)
        height, width = (max(factor, math.floor(side / scale / factor) * factor) for side in sides)
    elif new < least:
        scale = math.sqrt(least / old)
        height, width = (math.ceil(side * scale / factor) * factor for side in sides)
    else:
        height, width = rounded
    return height, width


def _check_ratio(height: int, width: int) -> None:
    if max(height, width) > MAX_RATIO * min(height, width):
        raise InputError(
            "aspect_ratio_exceeded",
            f"the longer side of an image must be at most {MAX_RATIO} times the shorter; this one is {width}x{height}. "
            "Cut it into pieces",
        )


@dataclass(frozen=True)
class Preprocessor:
    """The checkpoint's settings for images, or for videos, from its preprocessor files."""

    config: VisionConfig
    values: np.ndarray  # see Media
    least: int  # pixels
    most: int
    sampling: FrameSampling  # of videos
    memory_limit: int | None = None  # see read_image; it bounds the pixels too

    @property
    def factor(self) -> int:
        return self.config.patch_size * self.config.spatial_merge_size

    @property
    def most_of_image(self) -> int:
        """The most pixels of an image by default: the checkpoint's, or those that suit the memory."""
        return int(min(self.most, most_pixels(self.memory_limit)[0]))

    def image(self, source: Any, options: VisionOptions) -> Media:
        """Read and resize an image from any source that read_image takes."""
        least, most = self._image_limits(options)

        def fit(height: int, width: int) -> tuple[int, int]:
            return image_size(height, width, self.factor, least, most)

        pixels, original = read_resized(
            source, fit, allow_private_urls=options.allow_private_urls, memory_limit=self.memory_limit
        )
        return Media(pixels[None], (), original, self.config, self.values)

    def pages(self, document: Document, numbers: Sequence[int], options: VisionOptions) -> list[Page]:
        """Pages of a document, at the options' dots per inch as far as an image may have so many pixels."""
        least, most = self._image_limits(options)
        dpi, found = options.dpi or DPI, []
        for number, points in zip(numbers, document.points(numbers), strict=True):
            height, width = (max(1, round(side * dpi / POINTS)) for side in points)
            size = image_size(height, width, self.factor, least, most)
            found.append(Page(document, number, dpi, (height, width), size, self.config, self.values))
        return found

    def _image_limits(self, options: VisionOptions) -> tuple[int, int]:
        return self._limits(options, options.min_pixels, options.max_pixels, self.most_of_image, "max_pixels")

    def video(self, source: Any, options: VisionOptions) -> Media:
        """Read, sample and resize a video from any source that read_video takes."""
        _, suits = most_pixels(self.memory_limit)
        least, most = self._limits(options, None, options.video_total_pixels, suits, "video_total_pixels")
        count = options.video_num_frames
        sampling = replace(self.sampling, fps=None if count else options.fps or self.sampling.fps, num_frames=count)

        def fit(count: int, height: int, width: int) -> tuple[int, int]:
            if count * self.factor**2 > most:
                raise InputError(
                    "video_too_long",
                    f"the frames of a video must fit into {most:,} pixels, {self.factor}x{self.factor} or more each; "
                    f"{count:,} frames do not. Read fewer, or raise {spelled('video_total_pixels')}",
                )
            return video_size(count, height, width, self.factor, least, most)

        video = read_video(
            source, sampling, fit, source_fps=options.source_fps, allow_private_urls=options.allow_private_urls,
            memory_limit=self.memory_limit,
        )  # fmt: skip
        frames, step = video.frames, self.config.temporal_patch_size
        last = -len(frames) % step  # of an odd number of frames, the last one counts twice
        frames = np.concatenate([frames, frames[-1:].repeat(last, axis=0)]) if last else frames
        seconds = [*video.times, *video.times[-1:] * last]
        times = tuple((a + b) / 2 for a, b in zip(seconds[::step], seconds[step - 1 :: step], strict=True))
        return Media(frames, times, video.size, self.config, self.values)

    def _limits(
        self, options: VisionOptions, least: int | None, most: int | None, suits: float, name: str
    ) -> tuple[int, int]:
        low = self.least if least is None else least
        if most is not None and options.published_limits:
            both = f"{spelled(name)} ({most}) and {spelled('published_limits')}"
            raise InputError("option_conflict", f"{both} must not be given together: each is a limit. Leave one out")
        if most is None:
            most = self.most if options.published_limits else int(min(self.most, suits))
            most = max(most, low)
        if most < (fewest := max(low, self.factor**2)):
            hint = f". Lower {spelled('min_pixels')} too" if name == "max_pixels" and low > self.factor**2 else ""
            raise InputError("option_invalid", f"{spelled(name)} must be at least {fewest}, got {most}{hint}")
        return low, most
