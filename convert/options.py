"""Options of a conversion."""

from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.checkpoint.dtypes import DTYPES, check_dtype
from mlx_qwen35.convert.plan import ROUNDINGS
from mlx_qwen35.convert.recipes import DEFAULT, RECIPES
from mlx_qwen35.options import option
from mlx_qwen35.quantization import MODES


@dataclass(frozen=True)
class FolderOptions:
    """What is read and what is written."""

    hf_path: str | None = option(
        help="the source: a local folder or a Hugging Face id", aliases=("model",), metavar="MODEL"
    )
    mlx_path: str | None = option(help="folder to write; it appears whole or not at all", metavar="FOLDER")
    revision: str | None = option(help="branch, tag or commit of the Hugging Face id", metavar="NAME")


@dataclass(frozen=True)
class StorageOptions:
    """How weights are stored."""

    recipe: str | None = option(
        help="; ".join(f"{name}: {recipe.use}" for name, recipe in RECIPES.items())
        + f"; or a file that --save-recipe has written (default: {DEFAULT}, but a source that an MLX program has "
        "quantized stays as it is)", metavar="NAME",
    )  # fmt: skip
    quantize: bool = option(False, help="quantize everything alike, without a recipe", aliases=("q",))
    q_bits: int | None = option(help="bits per weight (affine: 2, 3, 4, 5, 6 or 8; default: 4)", least=0, metavar="N")
    q_group_size: int | None = option(
        help="weights per scale (affine: 32, 64 or 128; default: 64)", least=0, metavar="N"
    )
    q_mode: str | None = option(help="quantization mode (default: affine)", choices=tuple(MODES))
    q_vision_bits: int | None = option(
        help="bits per weight of the vision encoder, always affine (2, 3, 4, 5, 6 or 8; default: 8; 0: unquantized); a "
        "matrix whose width is no multiple of 32 stays unquantized", least=0, metavar="N",
    )  # fmt: skip
    dtype: str | None = option(
        help="dtype of what is not quantized (default: the source's)", choices=tuple(DTYPES), check=check_dtype
    )
    rounding: str = option("search", help="how quantized groups are rounded (default: search)", choices=ROUNDINGS)
    calibration: str | Path | None = option(
        help="weigh rounding errors by the activations on this text file", metavar="FILE"
    )


@dataclass(frozen=True)
class WritingOptions:
    """How a folder is written and checked."""

    overwrite: bool = option(False, help="replace the checkpoint at --mlx-path when done")
    resume: bool = option(False, help="continue a killed conversion to --mlx-path")
    verify: bool = option(True, help="measure no errors, and do not read the folder again")
    evaluation: str | Path | None = option(
        help="compare with the source on this text file: perplexity, KL divergence, top-1 agreement",
        flag="eval", metavar="FILE",
    )  # fmt: skip


@dataclass(frozen=True)
class CommandOptions:
    """What the command takes beside the options of `convert`."""

    upload_repo: str | None = option(help="publish the folder on Hugging Face under this id", metavar="ID")
    dry_run: bool = option(False, help="print what would be written, from the headers alone")
    sensitivity: Path | None = option(help="measure on this text file what quantizing a group costs", metavar="FILE")
    cap: float | None = option(
        help="with --sensitivity: propose a recipe of at most this size", least=0, above=True, most=1e9, metavar="GB"
    )
    save_recipe: Path | None = option(help="write the proposed recipe, for --recipe FILE", metavar="FILE")
