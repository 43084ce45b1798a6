"""Videos, however they are given: which frames are read, at what times, and how they look. Damage has its own file."""

import base64
import os
from dataclasses import replace
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from media import videos
from PIL import Image
from refusing import refused

from mlx_qwen35.media.container import VideoFile, upright_rgb
from mlx_qwen35.media.decoded import resize
from mlx_qwen35.media.frames import FrameSampling, Video
from mlx_qwen35.media.video import read_video

ALL = FrameSampling(None, None, 2, 1000)
CONTAINERS = {
    "mp4": ("libx264", "yuv420p"),
    "mov": ("mpeg4", "yuv420p"),
    "mkv": ("libx264", "yuv420p"),
    "webm": ("libvpx-vp9", "yuv420p"),
    "gif": ("gif", "rgb8"),
}


def per_second(fps: float, least: int = 4, most: int = 768) -> FrameSampling:
    return FrameSampling(fps, None, least, most)


def exactly(count: int) -> FrameSampling:
    return FrameSampling(None, count, 4, 768)


def same(frames: int, height: int, width: int) -> tuple[int, int]:
    return height, width


def read(source, sampling: FrameSampling = ALL, **options) -> Video:
    return read_video(source, sampling, same, **options)


# --- sampling ---


def test_ten_seconds_give_the_published_indices():
    indices = FrameSampling(2, None, 4, 768).indices(300, 30)
    assert len(indices) == 20
    assert indices[:8] == [0, 16, 31, 47, 63, 79, 94, 110]
    assert indices[-2:] == [283, 299]


def test_halfway_indices_round_to_even():
    assert exactly(3).indices(4, 1) == [0, 2, 3]  # 1.5 to 2
    assert exactly(3).indices(6, 1) == [0, 2, 5]  # 2.5 to 2


def test_two_frames_are_both_used():
    assert FrameSampling(2, None, 4, 768).indices(2, 30) == [0, 1]


def test_few_frames_a_second_are_held_at_the_minimum():
    assert len(FrameSampling(0.1, None, 4, 768).indices(300, 30)) == 4


def test_many_frames_a_second_are_held_at_the_maximum():
    assert len(FrameSampling(30, None, 4, 50).indices(300, 30)) == 50


def test_no_more_frames_are_used_than_there_are():
    assert FrameSampling(60, None, 4, 768).indices(9, 30) == list(range(9))


def test_num_frames_is_exact_and_repeats_frames_of_a_short_video():
    assert exactly(6).indices(3, 30) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("total", [2, 3, 4, 5, 31, 100, 299, 4001])
@pytest.mark.parametrize("rate", [5.0, 24000 / 1001, 25.0, 60.0])
@pytest.mark.parametrize(
    "sampling", [per_second(2), per_second(0.7, 2, 20), exactly(7), FrameSampling(None, None, 4, 90)]
)
def test_indices_equal_those_of_transformers(total: int, rate: float, sampling: FrameSampling):
    pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl").Qwen3VLVideoProcessor
    settings = SimpleNamespace(fps=None, min_frames=sampling.min_frames, max_frames=sampling.max_frames)
    source = SimpleNamespace(total_num_frames=total, fps=rate)
    expected = theirs.sample_frames(settings, source, num_frames=sampling.num_frames, fps=sampling.fps)
    assert sampling.indices(total, rate) == expected.tolist()


@pytest.mark.parametrize(
    "values, code",
    [
        ((2, 8, 4, 768), "option_conflict"),
        ((0, None, 4, 768), "option_invalid"),
        ((float("inf"), None, 4, 768), "option_invalid"),
        ((None, 1, 4, 768), "option_invalid"),
        ((None, 4.0, 4, 768), "option_invalid"),
        ((2, None, 1, 768), "option_invalid"),
        ((2, None, 9, 8), "option_invalid"),
    ],
)
def test_sampling_refuses(values: tuple, code):
    with refused(code):
        FrameSampling(*values)


@pytest.mark.parametrize("total, code", [(0, "video_too_short"), (1, "video_too_short")])
def test_sampling_refuses_a_video_without_two_frames(total: int, code):
    with refused(code):
        FrameSampling(2, None, 4, 768).indices(total, 30)


# --- files ---


@pytest.mark.parametrize("ending", CONTAINERS)
@pytest.mark.parametrize("frames", [30, 31])
def test_every_frame_of_a_file_is_read(tmp_path: Path, ending: str, frames: int):
    codec, pixels = CONTAINERS[ending]
    video = read(videos.write(tmp_path / f"video.{ending}", frames, codec=codec, pixels=pixels))
    assert videos.numbers(video.frames) == list(range(frames))
    assert video.times == tuple(i / 10.0 for i in range(frames))
    assert (video.total, video.source_fps, video.size) == (frames, 10.0, (48, 64))
    assert video.frames.dtype == np.uint8


