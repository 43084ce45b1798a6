"""A video file, through PyAV: which frames it has and when they are shown, and the frames.

Nothing of a damaged file is passed on: the decoder stops at the first error, and what comes out is compared with what
the container promises.
"""

import codecs
import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.memory import check_decoding_fits
from mlx_qwen35.media.container_check import find_damage
from mlx_qwen35.media.frames import Timeline
from mlx_qwen35.media.image_file import MAX_PIXELS

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
_SLACK = 0.5  # seconds that a container's word on its duration may be off; a cut that costs less shows in the structure

_HEAD = 512  # bytes that tell what a file is
_PICTURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WebP": rb"RIFF.{4}WEBP",
    "BMP": rb"BM.{4}\0{4}",
    "TIFF": rb"II\*\0|MM\0\*",
    "HEIC": rb".{4}ftyp(hei[cxms]|mif1)",
    "AVIF": rb".{4}ftypavif",
}
_CONTAINERS = rb".{4}(ftyp|moov|mdat|wide|free|skip)|\x1aE\xdf\xa3|GIF8|RIFF.{4}AVI |FLV|\0\0\1\xba"

_Span = tuple[float, float]  # seconds, from and to


@dataclass(frozen=True)
class Packets:
    """What a look at the packets, without decoding, says of the frames. Times in seconds; 0 is for "not said"."""

    declared: int  # how many frames the container says it has
    times: list[float | None]  # when each packet's frame is shown, in the order of the file
    last: float  # for how long the last frame is shown
    rate: float  # frames a second, as the container says
    exact: bool  # each packet holds one frame
    read: int  # packets of all streams


