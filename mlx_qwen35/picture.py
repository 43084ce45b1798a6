"""A decoded picture as rows that become RGB a band at a time: no second copy of a large one is ever in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Size = tuple[int, int]  # (height, width)
BAND = 1 << 20  # pixels that are converted at a time


@dataclass(frozen=True)
class Picture:
    """A picture that stands upright.

    rows: (from, to) -> those rows, (to - from, width, 3) uint8 RGB.
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
        """(*size, 3) uint8, bicubic with antialiasing.

        Pillow resizes rows first and columns then, and rounds to bytes in between. So the rows may be resized band by
        band, and the result is that of resizing the whole.
        """
        from PIL import Image

        if tuple(size) == self.size:
            return self.pixels()
        height, width = size
        narrow = Image.new("RGB", (width, self.height))
        for top, bottom in self._bands():
            narrow.paste(_resize(Image.fromarray(self.rows(top, bottom)), (width, bottom - top)), (0, top))
        return np.asarray(_resize(narrow, (width, height)))

    def _bands(self) -> Iterator[tuple[int, int]]:
        step = max(1, BAND // self.width)
        for top in range(0, self.height, step):
            yield top, min(top + step, self.height)


def resize(pixels: np.ndarray, size: Size) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (height, width, 3) uint8, bicubic with antialiasing; `pixels` itself at the right size."""
    if pixels.shape[:2] == tuple(size):
        return pixels
    return Picture(*pixels.shape[:2], lambda top, bottom: pixels[top:bottom]).resized(size)


def _resize(image, size: tuple[int, int]):
    from PIL.Image import Resampling

    return image if image.size == size else image.resize(size, Resampling.BICUBIC)
