"""Videos that are refused: damaged ones, of which nothing may be used, and what is no video. One message each."""

import random
import struct
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
from media import videos
from PIL import Image
from refusing import refused

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.container import Packets, VideoFile
from mlx_qwen35.media.container_check import find_damage
from mlx_qwen35.media.frames import FrameSampling, Video
from mlx_qwen35.media.video import read_video

TWO_A_SECOND = FrameSampling(2, None, 2, 768)
FIRST = {"movflags": "faststart"}  # the index before the frames, as in files made for the web


def read(source, **options) -> Video:
    return read_video(source, TWO_A_SECOND, lambda frames, height, width: (height, width), **options)


def noisy(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Frames that no encoder makes small, so that damage falls into frames and not between them."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(noise).resize((width * 2, height * 2)))
    return [pixels[i : i + height, 2 * i : 2 * i + width].copy() for i in np.arange(count) % (width // 2)]


def data_of(kind: str, frames: int | list = 31, codec: str = "libx264", pixels: str = "yuv420p", **options) -> bytes:
    with TemporaryDirectory() as folder:  # some containers are written in two passes
        path = Path(folder, "video")
        return videos.write(path, frames, codec=codec, pixels=pixels, kind=kind, **options).read_bytes()


def gif() -> bytes:
    return data_of("gif", codec="gif", pixels="rgb8")


def webm() -> bytes:
    return data_of("webm", codec="libvpx-vp9")


def data_with_places(kind: str, frames: int | list, **options) -> tuple[bytearray, list[int]]:
    """A video, and where in it FFmpeg finds each packet."""
    av = pytest.importorskip("av")
    data = data_of(kind, frames, **options)
    with av.open(BytesIO(data)) as file:
        return bytearray(data), [packet.pos for packet in file.demux() if packet.size]


# --- cut short ---


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8, 0.97, 0.999])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: data_of("mp4", container=FIRST), id="mp4, index first"),
        pytest.param(lambda: data_of("mp4"), id="mp4, index last"),
        pytest.param(lambda: data_of("matroska"), id="mkv"),
        pytest.param(lambda: data_of("matroska", container={"live": "1"}), id="mkv without lengths"),
        pytest.param(webm, id="webm"),
        pytest.param(gif, id="gif"),
        pytest.param(lambda: data_of("avi", codec="mpeg4"), id="avi"),
    ],
)
def test_a_file_that_is_cut_short_is_refused(data, part: float):
    whole = data()
    read(whole)
    with pytest.raises(InputError) as caught:
        read(whole[: int(len(whole) * part)])
    assert caught.value.code in ("media_damaged", "media_not_opened")


