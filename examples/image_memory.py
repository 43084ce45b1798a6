"""Memory of images and videos: MLX's peak while random pixels are encoded, and in the prefill of a prompt with them."""

import argparse
import math
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_qwen35.budget.encoding import at_once, working_bytes
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.config import VisionConfig
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.random import GEOMETRIES, geometry, write_random_checkpoint
from mlx_qwen35.console.table import align
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.kernels.attention import attention_impl
from mlx_qwen35.load import choose_dtype, load_model
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.positions import Placeholder

TEXT_TOKENS = 8  # before each pair of frames and after the last: about as many as a timestamp and its tags
COLUMNS = ("MB", "tokens", "text", "encoder", "embeddings", "cache", "encoding: working", "budget", "prefill: working",
           "released", "at the end", "encoding s", "prefill s")  # fmt: skip


def noise(config: VisionConfig, frames: int, height: int, width: int) -> Media:
    """An image (1 frame) or a video (an even number) of random pixels, the same each time; no pixel is resized."""
    pixels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    times = () if frames == 1 else tuple(pair + 0.5 for pair in range(frames // config.temporal_patch_size))
    values = np.tile(np.linspace(-1, 1, 256, dtype=np.float32), (3, 1))
    return Media(pixels, times, (height, width), config, values)


def prompt(grid: tuple[int, int, int], merge: int) -> tuple[list[int], list[Placeholder]]:
    """Arbitrary tokens, and the places among them of the placeholders of each pair of frames."""
    pairs, height, width = grid[0], grid[1] // merge, grid[2] // merge
    every = TEXT_TOKENS + height * width
    tokens = [1] * (pairs * every + TEXT_TOKENS)
    return tokens, [Placeholder(pair * every + TEXT_TOKENS, height, width) for pair in range(pairs)]


def held() -> int:
    """Bytes of the arrays that are alive."""
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


def show(model: Model, config: VisionConfig, frames: int, height: int, width: int, step: int) -> dict[str, float]:
    """Encode random pixels, unload the vision encoder, and prefill a prompt with them, `step` tokens at a time.

    Sizes are in bytes, times in seconds. Working memory is MLX's peak in a phase less what stays: text weights,
    embeddings, and in encoding the vision encoder, in prefill the cache. `budget` is what budget.encoding.working_bytes
    states for the former, by which images are refused.
    """
    media = noise(config, frames, height, width)
    impl = attention_impl(config.hidden_size // config.num_heads, model.dtype)
    text, start = held(), time.perf_counter()
    mx.reset_peak_memory()
    embeddings = model.vision.part.encode(media)
    mx.eval(embeddings)
    encode_s, encode_peak, encoded = time.perf_counter() - start, mx.get_peak_memory(), held()
    model.vision.unload()
    released, size = held(), embeddings.nbytes
    row, cache = PromptRow(*prompt(media.grid, config.spatial_merge_size), embeddings), model.make_cache()
    start = time.perf_counter()
    mx.reset_peak_memory()
    prefill(model, cache, row, step)
    read_s, read_peak = time.perf_counter() - start, mx.get_peak_memory()
    tokens, kept, encoder = len(row.tokens), cache.nbytes, encoded - released
    del row, embeddings, cache
    return {
        "tokens": tokens, "text": text, "encoder": encoder, "embeddings": size, "cache": kept,
        "encode_working": encode_peak - text - encoder - size,
        "budget": working_bytes(config, model.dtype, at_once(media.grid), impl),
        "read_working": read_peak - text - size - kept, "released": released, "left": held(), "encode_s": encode_s,
        "read_s": read_s,
    }  # fmt: skip


def cells(name: str, found: dict[str, float]) -> tuple[str, ...]:
    tokens, *sizes, encode_s, read_s = found.values()
    return (name, str(tokens), *(f"{size / 1e6:.1f}" for size in sizes), f"{encode_s:.1f}", f"{read_s:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default="nano", help="local folder, Hugging Face id, or nano (default)")
    source.add_argument("--geometry", choices=GEOMETRIES, help="random weights of this size")
    parser.add_argument("--megapixels", type=float, nargs="*", default=[0.25], help="square images of so many (0.25)")
    parser.add_argument("--frames", type=int, nargs="*", default=[4, 8], help="videos of so many frames (4 8)")
    parser.add_argument("--video-side", type=int, default=256, help="width and height of a video (256)")
    parser.add_argument("--step", type=int, default=1024, help="prompt tokens of a chunk (1024)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.geometry:
            write_random_checkpoint(Path(folder), geometry(args.geometry), mtp=False)
        checkpoint = open_checkpoint(Path(folder) if args.geometry else resolve(args.model))
        model = load_model(checkpoint, choose_dtype(checkpoint, None), args.geometry or args.model)
        config = checkpoint.config.vision
        factor = config.patch_size * config.spatial_merge_size
        sides = [max(1, round(math.sqrt(size * (1 << 20)) / factor)) * factor for size in args.megapixels]
        cases = [(1, side) for side in sides] + [(frames, args.video_side) for frames in args.frames]
        rows = [COLUMNS]
        for frames, side in cases:
            name = f"{'image' if frames == 1 else 'video'} {side}x{side}" + (f", {frames} frames" if frames > 1 else "")
            rows.append(cells(name, show(model, config, frames, side, side, args.step)))
    print("\n".join(align(rows)))


if __name__ == "__main__":
    main()
