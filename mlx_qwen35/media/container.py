"""A video file, through PyAV: which frames it has, when each is shown, and the decoded frames.

A damaged file is refused: the decoder stops at its first error, and the container's counts must agree with the frames.
"""

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.memory import check_decoding_fits
from mlx_qwen35.media.container_check import find_damage
from mlx_qwen35.media.frames import Timeline, too_short
from mlx_qwen35.media.image import read_image
from mlx_qwen35.media.image_file import MAX_PIXELS
from mlx_qwen35.media.signatures import HEAD, IMAGES, identify

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

FORMATS = "mp4, mov, webm, mkv or gif"
# What may be opened, by FFmpeg's names. FFmpeg knows many more: some read text as a film, some lead to other addresses.
_DEMUXERS = "mov,matroska,gif,avi,mpegts,mpeg,flv,asf,ogg,mp3,wav,flac,aac"
_STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}
_CONTAINER_OPTIONS = _STRICT | {"format_whitelist": _DEMUXERS}
_DECODER_OPTIONS = _STRICT | {"max_pixels": str(MAX_PIXELS)}
_THREADS = 4  # each holds frames of its own
_FRAME_BYTES = 32  # a pixel, of all frames held at a time; measured with H.264, VP9, FFV1, PNG and GIF: 17 to 29
# FFmpeg's own decoders of VP8 and VP9 leave the transparency out.
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_SLACK = 0.5  # seconds that a container's duration may be off; a cut that costs less shows in the structure

_Span = tuple[float, float]  # seconds, from and to


@dataclass(frozen=True)
class Packets:
    """What the packets say of the frames, without decoding. Times in seconds; 0 stands for "not said"."""

    declared: int  # frames, as the container says
    times: list[float | None]  # when each packet's frame is shown, in the order of the file
    last: float  # how long the last frame is shown
    rate: float  # frames a second, as the container says
    exact: bool  # each packet holds one frame
    read: int  # packets of all streams


@dataclass(frozen=True)
class VideoFile:
    """An open file, in memory or on disk; `name` begins messages. Each method reads it from its start, and raises
    InputError for a damaged one, and for one whose frames do not fit into memory_limit, see read_image."""

    name: str
    data: BinaryIO
    memory_limit: int | None

    def timeline(self) -> Timeline:
        """The frames and their times: of the packets if the container declares as many, else of all decoded frames."""
        packets = self.packets()
        damage = find_damage(self.data, packets.read)
        if damage is not None:
            raise self.broken(len(packets.times), packets.declared, damage)
        times = packets.times
        if len(times) != packets.declared:
            times = [frame.time for frame in self.frames(packets.declared)]
            if packets.exact and len(times) < len(packets.times):
                raise self.broken(len(times), len(packets.times), "the rest cannot be decoded")
        if not times and packets.declared:
            raise self.broken(0, packets.declared, "none can be read")
        if len(times) < 2:
            raise too_short(self.name, len(times))
        return self._timeline(times, packets)

    def frames(self, total: int) -> Iterator["VideoFrame"]:
        """Decode all frames, in the order they are shown. `total`: how many there should be, 0 for unknown."""
        from av.error import FFmpegError

        done = 0
        with self._open() as (container, stream):
            decoder = _decoder(stream)
            try:
                for packet in container.demux(stream):
                    if packet.is_corrupt:
                        raise self.broken(done, total, "the file ends, or is damaged, within a frame")
                    for frame in decoder.decode(packet):
                        if frame.is_corrupt:
                            raise self.broken(done, total, "the next frame is damaged")
                        yield frame
                        done += 1
            except FFmpegError as error:
                raise self.broken(done, total, error.strerror) from error

    def broken(self, done: int, total: int, reason: str | None) -> InputError:
        of = f"{done} of {total} frames" if total else f"{done} frame{'' if done == 1 else 's'}"
        return InputError(
            "media_damaged", f"{self.name} must be whole; it breaks after {of}: {reason}. Copy or download it again"
        )

    # --- the container ---

    @contextmanager
    def _open(self) -> Iterator[tuple["InputContainer", "VideoStream"]]:
        import av

        self.data.seek(0)
        kind = identify(self.data.read(HEAD))
        self.data.seek(0)
        if kind in IMAGES and kind != "GIF":
            raise InputError("media_type_wrong", f"{self.name} must be {FORMATS}; it is a {kind}. Give it as an image")
        file = _Input(self.data)  # not a path: FFmpeg would take some names for addresses
        try:
            container = av.open(file, "r", container_options=_CONTAINER_OPTIONS, metadata_errors="replace")
        except av.FFmpegError as error:
            rule = f"{FORMATS}; it is {kind}. Give the file of the video itself"
            if kind == "GIF" or kind.startswith("a video ("):
                rule = f"whole; it begins as {kind}, and its header or index is damaged. Copy or download it again"
            raise InputError("media_not_opened", f"{self.name} must be {rule}") from error
        with container:
            yield container, self._stream(container)

    def _stream(self, container: "InputContainer") -> "VideoStream":
        from av.stream import Disposition

        cover = Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            what = "sound alone" if container.streams.audio else "neither frames nor sound"
            raise InputError("video_stream_missing", f"{self.name} must be a video; it holds {what}. Give another file")
        codec = streams[0].codec_context
        if codec is None:
            raise InputError("video_unsupported", f"{self.name} must be decodable by FFmpeg. Convert it to mp4")
        if codec.width * codec.height > MAX_PIXELS:
            size = f"{codec.width} x {codec.height}"
            raise InputError(
                "media_too_large", f"{self.name} must have at most {MAX_PIXELS:,} pixels a frame, and has {size}"
            )
        needed = _FRAME_BYTES * codec.width * codec.height
        check_decoding_fits(self.name, codec.width, codec.height, needed, self.memory_limit)
        return streams[0]

    # --- time ---

    def packets(self) -> Packets:
        """Look at all packets, and refuse a file that ends before its container says."""
        from av.error import FFmpegError

        spans: list[_Span | None] = []
        reached, read = 0.0, 0  # by all streams: a file that is cut off ends early in each
        with self._open() as (container, stream):
            try:
                for packet in container.demux():
                    span = _span(packet)
                    read += span is not None
                    reached = max(reached, span[1]) if span else reached
                    if packet.stream_index == stream.index and packet.size and not packet.is_discard:
                        spans.append(span)
            except FFmpegError as error:
                raise self.broken(len(spans), stream.frames, error.strerror) from error
            known = [span for span in spans if span]
            self._check_end(container, stream, known, reached)
            times = [span[0] if span else None for span in spans]
            last = max(known, default=(0.0, 0.0))
            # VP8 has packets with frames that are never shown; other containers have packets with halves of a frame.
            exact = container.format.name.startswith(("mov", "matroska", "gif")) and stream.codec_context.name != "vp8"
            return Packets(stream.frames, times, last[1] - last[0], float(stream.average_rate or 0), exact, read)

    def _check_end(
        self, container: "InputContainer", stream: "VideoStream", spans: list[_Span], reached: float
    ) -> None:
        """Refuse a file that ends clearly before its container says: it was cut off between two frames."""
        if not spans:
            return
        starts = np.sort([start for start, _ in spans])
        ends = max(end for _, end in spans)
        unsaid = np.diff(starts).max(initial=0) if ends == starts[-1] else 0  # the last frame's duration
        there, said = ends - starts[0], float((stream.duration or 0) * (stream.time_base or 0))
        if stream.duration is None:
            there, said = reached, (container.duration or 0) / 1e6  # microseconds, of the longest stream
        if there + unsaid + _SLACK < said:
            raise self.broken(len(spans), stream.frames, f"it ends at {there:.1f} of {said:.1f} seconds")

    def _timeline(self, times: list[float | None], packets: Packets) -> Timeline:
        total, rate = len(times), packets.rate
        known = np.array([time for time in times if time is not None])
        seconds = np.sort(known) - known.min() if len(known) == total else np.zeros(0)
        if rate and (not len(seconds) or np.all(np.abs(seconds * rate - np.arange(total)) <= 0.5)):
            return Timeline(total, rate, None)
        if not len(seconds) or not seconds[-1]:
            raise InputError("video_unsupported", f"{self.name} must say when its frames are shown. Convert it to mp4")
        last = packets.last or seconds[-1] / (total - 1)
        return Timeline(total, float(total / (seconds[-1] + last)), seconds)


