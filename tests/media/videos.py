"""Small videos for the tests: every frame shows its own number, in bars that survive compression and resizing."""

from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

HEIGHT, WIDTH = 48, 64
BARS = 8  # the bits of a number, the highest on the left


def numbered(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(height, width, 3) uint8: white bars for ones, black for zeros."""
    bits = [number >> (BARS - 1 - bar) & 1 for bar in range(BARS)]
    bar = np.arange(width) * BARS // width
    return np.broadcast_to(np.array(bits, np.uint8)[bar][None, :, None] * 255, (height, width, 3)).copy()


def number_of(frame: np.ndarray) -> int:
    height, width, _ = frame.shape
    middles = [(2 * bar + 1) * width // (2 * BARS) for bar in range(BARS)]
    return int("".join("1" if frame[height // 2, x].mean() > 127 else "0" for x in middles), 2)


def numbers(frames: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in frames]


def quadrants() -> np.ndarray:
    """(48, 64, 3) uint8: grey levels 250 and 170 above, 90 and 10 below."""
    return np.kron(np.array([[250, 170], [90, 10]], np.uint8), np.ones((24, 32), np.uint8))[..., None].repeat(3, axis=2)


def corners(frame: np.ndarray) -> list[int]:
    """The nearest of the four levels at top left, top right, bottom left and bottom right."""
    levels = np.array([10, 90, 170, 250])
    return [int(levels[np.abs(levels - frame[y, x].mean()).argmin()]) for y in (4, -4) for x in (4, -4)]


def write(
    target: Path | BytesIO,
    frames: int | Sequence[np.ndarray] = 31,
    rate: int | Fraction = 10,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    *,
    kind: str | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    turned: tuple | None = None,
) -> Path | BytesIO:
    """Write a video and return `target`.

    frames: that many numbered ones, or (H, W, 3 or 4) uint8 arrays. kind: the container's name for a BytesIO. times:
    milliseconds at which frames are shown. turned: degrees counterclockwise, and whether to mirror after that. Skips
    the test where this build of PyAV lacks the encoder.
    """
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no encoder {codec}")
    pictures = [numbered(i) for i in range(frames)] if isinstance(frames, int) else frames
    name = str(target) if isinstance(target, Path) else target
    with av.open(name, "w", kind, container_options=container) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pixels
        if turned:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV writes no rotation")
            stream.set_display_rotation(*turned)
        for place, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, "rgba" if picture.shape[2] == 4 else "rgb24")
            if times:
                frame.pts, frame.time_base = times[place], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return target


def write_with_sound(target: Path, seconds: float) -> Path:
    """31 numbered frames, 10 a second, and a sound that lasts so long."""
    av = pytest.importorskip("av")
    with av.open(str(target), "w") as file:
        video, audio = file.add_stream("mpeg4", rate=10), file.add_stream("aac", rate=48000)
        video.height, video.width, video.pix_fmt, audio.layout = HEIGHT, WIDTH, "yuv420p", "mono"
        for i in range(31):
            file.mux(video.encode(av.VideoFrame.from_ndarray(numbered(i), "rgb24")))
        for i in range(int(seconds * 48000 / 1024)):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, 1024 * i, Fraction(1, 48000)
            file.mux(audio.encode(frame))
        file.mux(video.encode())
        file.mux(audio.encode())
    return target


def write_sound(target: Path, seconds: float = 1.0) -> Path:
    """A WAV file."""
    import wave

    with wave.open(str(target), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(int(16000 * seconds)))
    return target
