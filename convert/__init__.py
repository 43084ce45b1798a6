"""Raw Hugging Face checkpoint -> folder for MLX.

plan.py decides what is written, with packing.py for what is quantized; stream.py writes it, target.py places it.
"""

from pathlib import Path

from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.stream import write
from mlx_qwen35.convert.target import appearing_whole, check_apart, check_space, check_target
from mlx_qwen35.hub import resolve

__all__ = ["convert"]


def convert(
    hf_path: str | Path,
    mlx_path: str | Path,
    *,
    recipe: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str | None = None,
    q_vision_bits: int | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a raw Hugging Face checkpoint of the Qwen3.5 family, and return the folder written.

    hf_path: local folder or Hugging Face id; `revision` is a branch, tag or commit of the id.
    mlx_path: folder to write. It appears whole or not at all. A folder with content is refused, unless `overwrite`
    is given: then it must hold a checkpoint, which is replaced once the new one is complete.
    recipe: "4bit" (the usual one), "5bit", "6bit", "8bit", "mxfp4", "nvfp4", "bf16" or "fp16", see recipes.py; or
    quantize: pack all matrices of text model and draft head alike, embedding and head among them: q_mode is "affine"
    (default; 4 bits in groups of 64 unless q_bits and q_group_size say otherwise), "mxfp4", "mxfp8" or "nvfp4" (whose
    bits and group size are fixed). With either the vision tower's matrices are packed too, whatever the text's mode and
    bits: affine in q_vision_bits (2, 3, 4, 5, 6 or 8; default 8; 0 leaves the tower unquantized), in groups of 64 where
    that divides their width, else of 32; a matrix that neither divides stays unquantized. So do the tower's patch and
    position embeddings, norms, convolutions and biases.
    dtype: "float16", "bfloat16" or "float32" for what is not packed; by default the one that config.json names. A_log
    stays float32, and other float32 vectors of the text model are kept exactly beside their rounded form.

    The folder keeps Hugging Face's names and layout: mlx-lm and mlx-vlm load it, and transformers too unless it is
    quantized. The same source and options give the same bytes. Raises InputError when a rule is broken, before
    anything is written wherever the headers show it.
    """
    target = Path(mlx_path).expanduser().resolve()
    check_target(target, overwrite)
    source = resolve(hf_path, revision)
    check_apart(source, target)
    plan = make_plan(
        source,
        recipe=recipe,
        quantize=quantize,
        bits=q_bits,
        group_size=q_group_size,
        mode=q_mode,
        vision_bits=q_vision_bits,
        dtype=dtype,
    )
    with appearing_whole(target, overwrite) as folder:
        check_space(plan.nbytes, target)
        write(plan, folder)
    return target
