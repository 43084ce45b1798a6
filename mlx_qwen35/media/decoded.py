"""A decoded image that is converted and resized in bands of rows: memory never holds a second copy of a large one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]  # (height, width)
BAND = 1 << 18  # pixels that are converted at a time
EXACT = 1 << 26  # pixels of an image up to which resizing is Pillow's to the byte


@dataclass(frozen=True)
class DecodedImage:
    """An upright image.

    rows: (top, bottom) -> the rows between, (bottom - top, width, 3) uint8 RGB.
    """

    height: int
    width: int
    rows: Callable[[int, int], np.ndarray]

    @property
    def size(self) -> Size:
        return self.height, self.width

    def pixels(self) -> np.ndarray:
        """(height, width, 3) uint8, contiguous, the caller's own."""
        pixels = np.empty((*self.size, 3), np.uint8)
        for top, bottom in self._bands():
            pixels[top:bottom] = self.rows(top, bottom)
        return pixels

    def resized(self, size: Size) -> np.ndarray:
        """(*size, 3) uint8, bicubic with antialiasing, as Pillow resizes the whole image.

        An image of more than EXACT pixels becomes narrower band by band, then lower. Pillow 12 keeps this order too;
        another order rounds other bytes in between, and some pixels differ.
        """
        from PIL import Image

        height, width = size
        if tuple(size) == self.size:
            return self.pixels()
        between = width if _in_bands(self.size, size) else self.width
        whole = Image.new("RGB", (between, self.height))
        for top, bottom in self._bands():
            whole.paste(_resize(Image.fromarray(self.rows(top, bottom)), (between, bottom - top)), (0, top))
        return np.asarray(_resize(whole, (width, height)))

    def _bands(self) -> Iterator[tuple[int, int]]:
        step = max(1, BAND // self.width)
        for top in range(0, self.height, step):
            yield top, min(top + step, self.height)


def resize(pixels: np.ndarray, size: Size) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (height, width, 3) uint8, bicubic with antialiasing; `pixels` itself at the right size."""
    if pixels.shape[:2] == tuple(size):
        return pixels
    return DecodedImage(pixels.shape[0], pixels.shape[1], lambda top, bottom: pixels[top:bottom]).resized(size)


def resizing_bytes(old: Size, new: Size) -> int:
    """Bytes that `resized` takes beside the decoded image: the whole as RGB, the narrower image, the result."""
    (old_height, old_width), (height, width) = old, new
    whole = 0 if _in_bands(old, new) else 4 * old_width * old_height
    return whole + 4 * max(width * old_height, height * old_width) + 4 * height * width


def _in_bands(old: Size, new: Size) -> bool:
    return old[0] * old[1] > EXACT and new[1] < old[1]


def _resize(image: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    from PIL.Image import Resampling

    return image if image.size == size else image.resize(size, Resampling.BICUBIC)