def test_a_cut_within_a_frame_says_where():
    whole = data_of("mp4", noisy(31), container=FIRST)
    with refused("media_damaged", "31", "3.1"):
        read(whole[: len(whole) // 2])


def test_a_cut_between_two_frames_is_found_by_the_length():
    whole, places = data_with_places("matroska", noisy(31))
    with refused("media_damaged", "20", "3.1"):
        read(bytes(whole[: whole.rindex(b"\xa3", 0, places[20])]))


def test_a_cut_that_loses_little_is_found_by_the_structure():
    whole = data_of("mp4", container=FIRST)
    with refused("media_damaged", f"{len(whole) - 1:,}", f"{len(whole):,}"):
        read(whole[:-1])


def test_a_stream_that_ends_before_its_duration_is_refused():
    whole = data_of("matroska")
    at = whole.index(b"\x44\x89\x88") + 3  # the duration, a float64 of milliseconds
    assert struct.unpack(">d", whole[at : at + 8]) == (3100.0,)
    with refused("media_damaged", "31", "3.1", "4.0"):
        read(whole[:at] + struct.pack(">d", 4000.0) + whole[at + 8 :])


# --- damaged ---


def test_damage_in_a_frame_says_after_how_many():
    whole = bytearray(data_of("mp4", noisy(120), codec="mpeg4"))
    whole[len(whole) // 2 : len(whole) // 2 + 200] = bytes(200)
    with refused("media_damaged", "120"):
        read(bytes(whole))


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_damage_within_frames_is_found(codec: str):
    whole = data_of("mp4", noisy(12, 480, 640), codec=codec)
    rng, refused = random.Random(1), 0
    for _ in range(12):
        place = rng.randrange(len(whole) // 4, len(whole) * 3 // 4)
        try:
            read(whole[:place] + bytes(64) + whole[place + 64 :])
        except InputError as error:
            assert error.code == "media_damaged"
            refused += 1
    assert refused >= 11  # bytes may also change into others that mean something


def test_the_decoder_is_asked_to_stop_at_an_error():
    # Without that FFmpeg's decoder of JPEG paints over what it cannot read, and says nothing.
    whole, places = data_with_places("mov", noisy(9, 240, 320), codec="mjpeg", pixels="yuvj420p")
    middle = (places[4] + places[5]) // 2
    whole[middle : middle + 64] = random.Random(0).randbytes(64)
    with refused("media_damaged", "9"):
        read(bytes(whole))


class StandIn(VideoFile):
    """A file whose `data` are packets: (is_corrupt, its frames' is_corrupt)."""

    @contextmanager
    def _open(self):
        packets = [
            Namespace(is_corrupt=corrupt, frames=[Namespace(is_corrupt=frame) for frame in frames])
            for corrupt, frames in self.data
        ]
        decoder = Namespace(name="h264", decode=lambda packet: packet.frames)
        yield Namespace(demux=lambda stream: packets), Namespace(metadata={}, codec_context=decoder)


def test_a_packet_marked_as_corrupt_is_refused():
    frames = StandIn("the video", [(False, [False]), (True, [False])], 1 << 40).frames(9)
    next(frames)
    with refused("media_damaged", "1", "9"):
        next(frames)


def test_a_frame_marked_as_corrupt_is_refused():
    frames = StandIn("the video", [(False, [False, True])], 1 << 40).frames(0)
    next(frames)
    with refused("media_damaged", "1"):
        next(frames)


@pytest.mark.parametrize("kind", ["mp4", "matroska"])  # with a frame count, and without
def test_fewer_frames_than_counted_are_refused(monkeypatch: pytest.MonkeyPatch, kind: str):
    data, frames = data_of(kind), VideoFile.frames
    monkeypatch.setattr(VideoFile, "frames", lambda *call: islice(frames(*call), 30))
    with refused("media_damaged", "30", "31"):
        read(data)


def test_a_block_that_ffmpeg_skips_is_missed():
    whole, places = data_with_places("matroska", 31, container={"live": "1"})
    whole[places[20] + 3] |= 0x06  # the block says that it holds several frames, and does not
    with refused("media_damaged", "31"):
        read(bytes(whole))


def test_an_element_of_a_kind_that_is_not_known_is_refused():
    whole, places = data_with_places("matroska", 31, container={"live": "1"})
    place = whole.rindex(b"\xa3", 0, places[20])
    whole[place] = 0xA9
    with refused("media_damaged", f"{place:,}"):
        read(bytes(whole))


def test_a_gif_without_its_end_is_refused():
    with refused("media_damaged", "31"):
        read(gif()[:-1])


def test_damage_between_the_pictures_of_a_gif_is_refused():
    whole = bytearray(gif())
    place = whole.rindex(b"\x21\xf9\x04")
    whole[place] = 0x55
    with refused("media_damaged"):
        read(bytes(whole))


@pytest.mark.parametrize("data", [lambda: data_of("mp4"), webm, gif, lambda: data_of("avi", codec="mpeg4")])
def test_bytes_behind_the_end_do_no_harm(data):
    content = data()
    assert np.array_equal(read(content + bytes(100)).frames, read(content).frames)


# --- structure ---


def element(kind: int, content: bytes) -> bytes:
    return kind.to_bytes((kind.bit_length() + 7) // 8) + (len(content) | 1 << 28).to_bytes(4) + content


HEADER = element(0x1A45DFA3, b"1234")
BLOCK = element(0xA3, b"12345678")


def segment(content: bytes, length: bytes = b"\x01" + b"\xff" * 7) -> bytes:
    return HEADER + b"\x18\x53\x80\x67" + length + content


@pytest.mark.parametrize(
    "data, expected",
    [
        pytest.param(segment(element(0x1F43B675, BLOCK + BLOCK)), None, id="as many packets as blocks"),
        pytest.param(segment(element(0x1F43B675, BLOCK * 3)), "of 3 blocks 2 can be read", id="fewer packets"),
        pytest.param(segment(b"\x1f\x43\xb6\x75\xff" + BLOCK), None, id="cluster of unknown length"),
        pytest.param(segment(element(0x1F43B675, BLOCK)[:-1]), "bytes and should have", id="cut in a cluster"),
        pytest.param(segment(BLOCK[:-1]), "bytes and should have", id="cut in a block"),
        pytest.param(segment(BLOCK, b"\xa0"), "bytes and should have", id="segment longer than the file"),
        pytest.param(segment(element(0x1F43B675, BLOCK[:-1]) + b"8"), "is too long", id="too long for its cluster"),
        pytest.param(segment(BLOCK, b"\x85"), "is too long", id="block longer than its segment"),
        pytest.param(segment(b"\0"), "is damaged", id="no element"),
        pytest.param(segment(element(0xA9, b"1")), "is damaged", id="unknown element"),
        pytest.param(b"\0\0\0\x08ftyp\0\0\0\x00mdat123456789", None, id="box to the end"),
        pytest.param(b"\0\0\0\x08ftyp\0\0\0\x01mdat\0\0\0\0\0\0\0\x12ab", None, id="box with a long length"),
        pytest.param(b"\0\0\0\x08ftyp\0\0\0\x01mdat\0\0\0\0\0\0\0\x13ab", "has 26 bytes", id="long box cut"),
        pytest.param(b"\0\0\0\x08ftyp\0\0\0\x07mdat", "part at byte 8 is damaged", id="box without room"),
        pytest.param(b"RIFF\x05\0\0\0AVI 1", None, id="chunk"),
        pytest.param(b"RIFF\x06\0\0\0AVI 1", "has 13 bytes and should have 14", id="chunk cut"),
        pytest.param(b"something else", None, id="a container of which nothing is known"),
    ],
)
def test_structure(data: bytes, expected: str | None):
    found = find_damage(BytesIO(data), packets=2)
    assert found is None if expected is None else expected in found


# --- no video ---


def pictured(kind: str) -> bytes:
    buffer = BytesIO()
    Image.fromarray(videos.quadrants()).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF"])
def test_a_picture_should_be_given_as_an_image(kind: str):
    with refused("media_type_wrong", kind):
        read(pictured(kind))


def test_a_big_tiff_should_be_given_as_an_image():
    with refused("media_type_wrong", "TIFF"):
        read(b"II+\0\x08\0\0\0" + bytes(56))


def test_an_iphone_photo_should_be_given_as_an_image(tmp_path: Path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.fromarray(videos.quadrants())).save(tmp_path / "photo.heic")
    with refused("media_type_wrong", "photo.heic"):
        read(tmp_path / "photo.heic")


@pytest.mark.parametrize("kind", ["gif", "mp4"])
def test_one_frame_should_be_given_as_an_image(kind: str):
    data = pictured("GIF") if kind == "gif" else data_of("mp4", 1)
    with refused("video_too_short"):
        read(data)


def test_text_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("Dear diary, é\n" * 200)
    with refused("media_not_opened", "mp4", "notes.txt"):
        read(tmp_path / "notes.txt")


def test_a_list_of_files_is_text_and_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    videos.write(tmp_path / "video.mp4", 3)
    monkeypatch.chdir(tmp_path)
    with refused("media_not_opened"):
        read(b"ffconcat version 1.0\nfile 'video.mp4'\n")


def test_unknown_bytes_are_refused():
    with refused("media_not_opened"):
        read(bytes(range(256)) * 40)


def test_an_empty_file_is_refused(tmp_path: Path):
    (tmp_path / "video.mp4").touch()
    with refused("media_not_opened", "video.mp4"):
        read(tmp_path / "video.mp4")


def test_sound_is_refused(tmp_path: Path):
    with refused("video_stream_missing", "sound.wav"):
        read(videos.write_sound(tmp_path / "sound.wav"))


def test_subtitles_are_refused():
    whole = bytearray(data_of("matroska"))
    place = whole.index(b"\x83\x81\x01")  # the track's type: video
    whole[place + 2] = 0x11  # subtitles
    with refused("video_stream_missing"):
        read(bytes(whole))


def test_a_codec_that_is_not_known_is_refused():
    whole = data_of("matroska")
    with refused("video_unsupported", "mp4"):
        read(whole.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XYZ"))


@pytest.mark.parametrize(
    "declared, code",
    [(0, "video_too_short"), (9, "media_damaged")],
)
def test_a_stream_without_frames_is_refused(monkeypatch: pytest.MonkeyPatch, declared: int, code):
    packets = Packets(declared=declared, times=[], last=0.0, rate=10.0, exact=True, read=0)
    monkeypatch.setattr(VideoFile, "packets", lambda *call: packets)
    monkeypatch.setattr(VideoFile, "frames", lambda *call: iter(()))
    with refused(code):
        read(data_of("mp4", 2))


def test_frames_that_have_no_times_are_refused(monkeypatch: pytest.MonkeyPatch):
    packets = Packets(declared=2, times=[None, None], last=0.0, rate=0.0, exact=True, read=2)
    monkeypatch.setattr(VideoFile, "packets", lambda *call: packets)
    with refused("video_unsupported", "mp4"):
        read(data_of("mp4", 2))


def test_huge_frames_are_refused():
    data = gif()
    with refused("media_too_large", "178,956,970", "20000 x 10000"):
        read(data[:6] + struct.pack("<HH", 20000, 10000) + data[10:])


def test_frames_of_another_size_within_a_file_are_refused(tmp_path: Path):
    av = pytest.importorskip("av")
    path = tmp_path / "video.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        larger = av.CodecContext.create("mjpeg", "w")
        larger.height, larger.width, larger.pix_fmt, larger.time_base = 96, 64, "yuvj420p", Fraction(1, 10)
        for i in range(12):
            picture = videos.numbered(i, 48 if i < 6 else 96)
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuvj420p")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            for packet in (stream if i < 6 else larger).encode(frame):
                packet.stream = stream
                file.mux(packet)
    with refused("video_sizes_differ", "64", "48", "7", "96"):
        read(path)


# --- what does not suit ---


def test_a_missing_file_is_named(tmp_path: Path):
    with refused("media_not_found", "nowhere.mp4"):
        read(tmp_path / "nowhere.mp4")


@pytest.mark.parametrize("path", ["~nobody-of-this-name/video.mp4", "x" * 5000, "a\0b"])
def test_a_path_that_no_system_has_is_missing(path: str):
    with refused("media_not_found"):
        read(path)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(folder: Path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with refused("media_unreadable"):
        read(tmp_path, source_fps=1)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = videos.write(tmp_path / "video.mp4", 3)

    def refuse(*call, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with refused("media_unreadable", "video.mp4"):
        read(path)


def test_a_source_of_another_type_is_refused():
    with refused("media_source_invalid"):
        read(Image.new("RGB", (4, 4)))


def test_a_rate_for_a_file_is_refused():
    with refused("option_no_effect", "source_fps", "30"):
        read(data_of("mp4", 3), source_fps=30)


@pytest.mark.parametrize("frames", [np.zeros((4, 8, 8, 3), np.uint8), [np.zeros((8, 8, 3), np.uint8)] * 4])
def test_frames_without_a_rate_are_refused(frames):
    with refused("option_missing"):
        read(frames)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), "24"])
def test_a_rate_that_is_no_rate_is_refused(rate):
    with refused("option_invalid", "source_fps", "0"):
        read(np.zeros((4, 8, 8, 3), np.uint8), source_fps=rate)


@pytest.mark.parametrize("frames", [[], (), np.zeros((0, 8, 8, 3), np.uint8)])
def test_no_frames_are_refused(frames):
    with refused("video_too_short"):
        read(frames, source_fps=1)


def test_an_empty_folder_is_refused(tmp_path: Path):
    with refused("video_too_short"):
        read(tmp_path, source_fps=1)


def test_one_frame_in_a_list_is_refused():
    with refused("video_too_short"):
        read([np.zeros((8, 8, 3), np.uint8)], source_fps=1)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((4, 8, 8, 4), np.uint8),
        np.zeros((4, 3, 8, 8), np.uint8),
        np.zeros((4, 8, 8, 3), np.float32),
        np.zeros((4, 0, 8, 3), np.uint8),
    ],
)
def test_arrays_of_another_shape_or_type_are_refused(array: np.ndarray):
    with refused("array_invalid", "3", "uint8"):
        read(array, source_fps=1)


def test_frames_of_different_sizes_are_refused():
    frames = [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8), np.zeros((8, 10, 3), np.uint8)]
    with refused("video_sizes_differ", "8", "3", "10"):
        read(frames, source_fps=1)


def test_a_stranger_in_a_folder_is_named(tmp_path: Path):
    for i in range(3):
        Image.fromarray(videos.numbered(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "1a.txt").write_text("notes")
    with refused("media_not_opened", "3", "4", "1a.txt"):
        read(tmp_path, source_fps=1)


def test_a_folder_within_a_folder_of_frames_is_refused(tmp_path: Path):
    (tmp_path / "more").mkdir()
    with refused("media_source_invalid", "1", "2"):
        Image.fromarray(videos.numbered(0)).save(tmp_path / "one.png")
        read(tmp_path, source_fps=1)