def test_vp8_is_read(tmp_path: Path):
    video = read(videos.write(tmp_path / "video.webm", 12, codec="libvpx"))
    assert videos.numbers(video.frames) == list(range(12))


@pytest.mark.parametrize(
    "ending, options", [("mp4", {"movflags": "frag_keyframe+empty_moov"}), ("avi", {}), ("ts", {}), ("flv", {})]
)
def test_other_containers_are_read(tmp_path: Path, ending: str, options: dict[str, str]):
    video = read(videos.write(tmp_path / f"video.{ending}", 31, container=options))
    assert videos.numbers(video.frames) == list(range(31))
    assert video.times == tuple(i / 10.0 for i in range(31))


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("seconds", [1, 5])
def test_sound_shorter_or_longer_than_the_pictures_does_no_harm(tmp_path: Path, ending: str, seconds: float):
    assert read(videos.write_with_sound(tmp_path / f"video.{ending}", seconds)).total == 31


def test_frames_are_sampled_by_the_rate(tmp_path: Path):
    video = read(videos.write(tmp_path / "video.mp4", 31), per_second(2))
    assert videos.numbers(video.frames) == [0, 6, 12, 18, 24, 30]
    assert video.times == (0.0, 0.6, 1.2, 1.8, 2.4, 3.0)


def test_times_of_an_uneven_rate_are_index_by_rate(tmp_path: Path):
    video = read(videos.write(tmp_path / "video.mp4", 9, rate=Fraction(30000, 1001)))
    rate = float(Fraction(30000, 1001))
    assert video.source_fps == rate
    assert video.times == tuple(i / rate for i in range(9))


def test_a_rate_that_milliseconds_cannot_tell_is_constant_still(tmp_path: Path):
    video = read(videos.write(tmp_path / "video.mkv", 50, rate=30))
    assert video.times == tuple(i / 30.0 for i in range(50))


def test_frames_kept_twice_are_in_both_places(tmp_path: Path):
    video = read(videos.write(tmp_path / "video.mp4", 3), exactly(6))
    assert videos.numbers(video.frames) == [0, 0, 1, 1, 2, 2]


def test_a_container_without_a_frame_count_is_counted_by_decoding(tmp_path: Path):
    path = videos.write(tmp_path / "video.mkv", 17, container={"live": "1"})
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        assert (file.streams.video[0].frames, file.duration) == (0, None)
    assert videos.numbers(read(path).frames) == list(range(17))


def test_packets_that_hold_no_frame_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packets = VideoFile.packets  # VP8 has such packets; here one is made up

    def one_more(*call):
        found = packets(*call)
        return replace(found, times=[*found.times, found.times[-1]], exact=False)

    monkeypatch.setattr(VideoFile, "packets", one_more)
    assert read(videos.write(tmp_path / "video.webm", 12, codec="libvpx")).total == 12


def test_a_trimmed_video_starts_where_it_was_trimmed(tmp_path: Path):
    # The ten frames before time 0 are in the file, and in its frame count, and its edit list hides them.
    times, options = [100 * i - 1000 for i in range(31)], {"avoid_negative_ts": "disabled"}
    video = read(videos.write(tmp_path / "video.mp4", 31, times=times, container=options))
    assert videos.numbers(video.frames) == list(range(10, 31))
    assert video.times == tuple(i / 10.0 for i in range(21))


def test_pixels_equal_those_that_transformers_reads(tmp_path: Path):
    read_video_pyav = pytest.importorskip("transformers.video_utils").read_video_pyav
    path = videos.write(tmp_path / "video.mp4", 31)
    sampling = per_second(2)
    expected, metadata = read_video_pyav(str(path), lambda metadata: sampling.indices(metadata.total_num_frames, 10.0))
    video = read(path, sampling)
    assert np.array_equal(video.frames, expected)
    assert (video.total, video.source_fps) == (metadata.total_num_frames, metadata.fps)


def test_every_way_to_give_a_file_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = videos.write(tmp_path / "video.mp4", 5)
    data = path.read_bytes()
    monkeypatch.setenv("HOME", str(tmp_path))
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    videos_read = [read(source) for source in (path, str(path), "~/video.mp4", data, bytearray(data), url)]
    assert all(np.array_equal(video.frames, videos_read[0].frames) for video in videos_read)


