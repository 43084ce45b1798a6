"""A picture, whichever way it comes -> its pixels: upright, RGB, 8 bit. The same pixels give the same bytes.

Transparency is put on white, as transformers 5.23 does; other numbers of bits are scaled to 8, never clipped. What
decoding takes is known from the header, and refused there where this machine has no room for it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Generic, TypeVar

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.fetch import fetch, is_remote, name_of
from mlx_qwen35.image_file import DAMAGE, MAX_PIXELS, bomb, open_image, strict_pillow
from mlx_qwen35.memory import check_decoding_fits
from mlx_qwen35.picture import Picture, Size, resizing_bytes

if TYPE_CHECKING:
    from PIL import Image

ARRAYS = "(height, width[, 1, 3 or 4]), channels last, of uint8, uint16, or floating point from 0 to 1"
Source = "str | Path | bytes | bytearray | memoryview | Image.Image | np.ndarray"
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class _Wish(Generic[_Made]):
    """What is made of a picture. working: (height, width) -> the bytes that it takes beside the decoded picture."""

    make: Callable[[Picture], _Made]
    working: Callable[[int, int], int]


def read_image(source: Source, *, allow_private_urls: bool = False) -> np.ndarray:
    """The pixels of one picture.

    Args:
        source: a path (~ is expanded), an http, https or data: URL, a file's bytes, a PIL image, or an array as ARRAYS
            says. Files are JPEG, PNG, WebP, GIF (the first frame), BMP, TIFF, AVIF or HEIC; their EXIF orientation,
            and that of a PIL image, is applied. A PIL image is left as it is, except that it is loaded.
        allow_private_urls: whether a URL may lead to this machine or into its network, see `fetch`.

    Returns: (height, width, 3) uint8, RGB, contiguous, the caller's own.

    Raises InputError for what is not a picture, is cut short, has no pixels, more than MAX_PIXELS, or more than fit
    into memory.
    """
    return _read(source, _Wish(Picture.pixels, lambda height, width: 3 * height * width), allow_private_urls)


def read_resized(
    source: Source, fit: Callable[[int, int], Size], *, allow_private_urls: bool = False
) -> tuple[np.ndarray, Size]:
    """Like read_image, and resized as `resize` does; no second copy of the whole picture is made.

    Args:
        fit: (height, width) -> (height, width) to resize to. Called before the picture is decoded and again when it
            stands upright.

    Returns: the pixels, and the (height, width) before.
    """

    def make(picture: Picture) -> tuple[np.ndarray, Size]:
        return picture.resized(fit(*picture.size)), picture.size

    def working(height: int, width: int) -> int:
        return resizing_bytes((height, width), fit(height, width))

    return _read(source, _Wish(make, working), allow_private_urls)


def _read(source: Source, wish: _Wish[_Made], allow_private_urls: bool) -> _Made:
    if isinstance(source, np.ndarray):
        return wish.make(_from_array(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = f"a picture given as {memoryview(source).nbytes:,} bytes"
        return _from_file(BytesIO(source), name, wish)
    if isinstance(source, str) and is_remote(source):
        return _from_file(BytesIO(fetch(source, "image", allow_private_urls)), name_of(source), wish)
    if isinstance(source, (str, Path)):
        return _from_path(source, wish)
    from PIL import Image

    if isinstance(source, Image.Image):
        with strict_pillow():
            name = f"the PIL image of mode {source.mode} and size {source.width} x {source.height}"
            return wish.make(_picture(source, name, wish.working))
    raise InputError(
        "media_source_invalid",
        f"an image must be a path, a URL, a data: URI, bytes, a PIL image or an array; got {type(source).__name__}",
    )


# --- files ---


def _from_path(source: str | Path, wish: _Wish[_Made]) -> _Made:
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
            return _from_file(file, name, wish)
    except OSError as error:  # of the file alone: what Pillow raises does not come so far
        raise InputError(
            "media_unreadable", f"an image must be a file that can be read; {name} cannot: {error.strerror}"
        ) from error


def _from_file(file: BinaryIO, name: str, wish: _Wish[_Made]) -> _Made:
    with strict_pillow():
        return wish.make(_picture(open_image(file, name), name, wish.working))


# --- Pillow's images ---

# Bytes a pixel of Pillow's images, 4 in other modes; and what the decoders of some formats hold beside it, at most. The
# coefficients of a progressive JPEG come all before its pixels.
_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2}
_BESIDE = {"TIFF": 4, "WEBP": 12, "AVIF": 12, "HEIF": 12}
_COEFFICIENT = 2


def _check_size(width: int, height: int, name: str) -> None:
    if not (width and height):
        raise InputError("media_empty", f"an image must have pixels; {name} is {width} wide and {height} high")
    if width * height > MAX_PIXELS:
        raise InputError("media_too_large", f"{bomb(name)} ({width} x {height})")


def _picture(image: "Image.Image", name: str, working: Callable[[int, int], int]) -> Picture:
    """A PIL image, decoded or not -> upright rows. Within strict_pillow."""
    from PIL.ImageFile import ImageFile

    _check_size(*image.size, name)
    width, height = image.size
    if isinstance(image, ImageFile):
        check_decoding_fits(name, width, height, _bytes_a_pixel(image) * width * height + working(height, width))
    try:
        image.load()
    except DAMAGE as error:
        raise InputError(
            "media_damaged",
            f"an image must be whole; {name} is cut short or damaged ({error}). Copy or download it again",
        ) from error
    to_rgb = _conversion(image, name)
    orientation = _orientation(image)
    turn = _turns().get(orientation)
    upright = image.size if orientation in _SIDEWAYS else image.size[::-1]

    def rows(top: int, bottom: int) -> np.ndarray:
        band = image.crop(_box(orientation, top, bottom, *image.size))
        return to_rgb(band if turn is None else band.transpose(turn))

    return Picture(*upright, rows)


def _bytes_a_pixel(image: "Image.Image") -> int:
    """What decoding takes, from the header."""
    coefficients = len(image.getbands()) if image.info.get("progressive") else 0
    return _STORED.get(image.mode, 4) + _BESIDE.get(image.format, 0) + _COEFFICIENT * coefficients


_SIDEWAYS = (5, 6, 7, 8)  # orientations whose rows are columns as they are stored
_REVERSED = (3, 4, 7, 8)  # whose first row is the last row or column


def _turns() -> "dict[int, Image.Transpose]":
    from PIL.Image import Transpose

    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }


def _orientation(image: "Image.Image") -> int:
    """As its EXIF (or XMP) says. Pillow has turned TIFF by itself, pillow-heif HEIC."""
    try:
        orientation = image.getexif().get(0x0112)
    except DAMAGE:  # metadata that cannot be read says nothing about the pixels
        return 1
    return orientation if orientation in _turns() else 1


def _box(orientation: int, top: int, bottom: int, width: int, height: int) -> tuple[int, int, int, int]:
    """Where rows of the upright picture are stored: left, upper, right, lower."""
    length = width if orientation in _SIDEWAYS else height
    if orientation in _REVERSED:
        top, bottom = length - bottom, length - top
    return (top, 0, bottom, height) if orientation in _SIDEWAYS else (0, top, width, bottom)


def _conversion(image: "Image.Image", name: str) -> "Callable[[Image.Image], np.ndarray]":
    """What makes (n, width, 3) uint8 of some rows of the image."""
    if image.mode == "F":
        raise InputError(
            "image_unsupported",
            f"an image must have 8 or 16 bits a channel; {name} is floating point (mode F), whose range is unknown. "
            "Scale it to 0..1 and give it as an array, or save it with 8 bits",
        )
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if 2 in tags.get(_SAMPLE_FORMAT, ()):
        raise InputError(
            "image_unsupported",
            f"the samples of an image must not be signed: nothing says which of them is white; those of {name} are. "
            "Save it with 8 or 16 bits, unsigned",
        )
    if image.mode.startswith("I"):
        return _grey_conversion(image, tags, name)
    return lambda band: _rgb(band, name)


_BITS, _MEANING, _SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF


def _grey_conversion(image: "Image.Image", tags, name: str) -> "Callable[[Image.Image], np.ndarray]":
    """Of modes I;16 (and its byte orders) and I: 16 bits of grey, in I as 32-bit numbers; a TIFF says how many bits."""
    bits, zero_is_white = tags.get(_BITS, (16,))[0], tags.get(_MEANING) == 0
    transparent = image.info.get("transparency")

    def convert(band: "Image.Image") -> np.ndarray:
        values = np.asarray(band)
        if bits == 32:
            values = values.view(np.uint32)
        elif values.min() < 0 or values.max() > 65535:
            raise InputError(
                "image_unsupported",
                f"a grey image must fit 16 bits, 0 to 65535; {name} reaches from {values.min()} to {values.max()}. "
                "Save it with 8 or 16 bits",
            )
        grey = _from_bits(values, bits)
        grey = 255 - grey if zero_is_white else grey
        if isinstance(transparent, int):  # the one value that a PNG marks
            grey[values == transparent] = 255
        return _three(grey)

    return convert


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


def _from_array(array: np.ndarray) -> Picture:
    name = f"an array of shape {array.shape} and type {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(
            "array_invalid",
            f"an image array must be {ARRAYS}; got {name}. Move its axes, or give its images one by one",
        )
    _check_size(array.shape[1], array.shape[0], name)
    convert = _array_conversion(array, name)
    return Picture(*array.shape[:2], lambda top, bottom: convert(array[top:bottom]))


def _array_conversion(array: np.ndarray, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What makes (n, width, 3) uint8 of some rows of the array."""
    from PIL import Image

    eight_bits = _eight_bits(array, name)
    channels = 1 if array.ndim == 2 else array.shape[2]
    if channels == 1:
        return lambda rows: _three(eight_bits(rows.reshape(rows.shape[:2])))
    if channels == 3:
        return eight_bits
    return lambda rows: _rgb(Image.fromarray(np.ascontiguousarray(eight_bits(rows))), name)


def _eight_bits(array: np.ndarray, name: str) -> Callable[[np.ndarray], np.ndarray]:
    if array.dtype == np.uint8:
        return lambda rows: rows
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return lambda rows: _from_bits(rows, 16)
    if array.dtype.kind != "f":
        raise InputError("array_invalid", f"an image array must be {ARRAYS}; got {name}. Convert it to uint8")
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 1):  # not a number fails as well
        raise InputError(
            "array_invalid",
            f"an image array of floating point must lie from 0 to 1; got {name} from {low} to {high}. "
            "Divide it by its largest value (255?), or convert it to uint8",
        )
    exact = np.result_type(array, np.float32)
    return lambda rows: np.rint(rows.astype(exact) * 255).astype(np.uint8)


def _from_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """0 .. 2^bits - 1 -> 0..255, rounded; never halfway between two numbers."""
    white = 2**bits - 1
    wide = values.astype(np.uint32 if bits <= 16 else np.uint64)
    return ((wide * 255 + white // 2) // white).astype(np.uint8)


def _three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)
