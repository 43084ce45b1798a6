"""A picture, whichever way it comes -> its pixels: upright, RGB, 8 bit. The same pixels give the same bytes.

Transparency is put on white, as transformers 5.23 does; 16 bits are scaled to 8, never clipped.
"""

import codecs
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.fetch import fetch, is_remote, name_of

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_956_970  # Pillow's own limit for an error; a file that says more is taken for a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
ARRAYS = "(height, width[, 1, 3 or 4]), channels last, of uint8, uint16, or floating point from 0 to 1"
_HEAD = 512  # bytes of a file that tell what it is
# What Pillow and its plugins raise for a file that is cut short or damaged, in opening or in decoding it.
_DAMAGE = (OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)
_DAMAGE += (EOFError, AssertionError, struct.error, zlib.error)
_PILLOW = threading.Lock()


def read_image(source: "str | Path | bytes | bytearray | memoryview | Image.Image | np.ndarray") -> np.ndarray:
    """The pixels of one picture.

    Args:
        source: a path (~ is expanded), an http, https or data: URL, a file's bytes, a PIL image, or an array as ARRAYS
            says. Files are JPEG, PNG, WebP, GIF (the first frame), BMP, TIFF, AVIF or HEIC; their EXIF orientation,
            and that of a PIL image, is applied. A PIL image is left as it is, except that it is loaded.

    Returns: (height, width, 3) uint8, RGB, contiguous, the caller's own.

    Raises InputError for what is not a picture, is cut short, has no pixels or more than MAX_PIXELS.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(BytesIO(source), f"a picture given as {memoryview(source).nbytes:,} bytes")
    if isinstance(source, str) and is_remote(source):
        return _from_file(BytesIO(fetch(source, "image")), name_of(source))
    if isinstance(source, (str, Path)):
        return _from_path(source)
    from PIL import Image

    if isinstance(source, Image.Image):
        with _strict_pillow():
            return _pixels(source, f"the PIL image of mode {source.mode} and size {source.width} x {source.height}")
    raise InputError(
        "media_source_invalid",
        f"an image must be a path, a URL, a data: URI, bytes, a PIL image or an array; got {type(source).__name__}",
    )


# --- files ---


def _from_path(source: str | Path) -> np.ndarray:
    if not str(source) or str(source).startswith("file:"):
        raise InputError(
            "media_source_invalid",
            f"an image's path must be written plainly, without file:// before it; got {str(source)!r}",
        )
    path, name = os.path.expanduser(source), name_of(str(source))
    if os.path.isdir(path):
        raise InputError(
            "media_source_invalid",
            f"an image must be one file; {name} is a folder. A folder of frames is a video: give it so",
        )
    if not os.path.isfile(path):
        what = "is not a regular file" if os.path.exists(path) else "does not exist"
        raise InputError(
            "media_not_found",
            f"an image must be a file, an http(s) URL or a data: URI; {name} {what}. Look at the path",
        )
    try:
        with open(path, "rb") as file:
            return _from_file(file, name)
    except OSError as error:  # of the file alone: what Pillow raises does not come so far
        raise InputError(
            "media_unreadable", f"an image must be a file that can be read; {name} cannot: {error.strerror}"
        ) from error


def _from_file(file: BinaryIO, name: str) -> np.ndarray:
    from PIL import Image
    from pillow_heif import register_heif_opener

    head = file.read(_HEAD)
    if not head:
        raise InputError("media_empty", f"an image must not be empty; {name} has no bytes. Copy or download it again")
    if "HEIF" not in Image.OPEN:
        register_heif_opener()
    with _strict_pillow():
        try:
            image = Image.open(file, formats=FORMATS)
            if image.format == "PNG":  # its checksums, which the decoder does not look at
                image.verify()
                image = Image.open(file, formats=("PNG",))
        except Image.DecompressionBombError as error:
            raise InputError("media_too_large", f"{_bomb(name)} ({error})") from error
        except _DAMAGE as error:
            raise InputError("media_not_opened", _not_opened(head, name)) from error
        return _pixels(image, name)


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow without warnings, and deaf to a LOAD_TRUNCATED_IMAGES that the program around us may have set.

    Both are settings of the whole process, so one picture is decoded at a time; both are put back.
    """
    from PIL import ImageFile

    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


