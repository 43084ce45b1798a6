"""What large pictures and videos take, and that they are refused from their headers where memory has no room."""

import gc
import struct
import subprocess
import sys
import textwrap
import zlib
from io import BytesIO

import mlx.core as mx
import numpy as np
import pytest
from media.videos import write
from PIL import Image, ImageFile
from refusing import refused

from mlx_qwen35.media.decoded import resize
from mlx_qwen35.media.frames import FrameSampling
from mlx_qwen35.media.image import read_image, read_resized
from mlx_qwen35.media.video import read_video

SIDE = 3000
MODES = {"1": (1, 0), "L": (8, 0), "I;16": (16, 0), "RGB": (8, 2), "RGBA": (8, 6)}  # bits, and PNG's number of colours
CHANNELS = {0: 1, 2: 3, 6: 4}


def limit(beside: int) -> int:
    """So many bytes beside what other tests have left in memory."""
    gc.collect()
    return mx.get_active_memory() + beside


def black_png(mode: str, side: int) -> bytes:
    """A black square: small as a file, whatever it is as pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bits, colour = MODES[mode]
    rows, packer = bytes(1 + side * bits * CHANNELS[colour] // 8) * 100, zlib.compressobj(1)
    data = b"".join(packer.compress(rows) for _ in range(side // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def small(height: int, width: int) -> tuple[int, int]:
    return 32, 32


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_picture_takes_little_more_than_its_decoded_pixels(tmp_path):
    most = {"1": 3, "L": 3, "I;16": 4, "RGB": 6, "RGBA": 6}  # bytes a pixel
    for mode in most:
        (tmp_path / mode).write_bytes(black_png(mode, SIDE))
    program = f"""
        import re
        from pathlib import Path
        from PIL import Image
        from mlx_qwen35.media import decoded
        from mlx_qwen35.media.image import read_resized

        def most():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

        decoded.EXACT = 1 << 20
        read_resized(Image.new("RGB", (64, 64)), lambda height, width: (32, 32))  # what is loaded once
        before = most()
        for mode in {list(most)}:
            read_resized(mode, lambda height, width: (32, 32))
            print((most() - before) / {SIDE * SIDE})
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    for (mode, limit), taken in zip(most.items(), done.stdout.split(), strict=True):
        assert float(taken) < limit, mode


@pytest.mark.core(2)
@pytest.mark.parametrize("mode", MODES)
def test_a_picture_that_memory_has_no_room_for_is_refused_before_it_is_decoded(mode, monkeypatch):
    body = black_png(mode, 1000)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with refused("media_too_large", "1000 x 1000"):
        read_image(body, memory_limit=limit(900_000))
    with refused("media_too_large", "1000 x 1000"):
        read_resized(body, small, memory_limit=limit(900_000))


def test_the_pixels_that_are_allowed_are_named_and_fit():
    most = limit(7_000_070)
    with refused("media_too_large", "1,000,0", "1100 x 1100"):
        read_image(black_png("RGB", 1100), memory_limit=most)  # 4 bytes a pixel decoded, 3 as an array
    assert read_image(black_png("RGB", 1000), memory_limit=most).shape == (1000, 1000, 3)


def test_a_progressive_jpeg_counts_its_coefficients():
    bodies = []
    for progressive in (False, True):
        file = BytesIO()
        Image.new("RGB", (1000, 1000)).save(file, "JPEG", progressive=progressive)
        bodies.append(file.getvalue())
    read_image(bodies[0], memory_limit=limit(10_000_000))
    with refused("media_too_large", "1000 x 1000"):
        read_image(bodies[1], memory_limit=limit(10_000_000))


def test_a_video_whose_frames_memory_has_no_room_for_is_refused(tmp_path):
    path, sampling = write(tmp_path / "video.mp4", 5), FrameSampling(2, None, 2, 9)
    with refused("media_too_large", "video.mp4"):
        read_video(path, sampling, lambda frames, height, width: (height, width), memory_limit=limit(50_000))


def test_a_frame_that_memory_has_no_room_for_is_refused(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(black_png("RGB", 1000))
    with refused("media_too_large", "frame 1", "1000 x 1000"):
        read_video(tmp_path, FrameSampling(2, None, 2, 9), small, source_fps=1, memory_limit=limit(900_000))


# --- bands change nothing ---


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("size", [(320, 640), (1500, 320), (2048, 1600), (1472, 1024), (3000, 64)])
def test_resizing_in_bands_is_resizing_the_whole(size):
    pixels = noise(1500, 1000)  # several bands
    whole = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
    assert np.array_equal(resize(pixels, size), np.asarray(whole))


def test_a_picture_made_narrower_band_by_band_is_nearly_pillows(monkeypatch):
    monkeypatch.setattr("mlx_qwen35.media.decoded.EXACT", 0)
    y, x = np.mgrid[:900, :700]
    pixels = np.stack([x % 256, y % 256, (x + y) // 10], axis=-1).astype(np.uint8)
    whole = np.asarray(Image.fromarray(pixels).resize((300, 400), Image.Resampling.BICUBIC))
    assert np.abs(resize(pixels, (400, 300)).astype(int) - whole).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_band_stands_upright(orientation):
    pixels = noise(1500, 1000)
    tags = Image.Exif()
    tags[0x0112] = orientation
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=tags, compress_level=0)
    turned = [lambda p: p, lambda p: p[:, ::-1], lambda p: p[::-1, ::-1], lambda p: p[::-1],
              lambda p: p.swapaxes(0, 1), lambda p: np.rot90(p, -1), lambda p: p[::-1, ::-1].swapaxes(0, 1),
              lambda p: np.rot90(p)]  # fmt: skip
    assert np.array_equal(read_image(file.getvalue()), turned[orientation - 1](pixels))


@pytest.mark.parametrize("channels", [1, 4])
def test_bands_of_an_array_are_those_of_the_whole(channels):
    pixels = noise(1500, 1000, channels)
    mode = {1: pixels[..., 0], 4: pixels}[channels]
    assert np.array_equal(read_image(pixels), read_image(Image.fromarray(mode)))
