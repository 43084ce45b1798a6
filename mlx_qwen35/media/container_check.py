"""A check of the outer structure of a video file: its boxes, elements or blocks end where the next one begins.

FFmpeg silently skips damage and takes the end of a file for the end of the video, so that frames are missing. Here only
lengths are followed; FFmpeg reads the contents.
"""

import struct
from collections.abc import Callable
from typing import BinaryIO

_BOXES = set(b"ftyp styp moov moof mdat mfra sidx free skip wide uuid udta meta pnot emsg prft".split())

_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
# In a segment: seek head, info, tracks, cues, attachments, chapters, tags. In a cluster: timestamp, silent tracks,
# position, previous size, simple block, block group, encrypted block. In both: void, CRC-32.
_IN_SEGMENT = {0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367}
_IN_CLUSTER = {0xE7, 0x5854, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF}
_ELEMENTS = _IN_SEGMENT | _IN_CLUSTER | {0xEC, 0xBF}
_BLOCKS = {0xA3, 0xA0, 0xAF}  # each holds a packet, or several


class _Damage(Exception):
    """Its message says where."""


class _Reader:
    """A position in a file. Going or reading past the file's end raises _Damage."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.at = file, file.seek(0, 2), 0

    def need(self, end: int) -> None:
        if end > self.size:
            raise _Damage(f"the file has {self.size:,} bytes and should have {end:,} or more")

    def go(self, at: int) -> None:
        self.need(at)
        self.at = at

    def take(self, count: int) -> bytes:
        start = self.at
        self.go(start + count)
        self.file.seek(start)
        return self.file.read(count)

    def byte(self) -> int:
        return self.take(1)[0]


def find_damage(file: BinaryIO, packets: int) -> str | None:
    """Follow the structure of an mp4, mov, mkv, webm, avi or gif file. Other files pass.

    `packets`: how many FFmpeg has read, of all streams. Returns the damage, for a message; None if there is none.
    """
    reader = _Reader(file)
    file.seek(0)
    walk = _walk_for(file.read(12))
    try:
        blocks = walk(reader) if walk else 0
    except _Damage as damage:
        return str(damage)
    return f"of {blocks} blocks {packets} can be read" if packets < blocks else None


def _walk_for(head: bytes) -> Callable[[_Reader], int] | None:
    """The function for this kind of file. It raises _Damage, or returns the least number of packets."""
    if head[4:8] in _BOXES:
        return _boxes
    if head[:4] == _EBML.to_bytes(4):
        return _elements
    if head[:4] == b"GIF8":
        return _gif
    return _riff if head[:4] == b"RIFF" else None


def _boxes(reader: _Reader) -> int:
    """ISO base media (mp4, mov): length (4 bytes, or 8 after the type), type, content; 0 is a length to the end."""
    while reader.size - reader.at >= 8:
        start = reader.at
        length, kind = struct.unpack(">I4s", reader.take(8))
        if kind not in _BOXES or length == 0:  # padding behind the last box is common
            return 0
        if length == 1:
            (length,) = struct.unpack(">Q", reader.take(8))
        if length < 8:
            raise _Damage(f"the length of the part at byte {start:,} is damaged")
        reader.go(start + length)
    return 0


def _riff(reader: _Reader) -> int:
    """AVI: one outer chunk, then perhaps more."""
    (length,) = struct.unpack("<I", reader.take(8)[4:])
    reader.go(8 + length)
    return 0


def _gif(reader: _Reader) -> int:
    """GIF: a screen, then extensions (0x21) and images (0x2C), each in chunks of up to 255 bytes, then 0x3B."""
    _colours(reader, reader.take(13)[10])
    while (kind := reader.byte()) != 0x3B:
        if kind == 0x21:
            reader.byte()
        elif kind == 0x2C:
            _colours(reader, reader.take(9)[8])
            reader.byte()
        else:
            raise _Damage(f"the block at byte {reader.at - 1:,} is damaged")
        while length := reader.byte():
            reader.go(reader.at + length)
    return 0


def _colours(reader: _Reader, flags: int) -> None:
    if flags & 0x80:
        reader.go(reader.at + (6 << (flags & 7)))


def _elements(reader: _Reader) -> int:
    """EBML (mkv, webm): elements of a segment and its clusters in one row, each with an id and a length."""
    while True:
        kind, length = _number(reader, keep_marker=True), _number(reader)
        if kind == _SEGMENT:
            break
        reader.go(reader.at + (length or 0))
    end = reader.size
    if length is not None:
        end = reader.at + length
        reader.need(end)
    blocks, inside = 0, end  # the end of the present cluster, or of the segment
    while reader.at < end:
        start = reader.at
        inside = end if start >= inside else inside
        kind, length = _number(reader, keep_marker=True), _number(reader)
        if kind == _CLUSTER:
            inside = end if length is None else reader.at + length
            reader.need(inside)
        elif kind in _ELEMENTS and length is not None:
            reader.go(reader.at + length)
            blocks += kind in _BLOCKS
        else:
            raise _Damage(f"the element at byte {start:,} is damaged")
        if max(reader.at, inside) > (end if kind == _CLUSTER else inside):
            raise _Damage(f"the element at byte {start:,} is too long")
    return blocks


def _number(reader: _Reader, keep_marker: bool = False) -> int | None:
    """A number of 1 to 8 bytes: the zeros before its first 1 say how many follow. None: all ones, length unknown."""
    first = reader.byte()
    if not first:
        raise _Damage(f"the element at byte {reader.at - 1:,} is damaged")
    more = 8 - first.bit_length()
    value = int.from_bytes(bytes([first]) + reader.take(more))
    if keep_marker:
        return value
    value &= (1 << 7 * (more + 1)) - 1
    return None if value == (1 << 7 * (more + 1)) - 1 else value