def test_a_data_uri_is_read(tmp_path: Path):
    data = videos.write(tmp_path / "video.mp4", 5).read_bytes()
    video = read(f"data:video/mp4;base64,{base64.b64encode(data).decode()}")
    assert videos.numbers(video.frames) == list(range(5))


def test_a_name_with_a_colon_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    videos.write(tmp_path / "video.mp4", 3)
    os.rename(tmp_path / "video.mp4", tmp_path / "concat:video.mp4")
    monkeypatch.chdir(tmp_path)
    assert read("concat:video.mp4").total == 3


# --- variable rates ---

UNEVEN = [0, 100, 200, 300, 400, 2000, 2100, 2200, 2300, 2400, 4000]  # milliseconds


def test_a_variable_rate_is_sampled_by_time(tmp_path: Path):
    video = read(videos.write(tmp_path / "video.mkv", 11, times=UNEVEN), exactly(5))
    assert videos.numbers(video.frames) == [0, 4, 5, 9, 10]  # nearest to 0, 1, 2, 3, 4 seconds
    assert video.times == (0.0, 0.4, 2.0, 2.4, 4.0)


def test_a_variable_rate_counts_frames_by_the_real_duration(tmp_path: Path):
    # The container says 10 a second. It lasts 4.1 seconds with its last frame: at 2 a second that makes 8.
    video = read(videos.write(tmp_path / "video.mkv", 11, times=UNEVEN), per_second(2))
    assert len(video.times) == 8
    assert video.source_fps == pytest.approx(11 / 4.1)


def test_the_last_frame_is_picked_when_it_begins(tmp_path: Path):
    video = read(videos.write(tmp_path / "video.mkv", 3, times=[0, 20, 1000]), exactly(3))
    assert videos.numbers(video.frames) == [0, 1, 2]  # the video's middle, 0.5 seconds, is nearer to 0.02 than to 1


def test_times_are_counted_from_the_first_frame(tmp_path: Path):
    late = [5000 + time for time in UNEVEN]
    video = read(videos.write(tmp_path / "video.mkv", 11, times=late), exactly(5))
    assert video.times == pytest.approx((0.0, 0.4, 2.0, 2.4, 4.0))


def test_a_frame_shown_for_long_may_be_picked_twice(tmp_path: Path):
    video = read(videos.write(tmp_path / "video.mkv", 3, times=[0, 100, 3000]), exactly(4))
    assert videos.numbers(video.frames) == [0, 1, 2, 2]
    assert video.times == (0.0, 0.1, 3.0, 3.0)


# --- how frames look ---


@pytest.mark.parametrize(
    "turned, expected",
    [
        ((0,), [250, 170, 90, 10]),
        ((90,), [170, 10, 250, 90]),
        ((180,), [10, 90, 170, 250]),
        ((-90,), [90, 250, 10, 170]),
        ((0, True), [170, 250, 10, 90]),
        ((0, False, True), [90, 10, 250, 170]),
        ((-90, True), [250, 90, 170, 10]),
    ],
)
def test_frames_are_upright(tmp_path: Path, turned: tuple, expected: list[int]):
    video = read(videos.write(tmp_path / "video.mp4", [videos.quadrants()] * 3, turned=turned))
    assert videos.corners(video.frames[1]) == expected
    assert video.size == video.frames.shape[1:3] == ((64, 48) if abs(turned[0]) == 90 else (48, 64))


def test_a_frame_whose_side_data_cannot_be_named_is_turned_by_its_angle():
    class Unnamed:
        def __getitem__(self, name: str):
            raise ValueError(name)

    frame = SimpleNamespace(
        format=SimpleNamespace(has_palette=False, components=()),
        to_ndarray=lambda format: videos.quadrants(),
        side_data=Unnamed(),
        rotation=-90,
    )
    assert videos.corners(upright_rgb(frame)) == [90, 250, 10, 170]


def see_through() -> np.ndarray:
    """(48, 64, 4) uint8: black, the right half transparent."""
    frame = np.zeros((48, 64, 4), np.uint8)
    frame[:, :32, 3] = 255
    return frame


def test_a_transparent_webm_is_put_on_white(tmp_path: Path):
    options = {"auto-alt-ref": "0"}
    path = tmp_path / "video.webm"
    videos.write(path, [see_through()] * 4, codec="libvpx-vp9", pixels="yuva420p", options=options)
    frame = read(path).frames[2]
    assert frame[:, :24].max() < 20
    assert frame[:, 40:].min() > 235


