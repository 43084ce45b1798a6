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
from mlx_qwen35.media.fetch import fetch, is_remote, name_of
from mlx_qwen35.media.image_file import MAX_PIXELS, open_image, strict_pillow
from mlx_qwen35.media.image_rows import check_size, from_bits, rgb, three, upright_picture
from mlx_qwen35.media.picture import Picture, Size, resizing_bytes

if TYPE_CHECKING:
    from PIL import Image

    Source = str | Path | bytes | bytearray | memoryview | Image.Image | np.ndarray

__all__ = ["ARRAYS", "MAX_PIXELS", "read_image", "read_resized"]
ARRAYS = "(height, width[, 1, 3 or 4]), channels last, of uint8, uint16, or floating point from 0 to 1"
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class _Wish(Generic[_Made]):
    """What is made of a picture. working: (height, width) -> the bytes that it takes beside the decoded picture."""

    make: Callable[[Picture], _Made]
    working: Callable[[int, int], int]


def read_image(source: "Source", *, allow_private_urls: bool = False) -> np.ndarray:
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
    source: "Source", fit: Callable[[int, int], Size], *, allow_private_urls: bool = False
) -> tuple[np.ndarray, Size]:
    """Like read_image, and resized as `resize` does; of a large picture no second copy is made on the way.

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


def _read(source: "Source", wish: _Wish[_Made], allow_private_urls: bool) -> _Made:
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
            return wish.make(upright_picture(source, name, wish.working))
    raise InputError(
        "media_source_invalid",
        "an image must be a path, a URL, a data: URI, bytes, a PIL image or an array of numpy; got "
        f"{type(source).__module__}.{type(source).__qualname__}",
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
        return wish.make(upright_picture(open_image(file, name), name, wish.working))


# --- arrays ---


def _from_array(array: np.ndarray) -> Picture:
    name = f"an array of shape {array.shape} and type {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(
            "array_invalid",
            f"an image array must be {ARRAYS}; got {name}. Move its axes, or give its images one by one",
        )
    check_size(array.shape[1], array.shape[0], name)
    convert = _array_conversion(array, name)
    return Picture(*array.shape[:2], lambda top, bottom: convert(array[top:bottom]))


def _array_conversion(array: np.ndarray, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What makes (n, width, 3) uint8 of some rows of the array."""
    from PIL import Image

    eight_bits = _eight_bits(array, name)
    channels = 1 if array.ndim == 2 else array.shape[2]
    if channels == 1:
        return lambda rows: three(eight_bits(rows.reshape(rows.shape[:2])))
    if channels == 3:
        return eight_bits
    return lambda rows: rgb(Image.fromarray(np.ascontiguousarray(eight_bits(rows))), name)


def _eight_bits(array: np.ndarray, name: str) -> Callable[[np.ndarray], np.ndarray]:
    if array.dtype == np.uint8:
        return lambda rows: rows
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return lambda rows: from_bits(rows, 16)
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
