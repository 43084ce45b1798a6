"""A checkpoint's settings for images and videos, read from its preprocessor files."""

from pathlib import Path

import numpy as np

from mlx_qwen35.checkpoint.config import VisionConfig
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import Fields, read_json
from mlx_qwen35.media.frames import FrameSampling
from mlx_qwen35.media.preprocess import Preprocessor

_FILES = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_SAMPLING = FrameSampling(2, None, 4, 768)  # Qwen3VLVideoProcessor's, where the file says nothing
_LEAST = 1 << 24  # what shortest_edge may ask for, in pixels: everything smaller is made so large
_MOST = 1 << 40  # what longest_edge may ask for; the machine's own limit lies far below
_FRAMES = 1 << 20


def read_preprocessor(
    folder: Path, kind: str, config: VisionConfig, memory_limit: int | None = None
) -> Preprocessor:
    """The settings for kind "image" or "video": from its own file, as published checkpoints have it, or from the file
    that newer programs save for both. memory_limit: see read_image.

    Raises InputError if the file is absent, asks for what is not implemented, or a field is out of bounds.
    """
    settings = _settings(folder, kind)
    settings.only("patch_size", config.patch_size)
    settings.only("temporal_patch_size", config.temporal_patch_size)
    settings.only("merge_size", config.spatial_merge_size)
    for name in _STEPS:
        settings.only(name, True, required=False)
    settings.only("resample", 3, required=False)  # bicubic
    size = Fields(settings.get("size", dict), f"{settings.where}: size")
    least = size.size("shortest_edge", _LEAST)
    most = size.whole("longest_edge", max(least, (config.patch_size * config.spatial_merge_size) ** 2), _MOST)
    return Preprocessor(config, _byte_values(settings), least, most, _sampling(settings), memory_limit)


def _settings(folder: Path, kind: str) -> Fields:
    file, both = folder / _FILES[kind], folder / "processor_config.json"
    if file.is_file():
        return Fields(read_json(file), file.name)
    values = Fields(read_json(both), both.name).object(f"{kind}_processor") if both.is_file() else None
    if values is None:
        raise InputError(
            "preprocessor_missing",
            f"reading {kind}s needs {_FILES[kind]}, which {folder} does not hold. Download it from the checkpoint's "
            "original repository into this folder",
        )
    return Fields(values, both.name)


def _sampling(settings: Fields) -> FrameSampling:
    fewest = settings.whole("min_frames", 2, _FRAMES, absent=_SAMPLING.min_frames)
    most = settings.whole("max_frames", fewest, _FRAMES, absent=max(fewest, _SAMPLING.max_frames))
    return FrameSampling(settings.number("fps", 1e-6, 1e6, absent=_SAMPLING.fps), None, fewest, most)


def _byte_values(settings: Fields) -> np.ndarray:
    """(3, 256) float32: (byte * scale - mean) / std, rounded where transformers rounds."""
    scale = settings.number("rescale_factor", 1e-6, 1e6, absent=1 / 255)
    rescaled = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
    mean = np.array(settings.numbers("image_mean", 3, -1e6, 1e6), np.float32)[:, None]
    std = np.array(settings.numbers("image_std", 3, 1e-6, 1e6), np.float32)[:, None]
    return (rescaled - mean) / std
