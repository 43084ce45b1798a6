"""Pillow's image, of any mode, orientation and number of bits -> upright rows of 8-bit RGB."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.memory import check_decoding_fits
from mlx_qwen35.media.decoded import DecodedImage
from mlx_qwen35.media.image_file import DAMAGE, MAX_PIXELS, bomb

if TYPE_CHECKING:
    from PIL import Image

# Bytes a pixel of Pillow's images, 4 in other modes; and the most that the decoders of some formats hold beside it. All
# coefficients of a progressive JPEG come before its pixels.
_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2}
_BESIDE = {"TIFF": 4, "WEBP": 12, "AVIF": 12, "HEIF": 12}
_COEFFICIENT = 2


def check_size(width: int, height: int, name: str) -> None:
    if not (width and height):
        raise InputError("media_empty", f"an image must have pixels; {name} is {width} wide and {height} high")
    if width * height > MAX_PIXELS:
        raise InputError("media_too_large", f"{bomb(name)} ({width} x {height})")


def upright_image(
    image: "Image.Image", name: str, working: Callable[[int, int], int], memory_limit: int | None
) -> DecodedImage:
    """A PIL image, decoded or not -> its upright rows. Needs strict_pillow.

    working: (height, width) -> the bytes that are needed beside the decoded image. memory_limit: see read_image.
    """
    from PIL.Image import Transpose
    from PIL.ImageFile import ImageFile

    check_size(*image.size, name)
    width, height = image.size
    if isinstance(image, ImageFile):
        needed = _bytes_a_pixel(image) * width * height + working(height, width)
        check_decoding_fits(name, width, height, needed, memory_limit)
    try:
        image.load()
    except DAMAGE as error:
        raise InputError(
            "media_damaged", f"{name} must be whole; it is cut short or damaged ({error}). Copy or download it again"
        ) from error
    to_rgb = _conversion(image, name)
    orientation = _orientation(image)
    turn = Transpose[_TURNS[orientation]] if orientation in _TURNS else None
    height, width = image.size if orientation in _SIDEWAYS else image.size[::-1]  # loading may have turned it

    def rows(top: int, bottom: int) -> np.ndarray:
        band = image.crop(_box(orientation, top, bottom, *image.size))
        return to_rgb(band if turn is None else band.transpose(turn))

    return DecodedImage(height, width, rows)


def _bytes_a_pixel(image: "Image.Image") -> int:
    """Of decoding, from the header."""
    coefficients = len(image.getbands()) if image.info.get("progressive") else 0
    return _STORED.get(image.mode, 4) + _BESIDE.get(image.format or "", 0) + _COEFFICIENT * coefficients


_SIDEWAYS = (5, 6, 7, 8)  # orientations whose rows are columns as they are stored
_REVERSED = (3, 4, 7, 8)  # whose first row is the last row or column
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip


def _orientation(image: "Image.Image") -> int:
    """The orientation in EXIF or XMP. Pillow has turned TIFF by itself, pillow-heif HEIC."""
    try:
        orientation = image.getexif().get(0x0112)
    except DAMAGE:  # metadata that cannot be read says nothing about the pixels
        return 1
    return orientation if orientation in _TURNS else 1


def _box(orientation: int, top: int, bottom: int, width: int, height: int) -> tuple[int, int, int, int]:
    """The place where rows of the upright image are stored: left, upper, right, lower."""
    length = width if orientation in _SIDEWAYS else height
    if orientation in _REVERSED:
        top, bottom = length - bottom, length - top
    return (top, 0, bottom, height) if orientation in _SIDEWAYS else (0, top, width, bottom)


_BITS, _MEANING, _SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF


def _conversion(image: "Image.Image", name: str) -> "Callable[[Image.Image], np.ndarray]":
    """The function that makes (n, width, 3) uint8 of some rows of the image."""
    if image.mode == "F":
        raise _unsupported(
            f"8 or 16 bits a channel; {name} is floating point (mode F), whose range is unknown. Scale it to 0..1 and "
            "give it as an array, or save it with 8 bits"
        )
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if 2 in tags.get(_SAMPLE_FORMAT, ()):
        raise _unsupported(f"unsigned samples; those of {name} are signed. Save it with 8 or 16 bits, unsigned")
    return _grey_conversion(image, tags, name) if image.mode.startswith("I") else lambda band: rgb(band, name)


def _grey_conversion(
    image: "Image.Image", tags: Mapping[int, Any], name: str
) -> "Callable[[Image.Image], np.ndarray]":
    """Of modes I;16 (and its byte orders) and I: 16 bits of grey, in I as 32-bit numbers; a TIFF says how many bits."""
    bits, zero_is_white = tags.get(_BITS, (16,))[0], tags.get(_MEANING) == 0
    transparent = image.info.get("transparency")

    def convert(band: "Image.Image") -> np.ndarray:
        values = np.asarray(band)
        if bits == 32:
            values = values.view(np.uint32)
        elif values.min() < 0 or values.max() > 65535:
            raise _unsupported(
                f"16 bits of grey, 0 to 65535; {name} reaches from {values.min()} to {values.max()}. Save it with 8 or "
                "16 bits"
            )
        grey = from_bits(values, bits)
        grey = 255 - grey if zero_is_white else grey
        if isinstance(transparent, int):  # the one value that a PNG marks
            grey[values == transparent] = 255
        return three(grey)

    return convert


def _unsupported(rule: str) -> InputError:
    return InputError("image_unsupported", f"an image must have {rule}")


def rgb(image: "Image.Image", name: str) -> np.ndarray:
    """8-bit modes; equal to transformers 5.23's convert_to_rgb (image_transforms.py), transparency on white."""
    from PIL import Image

    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise _unsupported(f"colours that turn into RGB; {name} has not: {error}") from error


def from_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """0 .. 2^bits - 1 -> 0..255, rounded; never halfway between two numbers."""
    white = 2**bits - 1
    wide = values.astype(np.uint32 if bits <= 16 else np.uint64)
    return ((wide * 255 + white // 2) // white).astype(np.uint8)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)
