"""An image file -> Pillow's image of it, not decoded yet. No other module changes Pillow's process-wide settings."""

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.signatures import HEAD, IMAGES, identify

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

MAX_PIXELS = 178_956_970  # Pillow's own limit for an error; a file that says more is taken for a decompression bomb
# What Pillow and its plugins raise for a file that is cut short or damaged, in opening or in decoding it.
DAMAGE = (
    OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, EOFError,
    AssertionError, struct.error, zlib.error,
)  # fmt: skip
_PILLOW = threading.Lock()


def open_image(file: BinaryIO, name: str) -> "ImageFile":
    """Pillow's image of a file, its header read. Needs `strict_pillow`, as every use of the image. Raises InputError if
    the file is no image, breaks at its beginning, is stored in a way that Pillow does not read, or is too large."""
    from PIL import Image
    from pillow_heif import register_heif_opener

    head = file.read(HEAD)
    if not head:
        raise InputError("media_empty", f"an image must not be empty; {name} has no bytes. Copy or download it again")
    if "HEIF" not in Image.OPEN:
        register_heif_opener()
    try:
        file = _without_large_notes(file) if head.startswith(_PNG) else file
        image = Image.open(file, formats=IMAGES)
        if image.format == "PNG":  # its checksums, which the decoder does not look at
            image.verify()
            image = Image.open(file, formats=("PNG",))
            _scale_transparency(image)
        return image
    except Image.DecompressionBombError as error:
        raise InputError("media_too_large", f"{bomb(name)} ({error})") from error
    except DAMAGE as error:
        if (stored := _stored_otherwise(file, head)) is not None:
            raise InputError(
                "image_unsupported", f"Pillow must be able to read {name}; it is {stored}. Save it as PNG or JPEG"
            ) from error
        raise InputError("media_not_opened", _not_opened(head, name)) from error


