"""Our model in a worker process, shown an image or a clip: what MLX's allocator holds at each point."""

import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.budget.encoding import at_once, working_bytes
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.config import VisionConfig
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.kernels.attention import attention_way
from mlx_qwen35.load import DTYPES, load_model
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.prompt.positions import Run

TEXT_TOKENS = 8  # before each run of placeholders and after the last: about as many as a timestamp and its tags


class VisionProgram:
    """The model with its text weights loaded; the tower comes with the pixels and goes after them."""

    def __init__(self, folder: Path, dtype: str):
        checkpoint = open_checkpoint(folder)
        self.config = checkpoint.config.vision
        self.model = load_model(checkpoint, DTYPES[dtype], str(folder))

    def show(self, frames: int, height: int, width: int, step: int) -> dict[str, Any]:
        """Encode random pixels, give the tower back, and read a prompt with them, `step` tokens at a time.

        frames: 1 for an image, an even number for a clip. Sizes are in bytes and times in seconds. A peak is the most
        that MLX held in its phase; the tower is what its release gave back.
        """
        media = noise(self.config, frames, height, width)
        text, start = _held(), time.perf_counter()
        mx.reset_peak_memory()
        (embeddings,) = self.model.vision.encode([media])
        encode_s, encode_peak, encoded = time.perf_counter() - start, mx.get_peak_memory(), _held()
        self.model.vision.release()
        released = _held()
        row = PromptRow(*prompt(media.grid, self.config.spatial_merge_size), embeddings)
        figures = {
            "tokens": len(row.tokens), "text_bytes": text, "tower_bytes": encoded - released,
            "embeddings_bytes": embeddings.nbytes, "encode_peak_bytes": encode_peak, "released_bytes": released,
            "budget_bytes": working_bytes(self.config, self.model.dtype, at_once(media.grid), self._way()),
            "encode_s": encode_s, **self._read(row, step),
        }  # fmt: skip
        del row, embeddings
        return figures | {"left_bytes": _held()}

    def _way(self) -> str:
        return attention_way(self.config.hidden_size // self.config.num_heads, self.model.dtype)

    def _read(self, row: PromptRow, step: int) -> dict[str, Any]:
        cache, start = self.model.make_cache(), time.perf_counter()
        mx.reset_peak_memory()
        prefill(self.model, cache, [row], step)
        seconds = time.perf_counter() - start
        return {"cache_bytes": cache.nbytes, "read_peak_bytes": mx.get_peak_memory(), "read_s": seconds}


def _held() -> int:
    """Bytes of the arrays that are alive."""
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


def noise(config: VisionConfig, frames: int, height: int, width: int) -> Media:
    """An image (1 frame) or a clip of random pixels, the same each time; no pixel of it is resized."""
    pixels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    times = () if frames == 1 else tuple(pair + 0.5 for pair in range(frames // config.temporal_patch_size))
    values = np.tile(np.linspace(-1, 1, 256, dtype=np.float32), (3, 1))
    return Media(pixels, times, (height, width), config, values)


def prompt(grid: tuple[int, int, int], merge: int) -> tuple[list[int], list[Run]]:
    """Tokens, and where among them are the placeholders of each pair of frames. What they are is of no account."""
    pairs, height, width = grid[0], grid[1] // merge, grid[2] // merge
    every = TEXT_TOKENS + height * width
    tokens = [1] * (pairs * every + TEXT_TOKENS)
    return tokens, [Run(pair * every + TEXT_TOKENS, height, width) for pair in range(pairs)]
