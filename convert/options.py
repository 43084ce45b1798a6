"""Options of a conversion."""

import sys
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.options import option


@dataclass(frozen=True)
class FolderOptions:
    """What is read and what is written."""

    hf_path: str | None = option(
        help="the source: a local folder or a Hugging Face id", aliases=("model",), metavar="MODEL"
    )
    mlx_path: str | None = option(help="folder to write; it appears whole or not at all", metavar="FOLDER")
    revision: str | None = option(help="branch, tag or commit of the Hugging Face id", metavar="NAME")


@dataclass(frozen=True)
class WritingOptions:
    """How a folder is written and checked."""

    calibration: str | Path | None = option(
        help="weigh rounding errors by the activations on this text file", metavar="FILE"
    )
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
        help="with --sensitivity: propose a recipe of at most this size", least=0, above=True,
        most=sys.float_info.max / 1e9, metavar="GB",
    )  # fmt: skip
    save_recipe: Path | None = option(help="write the proposed recipe, for --recipe FILE", metavar="FILE")
    plot: Path | None = option(
        help="with --sensitivity: draw what was measured into this PNG file (needs matplotlib)", metavar="FILE"
    )