def bomb(name: str) -> str:
    return f"an image may have at most {MAX_PIXELS:,} pixels (no decompression bombs); {name} has more. Make it smaller"


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Pillow without warnings, without a caller's LOAD_TRUNCATED_IMAGES, and with the kinds of grey TIFF that it can
    unpack and does not know.

    All are settings of the whole process, so one image is decoded at a time, and all are restored.
    """
    from PIL import ImageFile, TiffImagePlugin

    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        added = {key: value for key, value in _grey_tiffs().items() if key not in TiffImagePlugin.OPEN_INFO}
        TiffImagePlugin.OPEN_INFO.update(added)
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before
            for key in added:
                del TiffImagePlugin.OPEN_INFO[key]


def _not_opened(head: bytes, name: str) -> str:
    """The message for a file that Pillow cannot open."""
    kind = identify(head)
    if kind in IMAGES:
        return f"an image must be whole; {name} begins as {kind} and is cut short or damaged. Copy or download it again"
    other = next((other for other in ("a video", "a PDF") if kind.startswith(other)), None)
    hint = f"Give it as {other}" if other else "Give an image, or save it as PNG or JPEG"
    return f"an image must be JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC; {name} is {kind}. {hint}"


# --- TIFF ------------------------------------------------------------------------------------------------------------


def _grey_tiffs() -> dict[tuple, tuple[str, str]]:
    """Entries for TiffImagePlugin.OPEN_INFO: byte order, photometric interpretation (0: zero is white), sample format,
    order of bits, bits a sample, extra samples -> mode and raw mode. Samples of 12 bits have no byte order."""
    packed = {(order, white, 12): ("I;16", "I;12") for order in (b"II", b"MM") for white in (0, 1)}
    packed[b"MM", 0, 16] = ("I;16B", "I;16B")
    return {(order, white, (1,), 1, (bits,), ()): modes for (order, white, bits), modes in packed.items()}


_TIFF_TAGS = (  # name, tag, default
    ("BitsPerSample", 258, 1), ("SampleFormat", 339, 1), ("PhotometricInterpretation", 262, 0), ("Compression", 259, 1),
)  # fmt: skip


def _stored_otherwise(file: BinaryIO, head: bytes) -> str | None:
    """How a file with a whole header stores its image; None for another file, or the usual way of storing."""
    if head.startswith(b"\xff\xd8\xff"):
        bits = _jpeg_bits(file)
        return f"a JPEG of {bits} bits a sample" if bits not in (None, 8) else None
    from PIL.TiffImagePlugin import PREFIXES, ImageFileDirectory_v2

    if not head.startswith(tuple(PREFIXES)):
        return None
    try:
        tags = ImageFileDirectory_v2(head[: 16 if 43 in head[2:4] else 8])
        file.seek(tags.next)
        tags.load(file)
        tags[256], tags[257], tags.get(273) or tags[324]  # width, height, where the strips or tiles are
    except DAMAGE:
        return None
    values = ((name, tags.get(tag, default)) for name, tag, default in _TIFF_TAGS)
    shown = (f"{name} {' '.join(map(str, v if isinstance(v, tuple) else (v,)))}" for name, v in values)
    return f"a TIFF with {', '.join(shown)}"


def _jpeg_bits(file: BinaryIO) -> int | None:
    """The bits of a sample, from the frame header; None without one."""
    file.seek(2)
    while len(marker := file.read(4)) == 4 and marker[0] == 0xFF:
        if 0xC0 <= marker[1] <= 0xCF and marker[1] not in (0xC4, 0xC8, 0xCC):
            return next(iter(file.read(1)), None)
        file.seek(struct.unpack(">H", marker[2:])[0] - 2, io.SEEK_CUR)
    return None


# --- PNG -------------------------------------------------------------------------------------------------------------

_PNG = b"\x89PNG\r\n\x1a\n"


def _scale_transparency(image: "ImageFile") -> None:
    """Scale the value that a PNG marks as transparent, as Pillow scales pixels. Pillow leaves it as it is stored."""
    value, packing = image.info.get("transparency"), image.tile[0].args
    if value is not None and packing in ("L;2", "L;4"):
        image.info["transparency"] = value * 255 // (2 ** int(packing[-1]) - 1)
    elif value is not None and packing == "RGB;16B":
        image.info["transparency"] = tuple(channel >> 8 for channel in value)


def _without_large_notes(file: BinaryIO) -> BinaryIO:
    """A PNG without texts and a colour profile so large that Pillow would refuse the image; the file itself if there
    are none. They are inflated no further than up to the limit."""
    from PIL.PngImagePlugin import MAX_TEXT_CHUNK, MAX_TEXT_MEMORY

    kept, start, at, left = [], 0, len(_PNG), MAX_TEXT_MEMORY
    whole = file.seek(0, io.SEEK_END)
    file.seek(at)
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        end = at + 12 + length
        if end > whole:
            break
        if kind in _NOTES:
            size = _NOTES[kind](file.read(length), MAX_TEXT_CHUNK)
            if size is None or size > left:
                kept.append((start, at))
                start = end
            elif kind != b"iCCP":
                left -= size
        at = file.seek(end)
    if kept:
        kept.append((start, whole))
        slim = io.BytesIO()
        for start, end in kept:
            file.seek(start)
            slim.write(file.read(end - start))
        file = slim
    file.seek(0)
    return file


def _inflated(packed: bytes, most: int) -> int | None:
    """The inflated size; None above `most`, 0 for damaged data."""
    inflater = zlib.decompressobj()
    try:
        size = len(inflater.decompress(packed, most))
    except zlib.error:
        return 0
    return None if inflater.unconsumed_tail else size


def _packed_note(body: bytes, most: int) -> int | None:
    """Of iCCP and zTXt: a name, 0, the method (0), packed bytes."""
    packed = body.partition(b"\0")[2]
    return _inflated(packed[1:], most) if packed[:1] in (b"", b"\0") else None


def _unicode_note(body: bytes, most: int) -> int | None:
    """Of iTXt: a name, 0, whether it is packed, the method (0), language, 0, the name translated, 0, text."""
    rest = body.partition(b"\0")[2]
    text = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return _inflated(text, most) if rest[:1] not in (b"", b"\0") else len(text)


_NOTES = {b"iCCP": _packed_note, b"zTXt": _packed_note, b"iTXt": _unicode_note, b"tEXt": lambda body, _: len(body)}
