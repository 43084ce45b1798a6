"""The command: mlx_qwen35.convert --hf-path FOLDER_OR_ID --mlx-path OUT [-q --q-bits 4 --q-group-size 64]"""

import argparse
import math
import time
from collections.abc import Iterable
from pathlib import Path

from mlx_qwen35.checkpoint import MODES, VISION, Checkpoint, is_matrix, open_checkpoint, text_shapes, vision_shapes
from mlx_qwen35.commands import as_command
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.plan import DTYPES
from mlx_qwen35.convert.recipes import RECIPES

COMMAND = "mlx_qwen35.convert"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Convert a raw Hugging Face checkpoint of the Qwen3.5 family to a folder that mlx_qwen35, mlx-lm "
        "and mlx-vlm load. Works in chunks: 1 GB of memory is enough for any size.",
    )
    parser.add_argument("--hf-path", required=True, help="local folder or Hugging Face id of the source")
    parser.add_argument("--mlx-path", required=True, help="folder to write; appears whole or not at all")
    uses = "; ".join(f"{name}: {recipe.use}" for name, recipe in RECIPES.items())
    parser.add_argument("--recipe", choices=tuple(RECIPES), help=f"how everything is stored ({uses})")
    parser.add_argument("-q", "--quantize", action="store_true", help="pack everything alike, by hand")
    parser.add_argument("--q-bits", type=int, help="bits per text weight (affine: 2, 3, 4, 5, 6 or 8; default 4)")
    parser.add_argument("--q-group-size", type=int, help="text weights per scale (affine: 32, 64 or 128; default 64)")
    parser.add_argument("--q-mode", choices=tuple(MODES), help="of the text model; default affine")
    parser.add_argument(
        "--q-vision-bits",
        type=int,
        help="bits per weight of the vision tower, always affine (2, 3, 4, 5, 6 or 8; default 8; 0: unquantized); a "
        "matrix whose width is no multiple of 32 stays unquantized",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of what is not quantized; default: the source's")
    parser.add_argument("--revision", help="branch, tag or commit of the Hugging Face id")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint at --mlx-path when done")
    return parser


def _size(nbytes: int, shapes: Iterable[tuple[int, ...]]) -> str:
    bits = 8 * nbytes / sum(math.prod(shape) for shape in shapes)
    return f"{nbytes / 1e9:.3f} GB, {bits:.3f} bits per weight"


def _vision_line(checkpoint: Checkpoint) -> str:
    """The tower's size, and how many of its matrices a quantized folder holds unquantized; "" without a tower."""
    if not checkpoint.has(VISION):
        return ""
    shapes = vision_shapes(checkpoint.config.vision)
    matrices = [name for name, shape in shapes.items() if is_matrix(name, shape)]
    left = sum(checkpoint.quantization(name) is None for name in matrices) if checkpoint.config.quantization else 0
    note = f", {left} of its {len(matrices)} matrices unquantized" if left else ""
    return f"vision tower: {_size(checkpoint.nbytes((VISION,)), shapes.values())}{note}\n"


def _summary(folder: Path, seconds: float) -> str:
    checkpoint = open_checkpoint(folder)
    tensors = [*checkpoint.entries.values(), *checkpoint.exact.values()]
    files = {entry.file for entry in tensors}
    return (
        f"wrote {folder}: {len(tensors)} tensors in {len(files)} file{'s' if len(files) > 1 else ''}, "
        f"{sum(entry.nbytes for entry in tensors) / 1e9:.3f} GB\n"
        f"text model: {_size(checkpoint.nbytes(), text_shapes(checkpoint.config.text).values())}\n"
        f"{_vision_line(checkpoint)}"
        f"time: {seconds:.1f} s"
    )


def main() -> None:
    options = vars(_parser().parse_args())
    start = time.perf_counter()
    with as_command(COMMAND):
        folder = convert(options.pop("hf_path"), options.pop("mlx_path"), **options)
        print(_summary(folder, time.perf_counter() - start))


if __name__ == "__main__":
    main()
