"""Values of the preprocessor files that would break a picture later on."""

import json
import math

import pytest
from refusing import refused

from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.media.preprocessor_files import read_preprocessor

FILE = {
    "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "size": {"shortest_edge": 4096, "longest_edge": 65536},
}  # fmt: skip


def read(folder, kind="video", **fields):
    name = "preprocessor_config.json" if kind == "image" else "video_preprocessor_config.json"
    (folder / name).write_text(json.dumps(FILE | fields))
    return read_preprocessor(folder, kind, parse_config(geometry("tiny")).vision)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    "edges, field",
    [
        ((10**12, 10**12), "shortest_edge"), ((4096, 4095), "longest_edge"), ((0, 65536), "shortest_edge"),
        ((1, 1023), "longest_edge"), ((4096, 10**100), "longest_edge"), ((4096.0, 65536), "shortest_edge"),
    ],
)  # fmt: skip
def test_pixels_out_of_bounds_are_named(edges, field, kind, tmp_path):
    with refused("config_field_invalid", f"'{field}'"):
        read(tmp_path, kind, size=dict(zip(("shortest_edge", "longest_edge"), edges, strict=True)))


@pytest.mark.parametrize(
    "field, value",
    [
        ("image_mean", [math.nan] * 3), ("image_mean", [0.5]), ("image_mean", ["x"] * 3), ("image_mean", [[0.5]] * 3),
        ("image_mean", [10**200] * 3), ("image_mean", 0.5), ("image_std", [0.5, 0, 0.5]), ("image_std", [math.inf] * 3),
        ("image_std", [True] * 3), ("rescale_factor", math.nan), ("rescale_factor", 0), ("rescale_factor", "x"),
        ("rescale_factor", [1]), ("rescale_factor", 1e300), ("fps", "x"), ("fps", math.nan), ("fps", -1), ("fps", 0),
        ("min_frames", 0), ("min_frames", 10**12), ("min_frames", 4.0), ("max_frames", 3), ("max_frames", True),
        ("size", [1]),
    ],
)  # fmt: skip
def test_a_field_out_of_bounds_is_named(field, value, tmp_path):
    with refused("config_field_invalid", "video_preprocessor_config.json", f"'{field}'"):
        read(tmp_path, **{field: value})


def test_a_list_in_the_place_of_both_settings_is_named(tmp_path):
    (tmp_path / "processor_config.json").write_text('{"video_processor": [1]}')
    with refused("config_field_invalid", "processor_config.json", "'video_processor'"):
        read_preprocessor(tmp_path, "video", parse_config(geometry("tiny")).vision)


def test_fields_that_are_absent_or_null_have_the_defaults_of_transformers(tmp_path):
    said = read(tmp_path, fps=2, min_frames=4, max_frames=768, rescale_factor=1 / 255)
    silent = read(tmp_path, fps=None, max_frames=None)
    assert silent.sampling == said.sampling and (silent.values == said.values).all()
