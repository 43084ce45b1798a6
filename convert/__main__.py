"""The command: mlx_qwen35.convert --hf-path FOLDER_OR_ID --mlx-path OUT [-q --q-bits 4 --q-group-size 64]"""

import argparse
import math
import time
from pathlib import Path

from mlx_qwen35.checkpoint import MODES, open_checkpoint, text_shapes
from mlx_qwen35.commands import clean_errors
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.plan import DTYPES

COMMAND = "mlx_qwen35.convert"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Convert a raw Hugging Face checkpoint of the Qwen3.5 family to a folder that mlx_qwen35, mlx-lm "
        "and mlx-vlm load. Works in chunks: 1 GB of memory is enough for any size.",
    )
    parser.add_argument("--hf-path", required=True, help="local folder or Hugging Face id of the source")
    parser.add_argument("--mlx-path", required=True, help="folder to write; appears whole or not at all")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantize the text model's matrices")
    parser.add_argument("--q-bits", type=int, help="bits per weight (affine: 2, 3, 4, 5, 6 or 8; default 4)")
    parser.add_argument("--q-group-size", type=int, help="weights per scale (affine: 32, 64 or 128; default 64)")
    parser.add_argument("--q-mode", choices=tuple(MODES), help="default affine")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of what is not quantized; default: the source's")
    parser.add_argument("--revision", help="branch, tag or commit of the Hugging Face id")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint at --mlx-path when done")
    return parser


def _summary(folder: Path, seconds: float) -> str:
    checkpoint = open_checkpoint(folder)
    tensors = [*checkpoint.entries.values(), *checkpoint.exact.values()]
    files = {entry.file for entry in tensors}
    weights = sum(math.prod(shape) for shape in text_shapes(checkpoint.config.text).values())
    return (
        f"wrote {folder}: {len(tensors)} tensors in {len(files)} file{'s' if len(files) > 1 else ''}, "
        f"{sum(entry.nbytes for entry in tensors) / 1e9:.3f} GB\n"
        f"text model: {checkpoint.nbytes() / 1e9:.3f} GB, {8 * checkpoint.nbytes() / weights:.3f} bits per weight\n"
        f"time: {seconds:.1f} s"
    )


def main() -> None:
    options = vars(_parser().parse_args())
    start = time.perf_counter()
    with clean_errors(COMMAND):
        folder = convert(options.pop("hf_path"), options.pop("mlx_path"), **options)
        print(_summary(folder, time.perf_counter() - start))


if __name__ == "__main__":
    main()