@dataclass(frozen=True)
class VideoFile:
    """An open file, in memory or on disk; `name` is what messages call it. Its methods read it from its start, one
    after the other, and raise InputError for a damaged one."""

    name: str
    data: BinaryIO

    def timeline(self) -> Timeline:
        """Count the frames: by their packets where the container says the same number, else by decoding them all."""
        packets = self.packets()
        self._check_structure(packets)
        times = packets.times
        if len(times) != packets.declared:
            times = [frame.time for frame in self.frames(packets.declared)]
            if packets.exact and len(times) < len(packets.times):
                raise self.broken(len(times), len(packets.times), "the rest cannot be decoded")
        if not times and packets.declared:
            raise self.broken(0, packets.declared, "none can be read")
        if not times:
            raise InputError(
                "video_too_short",
                f"a video must have frames; the video stream of {self.name} is empty. Export it again",
            )
        if len(times) == 1:
            raise InputError(
                "video_too_short", f"a video must have at least two frames; {self.name} has one. Give it as an image"
            )
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

    def broken(self, done: int, total: int, reason: str) -> InputError:
        of = f"{done} of {total} frames" if total else f"{done} frame{'' if done == 1 else 's'}"
        return InputError(
            "media_damaged",
            f"a video must be whole; {self.name} breaks after {of}: {reason}. Copy or download it again",
        )

    # --- the container ---

    @contextmanager
    def _open(self) -> Iterator[tuple["InputContainer", "VideoStream"]]:
        import av

        self.data.seek(0)
        head = self.data.read(_HEAD)
        self.data.seek(0)
        self._refuse_picture(head)
        try:
            # The file and not its path: FFmpeg would take some names for addresses.
            container = av.open(_Input(self.data), container_options=_CONTAINER_OPTIONS, metadata_errors="replace")
        except av.FFmpegError as error:
            raise InputError("media_not_opened", self._not_opened(head)) from error
        with container:
            yield container, self._stream(container)

    def _check_structure(self, packets: Packets) -> None:
        damage = find_damage(self.data, packets.read)
        if damage is not None:
            raise self.broken(len(packets.times), packets.declared, damage)

    def _refuse_picture(self, head: bytes) -> None:
        kind = next((name for name, start in _PICTURES.items() if re.match(start, head, re.DOTALL)), None)
        if kind is not None:
            raise InputError(
                "media_type_wrong", f"a video must be {FORMATS}; {self.name} is a {kind} picture. Give it as an image"
            )

    def _not_opened(self, head: bytes) -> str:
        if re.match(_CONTAINERS, head, re.DOTALL):
            return (
                f"a video must be whole; {self.name} begins as one, but its header or its index is damaged or missing. "
                "Copy or download it again"
            )
        what = "is empty" if not head else "is text" if _is_text(head) else "is of no known kind"
        return f"a video must be {FORMATS}; {self.name} {what}. Give the file of the video itself"

    def _stream(self, container: "InputContainer") -> "VideoStream":
        from av.stream import Disposition

        cover = Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            what = "holds sound alone" if container.streams.audio else "holds neither pictures nor sound"
            raise InputError(
                "video_stream_missing", f"a video must have a video stream; {self.name} {what}. Give another file"
            )
        codec = streams[0].codec_context
        if codec is None:
            raise InputError(
                "video_unsupported",
                f"a video must be in a format that FFmpeg decodes; {self.name} is not. Convert it to mp4",
            )
        if codec.width * codec.height > MAX_PIXELS:
            raise InputError(
                "media_too_large",
                f"a frame may have at most {MAX_PIXELS:,} pixels; those of {self.name} have "
                f"{codec.width} x {codec.height}. Make it smaller",
            )
        check_decoding_fits(self.name, codec.width, codec.height, _FRAME_BYTES * codec.width * codec.height)
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
            self._check_end(container, stream, [span for span in spans if span], reached)
            times = [span[0] if span else None for span in spans]
            last = max((span for span in spans if span), default=(0.0, 0.0))
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
        there, said = ends - starts[0], float((stream.duration or 0) * stream.time_base)
        if stream.duration is None:
            there, said = reached, (container.duration or 0) / 1e6  # microseconds, of the longest stream
        if there + unsaid + _SLACK < said:
            raise self.broken(len(spans), stream.frames, f"it ends at {there:.1f} of {said:.1f} seconds")

    def _timeline(self, times: list[float | None], packets: Packets) -> Timeline:
        total, rate = len(times), packets.rate
        seconds = np.zeros(0) if None in times else np.sort(times) - np.min(times)
        if rate and (not len(seconds) or np.all(np.abs(seconds * rate - np.arange(total)) <= 0.5)):
            return Timeline(total, rate, None)
        if not len(seconds) or not seconds[-1]:
            raise InputError(
                "video_unsupported",
                f"a video must say when its frames are shown; {self.name} does not. Convert it to mp4",
            )
        last = packets.last or seconds[-1] / (total - 1)
        return Timeline(total, float(total / (seconds[-1] + last)), seconds)


class _Input:
    """A file as PyAV reads it: a place before its start is an error code, which FFmpeg expects, and no exception."""

    def __init__(self, file: BinaryIO):
        self.read, self.tell, self._seek = file.read, file.tell, file.seek

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._seek(offset, whence)
        except (OSError, ValueError):
            return -errno.EINVAL


def _span(packet: "Packet") -> _Span | None:
    """When a packet's frame is shown, from and to; None where that is not said, and for the empty packet at the end."""
    if packet.pts is None:
        return None
    return float(packet.pts * packet.time_base), float((packet.pts + (packet.duration or 0)) * packet.time_base)


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character >= " " or character.isspace() for character in text)


def _decoder(stream: "VideoStream") -> "VideoCodecContext":
    """A decoder that stops at the first error."""
    from av import CodecContext

    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in _WITH_ALPHA:
        decoder = CodecContext.create(_WITH_ALPHA[decoder.name], "r")
    decoder.options = dict(_DECODER_OPTIONS)
    decoder.thread_type = "AUTO"  # not "SLICE": threads within a frame switch off what finds damage in H.264
    decoder.thread_count = min(_THREADS, os.cpu_count() or 1)
    return decoder