class _Input:
    """A file as PyAV reads it: seeking before its start is an error code, which FFmpeg expects, and no exception."""

    def __init__(self, file: BinaryIO):
        self.read, self.tell, self._seek = file.read, file.tell, file.seek

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._seek(offset, whence)
        except (OSError, ValueError):
            return -errno.EINVAL


def _span(packet: "Packet") -> _Span | None:
    """From when to when a packet's frame is shown; None if that is not said, and for the empty packet at the end."""
    if packet.pts is None:
        return None
    return float(packet.pts * packet.time_base), float((packet.pts + (packet.duration or 0)) * packet.time_base)


def _decoder(stream: "VideoStream") -> "VideoCodecContext":
    """A decoder that stops at the first error."""
    from av.video.codeccontext import VideoCodecContext

    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in _WITH_ALPHA:
        created = VideoCodecContext.create(_WITH_ALPHA[decoder.name], "r")
        assert isinstance(created, VideoCodecContext)
        decoder = created
    decoder.options = dict(_DECODER_OPTIONS)
    decoder.thread_type = "AUTO"  # not "SLICE": threads within a frame switch off what finds damage in H.264
    decoder.thread_count = min(_THREADS, os.cpu_count() or 1)
    return decoder


# --- a frame ---


def upright_rgb(frame: "VideoFrame") -> np.ndarray:
    """A frame of any pixel format -> (H, W, 3) uint8 RGB, upright, transparency on white."""
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        pixels = read_image(frame.to_ndarray(format="rgba"))
    else:
        pixels = frame.to_ndarray(format="rgb24")
    a, b, c, d = _display_matrix(frame)
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    pixels = pixels[:, ::-1] if a < 0 else pixels
    return pixels[::-1] if d < 0 else pixels


def _display_matrix(frame: "VideoFrame") -> tuple[float, float, float, float]:
    """(a, b, c, d): the pixel at x, y (rightwards, downwards) is shown at a x + c y, b x + d y."""
    try:
        data = frame.side_data["DISPLAYMATRIX"]  # type: ignore[typeddict-item]  # PyAV types a few of its keys
    except KeyError:
        return 1, 0, 0, 1
    except ValueError:  # PyAV has no name for another piece of this frame's side data; it still knows the angle
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
    return a, b, c, d