def test_a_transparent_gif_is_put_on_white(tmp_path: Path):
    pictures = [Image.fromarray(see_through()), Image.fromarray(see_through()[:, ::-1].copy())]
    pictures[0].save(tmp_path / "video.gif", save_all=True, append_images=pictures[1:], duration=100, disposal=2)
    first, second = read(tmp_path / "video.gif").frames
    assert (first[0, 0].tolist(), first[0, -1].tolist()) == ([0] * 3, [255] * 3)
    assert (second[0, 0].tolist(), second[0, -1].tolist()) == ([255] * 3, [0] * 3)


@pytest.mark.parametrize(
    "codec, pixels, ending",
    [
        ("ffv1", "yuv420p10le", "mkv"),
        ("ffv1", "yuv444p", "mkv"),
        ("ffv1", "gray", "mkv"),
        ("ffv1", "gray16le", "mkv"),
        ("ffv1", "gbrp16le", "mkv"),
        ("png", "rgba", "mov"),
        ("qtrle", "rgb24", "mov"),
    ],
)
def test_any_pixel_format_becomes_rgb(tmp_path: Path, codec: str, pixels: str, ending: str):
    video = read(videos.write(tmp_path / f"video.{ending}", 5, codec=codec, pixels=pixels))
    assert videos.numbers(video.frames) == list(range(5))
    assert video.frames.max() >= 250 and video.frames.min() <= 5


def test_odd_sizes_are_read(tmp_path: Path):
    pictures = [videos.numbered(i, 31, 45) for i in range(3)]
    video = read(videos.write(tmp_path / "video.mp4", pictures, codec="mpeg4"))
    assert video.frames.shape == (3, 31, 45, 3)


def test_frames_are_resized_to_the_fit(tmp_path: Path):
    asked = []

    def fit(*shape: int) -> tuple[int, int]:
        asked.append(shape)
        return 32, 96

    path = videos.write(tmp_path / "video.mp4", 31)
    video = read_video(path, per_second(2), fit)
    assert asked == [(6, 48, 64)]
    assert video.size == (48, 64)
    assert np.array_equal(video.frames, [resize(frame, (32, 96)) for frame in read(path, per_second(2)).frames])


def test_resize_is_bicubic_with_antialiasing():
    pixels = videos.numbered(0b10110010)
    expected = Image.fromarray(pixels).resize((20, 30), Image.Resampling.BICUBIC)
    assert np.array_equal(resize(pixels, (30, 20)), np.asarray(expected))


def test_resize_to_the_same_size_is_the_identity():
    pixels = videos.numbered(3)
    assert resize(pixels, (48, 64)) is pixels


# --- frames without a container ---


def folder_of(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.fromarray(videos.numbered(i)).save(folder / f"Frame{i}.png")
    return folder


def test_a_folder_is_read_in_natural_order(tmp_path: Path):
    video = read(folder_of(tmp_path / "frames", 12), source_fps=5)
    assert videos.numbers(video.frames) == list(range(12))
    assert video.times == tuple(i / 5.0 for i in range(12))
    assert (video.size, video.total, video.source_fps) == ((48, 64), 12, 5.0)


def test_hidden_files_of_a_folder_are_left_out(tmp_path: Path):
    folder = folder_of(tmp_path / "frames", 3)
    (folder / ".DS_Store").write_bytes(b"\0" * 100)
    assert read(folder, source_fps=5).total == 3


def test_a_list_may_hold_anything_that_is_an_image(tmp_path: Path):
    buffer = BytesIO()
    Image.fromarray(videos.numbered(1)).save(buffer, "png")
    Image.fromarray(videos.numbered(2)).save(tmp_path / "two.png")
    frames = [videos.numbered(0), buffer.getvalue(), tmp_path / "two.png", Image.fromarray(videos.numbered(3))]
    assert videos.numbers(read(frames, source_fps=1).frames) == [0, 1, 2, 3]
    assert videos.numbers(read(tuple(frames), source_fps=1).frames) == [0, 1, 2, 3]


def test_an_array_is_sampled_and_resized():
    frames = np.stack([videos.numbered(i) for i in range(31)])
    video = read_video(frames, per_second(2), lambda *_: (24, 32), source_fps=10)
    assert videos.numbers(video.frames) == [0, 6, 12, 18, 24, 30]
    assert video.frames.shape == (6, 24, 32, 3)
    assert video.times == (0.0, 0.6, 1.2, 1.8, 2.4, 3.0)


def test_the_video_does_not_share_the_arrays_memory():
    frames = np.zeros((2, 48, 64, 3), np.uint8)
    video = read(frames, source_fps=10)
    frames[:] = 255
    assert video.frames.max() == 0
