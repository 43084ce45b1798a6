"""Checkpoint -> folder for MLX.

source.py (with fp8.py) reads the source, fusion.py fuses an adapter into it, recipes.py chooses quantizations, plan.py
plans the tensors to write and files.py the files beside them; stream.py writes, chunk by chunk (rows, rounding,
float16, verify), target.py places the folder and journal.py makes it resumable. calibrate.py measures activations,
evaluate.py the result, sensitivity.py the cost of each group of tensors; card.py writes the model card.
"""

if __name__ == "convert":  # an editable install puts this folder on the path too
    raise ModuleNotFoundError("there is no module convert; import mlx_qwen35.convert", name=__name__)

from pathlib import Path

from mlx_qwen35.convert.cached import convert_cached
from mlx_qwen35.convert.conversion import Conversion
from mlx_qwen35.convert.fusion import AdapterOptions
from mlx_qwen35.convert.progress import downloading
from mlx_qwen35.convert.recipes import StorageOptions
from mlx_qwen35.convert.target import target_path

__all__ = ["convert", "convert_cached"]


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
    rope_scaling: str | None = None,
    adapter: str | Path | None = None,
    adapter_scale: float = 1.0,
    rounding: str = "search",
    calibration: str | Path | None = None,
    evaluation: str | Path | None = None,
    verify: bool = True,
    resume: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint of the Qwen3.5 family, and return the folder written.

    hf_path: local folder or Hugging Face id; `revision` is a branch, tag or commit of the id. Weights in float32,
    float16, bfloat16 or FP8 with block scales, or quantized by an MLX program.
    mlx_path: folder to write. It appears whole or not at all. A folder with content is refused, unless `overwrite`
    is given: then it must hold a checkpoint, which is replaced once the new one is complete.
    recipe: "4bit" (the default), "5bit", "6bit", "8bit", "mxfp4", "nvfp4", "bf16", "fp16" (recipes.py), or a file; or
    quantize: all matrices of text model and draft head alike, embedding and lm_head among them. q_mode is "affine"
    (default; 4 bits in groups of 64 unless q_bits and q_group_size say otherwise), "mxfp4", "mxfp8" or "nvfp4", whose
    bits and group size are fixed. Both quantize the vision encoder's matrices too: affine in q_vision_bits (2, 3, 4, 5,
    6 or 8; default 8; 0 leaves the encoder unquantized), in groups of 64 where that divides their width, else of 32; a
    matrix that neither divides stays unquantized. So do the encoder's patch and position embeddings, norms,
    convolutions and biases. Without either, a source that an MLX program has quantized stays as it is.
    dtype: "float16", "bfloat16" or "float32" of unquantized tensors; by default the one that config.json names. A_log
    stays float32, and other float32 vectors of the text model are stored twice, rounded and as they are.
    rope_scaling: "yarn", "yarn:FACTOR" or "none" in place of the source's, see docs/long_context.md.
    adapter: folder of an adapter, PEFT's, mlx-lm's or mlx-vlm's, that is fused into the weights: W + scale B A in
    float32, rounded to the output's dtype, then quantized. What it does not change stays as it is. adapter_scale: a
    factor of its own scale. See docs/adapters.md.
    rounding: "search" finds ranges, scales and biases of each group with less error than "nearest", mx.quantize's.
    calibration: a text file; the error is then weighted by the inputs of each column on it.
    evaluation: a text file on which the result is compared with the source, the adapter fused into it: perplexity, KL
    divergence, top-1.
    verify: measure the error of every tensor, and read again what was written. resume: continue a killed conversion to
    mlx_path.

    The folder keeps Hugging Face's names and layout: mlx-lm and mlx-vlm load it, and transformers too unless it is
    quantized. The same source and options give the same bytes. README.md and quality.json hold what was measured.
    Raises InputError when a rule is broken, before anything is written wherever the headers show it.
    """
    target = target_path(mlx_path)
    storage = recipe, quantize, q_bits, q_group_size, q_mode, q_vision_bits, dtype, rope_scaling, rounding
    options, fused = StorageOptions(*storage), AdapterOptions(adapter, adapter_scale)
    with downloading("downloading and converting") as tell:
        Conversion(
            hf_path, target, options, tell, calibration, evaluation, verify, resume, revision, overwrite,
            adapter=fused,
        ).run()
    return target
