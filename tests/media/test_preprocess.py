"""How large images and videos become: the checkpoint's limits, the machine's, and the caller's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from refusing import refused

from mlx_qwen35 import VisionOptions
from mlx_qwen35.backend import CPU, assume
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.machine.memory import most_pixels
from mlx_qwen35.media.preprocess import Media, Preprocessor
from mlx_qwen35.media.preprocessor_files import read_preprocessor

COMMON = {
    "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
IMAGE = COMMON | {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}  # as published
VIDEO = COMMON | {"size": {"shortest_edge": 4096, "longest_edge": 25165824}}


def preprocessors(
    folder: Path, image: dict = IMAGE, video: dict = VIDEO, memory_limit: int | None = None
) -> tuple[Preprocessor, Preprocessor]:
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    config = parse_config(geometry("tiny")).vision
    image, video = (read_preprocessor(folder, kind, config, memory_limit) for kind in ("image", "video"))
    return image, video


def size(media: Media) -> tuple[int, int]:
    return media.pixels.shape[1:3]


@pytest.mark.parametrize(
    ("usable", "image", "video"),
    [(5.73e9, 2**20, 6 * 2**20), (11.5e9, 2**22, 12 * 2**20), (17.2e9, float("inf"), float("inf"))],
    ids=["8 GB", "16 GB", "24 GB"],
)
def test_the_default_limits_follow_the_machine_s_memory(usable, image, video):
    assert most_pixels(int(usable)) == (image, video)
    with assume(replace(CPU, usable_memory=lambda: int(usable))):
        assert most_pixels(None) == (image, video)


def test_an_image_and_a_video_are_resized_to_the_machine_s_limits(tmp_path):
    image, video = preprocessors(tmp_path, memory_limit=5_730_000_000)
    large = np.zeros((2000, 3000, 3), np.uint8)
    assert size(image.image(large, VisionOptions())) == (832, 1248)
    assert size(image.image(large, VisionOptions(published_limits=True))) == (1984, 3008)
    assert size(image.image(large, VisionOptions(max_pixels=2**21))) == (1152, 1760)
    frames = np.zeros((4, 1600, 1600, 3), np.uint8)
    assert size(video.video(frames, VisionOptions(source_fps=2))) == (1248, 1248)
    assert size(video.video(frames, VisionOptions(source_fps=2, published_limits=True))) == (1600, 1600)
    assert size(video.video(frames, VisionOptions(source_fps=2, video_total_pixels=2**20))) == (512, 512)


def test_a_caller_s_limit_may_exceed_the_published_one(tmp_path):
    small = IMAGE | {"size": {"shortest_edge": 4096, "longest_edge": 65536}}
    image, _ = preprocessors(tmp_path, small, memory_limit=64 * 10**9)
    picture = np.zeros((512, 512, 3), np.uint8)
    assert size(image.image(picture, VisionOptions())) == (256, 256)
    assert size(image.image(picture, VisionOptions(max_pixels=2**20))) == (512, 512)


def test_a_caller_s_minimum_lifts_the_machine_s_limit(tmp_path):
    image, _ = preprocessors(tmp_path, memory_limit=5_730_000_000)
    assert size(image.image(np.zeros((64, 64, 3), np.uint8), VisionOptions(min_pixels=2**21))) == (1472, 1472)


def test_fps_and_the_number_of_frames_choose_what_is_read(tmp_path):
    _, video = preprocessors(tmp_path)
    frames = np.zeros((40, 64, 64, 3), np.uint8)
    for options, pairs in (({}, 4), ({"fps": 1}, 2), ({"fps": 4}, 8), ({"video_num_frames": 11}, 6)):
        media = video.video(frames, VisionOptions(source_fps=10, **options))
        assert (len(media.times), media.grid) == (pairs, (pairs, 4, 4)), options


def test_an_odd_last_frame_counts_twice(tmp_path):
    _, video = preprocessors(tmp_path)
    frames = np.stack([np.full((64, 64, 3), 10 * i, np.uint8) for i in range(5)])
    media = video.video(frames, VisionOptions(source_fps=2))
    assert [int(frame[0, 0, 0]) for frame in media.pixels] == [0, 10, 20, 30, 40, 40]
    assert media.times == (0.25, 1.25, 2.0)


def test_some_of_the_patches_are_those_of_the_whole(tmp_path):
    _, video = preprocessors(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (6, 96, 160, 3), np.uint8)
    media = video.video(frames, VisionOptions(source_fps=2))
    whole = media.patches()
    assert whole.shape == (3, 60, 1536) and whole.dtype == np.float32
    for start, stop in ((0, 8), (5, 31), (20, 40), (37, 99)):
        assert np.array_equal(media.patches(slice(1, 3), slice(start, stop)), whole[1:3, start:stop])


def test_the_grid_is_part_of_the_identity(tmp_path):
    image, _ = preprocessors(tmp_path)
    wide, tall = (image.image(np.zeros(shape, np.uint8), VisionOptions()) for shape in ((256, 512, 3), (512, 256, 3)))
    assert wide.pixels.tobytes() == tall.pixels.tobytes() and wide.digest != tall.digest


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"patch_size": 14}, "config_field_unsupported"),
        ({"size": {"shortest_edge": 9}}, "config_field_missing"),
        ({"do_resize": False}, "config_field_unsupported"),
        ({"resample": 2}, "config_field_unsupported"),
        ({"image_mean": [0.5]}, "config_field_invalid"),
        ({"image_std": [0.5, 0, 0.5]}, "config_field_invalid"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(tmp_path, change, code):
    with refused(code):
        preprocessors(tmp_path, image=IMAGE | change)


def test_what_became_of_an_image_is_told(tmp_path):
    image, video = preprocessors(tmp_path)
    assert str(image.image(np.zeros((500, 300, 3), np.uint8), VisionOptions())) == (
        "300x500 resized to 288x512, 144 tokens"
    )
    video = video.video(np.zeros((4, 64, 64, 3), np.uint8), VisionOptions(source_fps=2))
    assert str(video) == "64x64, 4 frames, 8 tokens" and not video.resized


def test_a_shown_image_has_a_short_repr(tmp_path):
    image, _ = preprocessors(tmp_path)
    assert len(repr(image.image(np.zeros((500, 300, 3), np.uint8), VisionOptions()))) < 100


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"min_pixels": 2_000_000_000}, "option_invalid"),
        ({"published_limits": "no"}, "option_invalid"),
        ({"outer_vision_tags": 1}, "option_invalid"),
    ],
)
def test_options_out_of_range_are_refused(options, code):
    with refused(code):
        VisionOptions(**options)


def test_more_frames_than_the_limit_has_room_for_are_refused_before_they_are_read(tmp_path):
    _, video = preprocessors(tmp_path)
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    with refused("video_too_long", "32x32", "5,000,000"):
        video.video(frames, VisionOptions(source_fps=2, video_num_frames=5_000_000))


def test_two_limits_at_once_are_refused(tmp_path):
    image, video = preprocessors(tmp_path)
    picture = np.zeros((64, 64, 3), np.uint8)
    with refused("option_conflict", "max_pixels", "65536", "published_limits"):
        image.image(picture, VisionOptions(max_pixels=65536, published_limits=True))
    with refused("option_conflict", "video_total_pixels", "65536", "published_limits"):
        video.video(picture[None], VisionOptions(video_total_pixels=65536, published_limits=True))