_SIGNATURES = (  # offset, bytes, what it is; a format of FORMATS by its name
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypavi", "AVIF"),
    *((4, b"ftyp" + brand, "HEIF") for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftypM4A", "a sound file"),
    (4, b"ftypcrx", "a camera's raw file"),
    *((4, brand, "a video (MP4 or QuickTime)") for brand in (b"ftyp", b"moov", b"mdat", b"wide", b"free")),
    (0, b"\x1aE\xdf\xa3", "a video (WebM or Matroska)"),
    (8, b"AVI ", "a video (AVI)"),
    (0, b"\0\0\1\xba", "a video (MPEG)"),
    (0, b"OggS", "a video or a sound file (Ogg)"),
    (8, b"WAVE", "a sound file"),
    (0, b"ID3", "a sound file"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\3\4", "a zip archive, or a document packed as one"),
    (0, b"\x1f\x8b", "compressed with gzip"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (4, b"JXL ", "a JPEG XL picture"),
    (4, b"jP  ", "a JPEG 2000 picture"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"\0\0\1\0", "an icon"),
)
_TEXTS = ("<!doctype html", "a web page"), ("<html", "a web page"), ("version https://git-lfs", "a Git LFS pointer")


def _not_opened(head: bytes, name: str) -> str:
    """The message for a file that Pillow cannot open."""
    what = next((what for at, magic, what in _SIGNATURES if head[at:].startswith(magic)), None) or _text(head)
    if what in FORMATS:
        return f"an image must be whole; {name} begins as {what} and is cut short or damaged. Copy or download it again"
    hint = "Give it as a video" if what.startswith("a video") else "Give a picture, or save it as PNG or JPEG"
    return f"an image must be JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC; {name} is {what}. {hint}"


def _text(head: bytes) -> str:
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return "of no known kind"
    if any(character < " " and not character.isspace() for character in text):
        return "of no known kind"
    text = text.strip().lower()
    if "<svg" in text:
        return "an SVG drawing"
    return next((what for start, what in _TEXTS if text.startswith(start)), "text")


# --- Pillow's images ---


def _bomb(name: str) -> str:
    return f"an image may have at most {MAX_PIXELS:,} pixels (no decompression bombs); {name} has more. Make it smaller"


def _check_size(width: int, height: int, name: str) -> None:
    if not (width and height):
        raise InputError("media_empty", f"an image must have pixels; {name} is {width} wide and {height} high")
    if width * height > MAX_PIXELS:
        raise InputError("media_too_large", f"{_bomb(name)} ({width} x {height})")


def _pixels(image: "Image.Image", name: str) -> np.ndarray:
    """A PIL image, decoded or not -> (height, width, 3) uint8. Within _strict_pillow."""
    _check_size(*image.size, name)
    try:
        image.load()
    except _DAMAGE as error:
        raise InputError(
            "media_damaged",
            f"an image must be whole; {name} is cut short or damaged ({error}). Copy or download it again",
        ) from error
    image = _upright(image)
    if image.mode.startswith("I"):
        return _grey(image, name)
    if image.mode == "F":
        raise InputError(
            "image_unsupported",
            f"an image must have 8 or 16 bits a channel; {name} is floating point (mode F), whose range is unknown. "
            "Scale it to 0..1 and give it as an array, or save it with 8 bits",
        )
    return _rgb(image, name)


def _upright(image: "Image.Image") -> "Image.Image":
    """The image turned as its EXIF (or XMP) says. Pillow has done so already for TIFF, pillow-heif for HEIC."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(0x0112)
    except _DAMAGE:  # metadata that cannot be read says nothing about the pixels
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _grey(image: "Image.Image", name: str) -> np.ndarray:
    """Modes I;16 (and its byte orders) and I: 16 bits of grey, in I as 32-bit numbers."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(
            "image_unsupported",
            f"a grey image must fit 16 bits, 0 to 65535; {name} reaches from {values.min()} to {values.max()}. "
            "Save it with 8 or 16 bits",
        )
    grey = _from_16_bits(values)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # the one value that a PNG marks
        grey[values == transparent] = 255
    return _three(grey)


def _rgb(image: "Image.Image", name: str) -> np.ndarray:
    """8-bit modes; equal to transformers 5.23's convert_to_rgb (image_transforms.py), transparency on white."""
    from PIL import Image

    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise InputError(
            "image_unsupported", f"an image must have colours that turn into RGB; {name} has not: {error}"
        ) from error


# --- arrays ---


def _from_array(array: np.ndarray) -> np.ndarray:
    name = f"an array of shape {array.shape} and type {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(
            "array_invalid",
            f"an image array must be {ARRAYS}; got {name}. Move its axes, or give its images one by one",
        )
    _check_size(array.shape[1], array.shape[0], name)
    array = _eight_bits(array, name)
    if array.ndim == 2 or array.shape[2] == 1:
        return _three(array.reshape(array.shape[:2]))
    if array.shape[2] == 3:
        return np.array(array, order="C")
    from PIL import Image

    return _rgb(Image.fromarray(np.ascontiguousarray(array)), name)


def _eight_bits(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return _from_16_bits(array)
    if array.dtype.kind != "f":
        raise InputError("array_invalid", f"an image array must be {ARRAYS}; got {name}. Convert it to uint8")
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 1):  # not a number fails as well
        raise InputError(
            "array_invalid",
            f"an image array of floating point must lie from 0 to 1; got {name} from {low} to {high}. "
            "Divide it by its largest value (255?), or convert it to uint8",
        )
    return np.rint(array.astype(np.result_type(array, np.float32)) * 255).astype(np.uint8)


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    """0..65535 -> 0..255, rounded: v / 257, which is never halfway between two numbers."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)
