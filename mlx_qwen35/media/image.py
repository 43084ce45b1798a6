"""An image from any source -> its pixels: upright, RGB, 8 bit. The same pixels give the same bytes.

Transparency is put on white, as transformers 5.23 does; other numbers of bits are scaled to 8, never clipped. Its
header tells how much memory decoding takes; an image without room is refused before it is decoded.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.decoded import DecodedImage, Size, resizing_bytes
from mlx_qwen35.media.fetch import fetch, is_remote, name_of
from mlx_qwen35.media.image_file import MAX_PIXELS, open_image, strict_pillow
from mlx_qwen35.media.image_rows import check_size, from_bits, rgb, three, upright_image

if TYPE_CHECKING:
    from PIL import Image

    Source = str | Path | bytes | bytearray | memoryview | Image.Image | np.ndarray

__all__ = ["ARRAYS", "MAX_PIXELS", "read_image", "read_resized"]
ARRAYS = "(height, width[, 1, 3 or 4]), channels last, of uint8, uint16, or floating point from 0 to 1"


def read_image(
    source: "Source", *, allow_private_urls: bool = False, memory_limit: int | None = None
) -> np.ndarray:
    """The pixels of one image.

    Args:
        source: a path (~ is expanded), an http, https or data: URL, a file's bytes, a PIL image, or an array as ARRAYS
            says. Files are JPEG, PNG, WebP, GIF (the first frame), BMP, TIFF, AVIF or HEIC; their EXIF orientation,
            and that of a PIL image, is applied. A PIL image is left as it is, except that it is loaded.
        allow_private_urls: whether a URL may lead to this machine or into its network, see `fetch`.
        memory_limit: bytes that may be in use while a file is decoded, loaded models included. None is what suits the
            machine.

    Returns: (height, width, 3) uint8, RGB, contiguous, the caller's own.

    Raises InputError if the source is no image, is cut short, has no pixels, more than MAX_PIXELS, or more than fit
    into memory.
    """
    with _decoded(source, lambda height, width: 3 * height * width, allow_private_urls, memory_limit) as image:
        return image.pixels()


def read_resized(
    source: "Source",
    fit: Callable[[int, int], Size],
    *,
    allow_private_urls: bool = False,
    memory_limit: int | None = None,
) -> tuple[np.ndarray, Size]:
    """Like read_image, and resized as `resize` does, without a second copy of a large image.

    Args:
        fit: (height, width) -> (height, width) to resize to. Called with the size before the image is decoded, and with
            the size of the upright image.

    Returns: the pixels, and the (height, width) before.
    """

    def working(height: int, width: int) -> int:
        return resizing_bytes((height, width), fit(height, width))

    with _decoded(source, working, allow_private_urls, memory_limit) as image:
        return image.resized(fit(*image.size)), image.size


@contextmanager
def _decoded(
    source: "Source", working: Callable[[int, int], int], allow_private_urls: bool, memory_limit: int | None
) -> Iterator[DecodedImage]:
    """working: (height, width) -> the bytes that are needed beside the decoded image."""
    if isinstance(source, np.ndarray):
        yield _from_array(source)
    elif isinstance(source, (str, Path, bytes, bytearray, memoryview)):
        with _opened(source, allow_private_urls) as (file, name), strict_pillow():
            yield upright_image(open_image(file, name), name, working, memory_limit)
    else:
        from PIL import Image

        if not isinstance(source, Image.Image):
            raise InputError(
                "media_source_invalid",
                "an image must be a path, a URL, a data: URI, bytes, a PIL image or an array of numpy; got "
                f"{type(source).__module__}.{type(source).__qualname__}",
            )
        with strict_pillow():
            name = f"the PIL image of mode {source.mode} and size {source.width} x {source.height}"
            yield upright_image(source, name, working, memory_limit)


@contextmanager
def _opened(
    source: str | Path | bytes | bytearray | memoryview, allow_private_urls: bool
) -> Iterator[tuple[BinaryIO, str]]:
    """The bytes of an image file, and how messages call it."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield BytesIO(source), f"an image given as {memoryview(source).nbytes:,} bytes"
        return
    name = name_of(str(source))
    if isinstance(source, str) and is_remote(source):
        yield BytesIO(fetch(source, "image", allow_private_urls)), name
        return
    path = os.path.expanduser(source)
    if not str(source) or str(source).startswith("file:") or os.path.isdir(path):
        raise InputError(
            "media_source_invalid", f"an image must be one file, without file://; got {name!r}. A folder is a video"
        )
    if not os.path.isfile(path):
        what = "is not a regular file" if os.path.exists(path) else "does not exist"
        raise InputError("media_not_found", f"an image must be a file or a URL; {name} {what}. Look at the path")
    try:
        with open(path, "rb") as file:
            yield file, name
    except OSError as error:  # of the file alone: what Pillow raises does not come so far
        raise InputError("media_unreadable", f"{name} must be readable: {error.strerror}") from error


# --- arrays ---


def _from_array(array: np.ndarray) -> DecodedImage:
    name = f"an array of shape {array.shape} and type {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError("array_invalid", f"an image array must be {ARRAYS}; got {name}. Give one image at a time")
    check_size(array.shape[1], array.shape[0], name)
    convert = _array_conversion(array, name)
    return DecodedImage(array.shape[0], array.shape[1], lambda top, bottom: convert(array[top:bottom]))


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
        reach = f"got {name} from {low} to {high}. Divide it by 255, or convert it to uint8"
        raise InputError("array_invalid", f"an image array of floating point must lie from 0 to 1; {reach}")
    exact = np.result_type(array, np.float32)
    return lambda rows: np.rint(rows.astype(exact) * 255).astype(np.uint8)
