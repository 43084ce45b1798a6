"""A checkpoint's settings for images and clips, as its preprocessor files say."""

from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.checkpoint.config import VisionConfig
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import Fields, read_json
from mlx_qwen35.media.preprocess import Preprocessor

_FILES = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_SAMPLING = {"fps": 2, "min_frames": 4, "max_frames": 768}  # Qwen3VLVideoProcessor's, where the file says nothing
_LEAST = 1 << 24  # what shortest_edge may ask for, in pixels: everything smaller is made so large
_MOST = 1 << 40  # what longest_edge may ask for; the machine's own limit lies far below
_FRAMES = 1 << 20


def read_preprocessor(folder: Path, kind: str, config: VisionConfig) -> Preprocessor:
    """The settings for images or for clips (`kind`): from a file of their own, as the published checkpoints have it, or
    from what newer programs save for both.

    InputError when the file is absent, asks for what is not implemented, or a field is out of bounds.
    """
    settings = _settings(folder, kind)
    for name, expected in (
        ("patch_size", config.patch_size), ("temporal_patch_size", config.temporal_patch_size),
        ("merge_size", config.spatial_merge_size),
    ):  # fmt: skip
        settings.only(name, expected)
    for name in _STEPS:
        settings.only(name, True, required=False)
    settings.only("resample", 3, required=False)  # bicubic
    settings.get("size", dict)
    size = Fields(settings.values["size"], f"{settings.where}: size")
    least = size.size("shortest_edge", _LEAST)
    most = size.whole("longest_edge", max(least, (config.patch_size * config.spatial_merge_size) ** 2), _MOST)
    return Preprocessor(config, _byte_values(settings), least, most, _sampling(settings))


def _settings(folder: Path, kind: str) -> Fields:
    file, both = folder / _FILES[kind], folder / "processor_config.json"
    values = read_json(file) if file.is_file() else None
    if values is None and both.is_file():
        file, values = both, Fields(read_json(both), both.name).object(f"{kind}_processor")
    if values is None:
        raise InputError(
            "preprocessor_missing",
            f"reading {kind}s needs {_FILES[kind]}, which {folder} does not hold. Download it from the checkpoint's "
            "original repository into this folder",
        )
    return Fields(values, file.name)


def _sampling(settings: Fields) -> dict[str, Any]:
    fewest = settings.whole("min_frames", 2, _FRAMES, absent=_SAMPLING["min_frames"])
    return {
        "fps": settings.number("fps", 1e-6, 1e6, absent=_SAMPLING["fps"]),
        "min_frames": fewest,
        "max_frames": settings.whole("max_frames", fewest, _FRAMES, absent=max(fewest, _SAMPLING["max_frames"])),
    }


def _byte_values(settings: Fields) -> np.ndarray:
    """(3, 256) float32: (byte * scale - mean) / std, rounded where transformers rounds."""
    scale = settings.number("rescale_factor", 1e-6, 1e6, absent=1 / 255)
    rescaled = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
    mean = np.array(settings.numbers("image_mean", 3, -1e6, 1e6), np.float32)[:, None]
    std = np.array(settings.numbers("image_std", 3, 1e-6, 1e6), np.float32)[:, None]
    return (rescaled - mean) / std
