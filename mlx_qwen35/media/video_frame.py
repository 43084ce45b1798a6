"""A decoded frame of any pixel format -> upright RGB."""

import math
from typing import TYPE_CHECKING

import numpy as np

from mlx_qwen35.media.frames import Size
from mlx_qwen35.media.image import read_image

if TYPE_CHECKING:
    from av import VideoFrame


def stored_size(frame: "VideoFrame") -> Size:
    """(height, width) before the frame is turned upright."""
    return frame.height, frame.width


def upright_rgb(frame: "VideoFrame") -> np.ndarray:
    """A frame of any pixel format -> (H, W, 3) uint8 RGB, turned as it is to be shown, transparency on white."""
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        pixels = read_image(frame.to_ndarray(format="rgba"))
    else:
        pixels = frame.to_ndarray(format="rgb24")
    a, b, c, d = _display_matrix(frame)
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    pixels = pixels[:, ::-1] if a < 0 else pixels
    return pixels[::-1] if d < 0 else pixels


def _display_matrix(frame: "VideoFrame") -> tuple[float, float, float, float]:
    """(a, b, c, d): the pixel at x, y (rightwards, downwards) is to be shown at a x + c y, b x + d y."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV has no name for another piece of this frame's side data; it still knows the angle
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
    return a, b, c, d
