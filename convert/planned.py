"""The folder that a conversion would write, as headers alone: to be planned for, without a weight read or written."""

import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.folder import INDEX
from mlx_qwen35.convert.plan import ConversionPlan, make_plan
from mlx_qwen35.convert.recipes import StorageOptions


def planned(source: Path, options: StorageOptions) -> Checkpoint:
    """The checkpoint that converting this folder, or its headers, would give. Its files are gone already."""
    with warnings.catch_warnings(action="ignore"):  # they come with the conversion
        plan = make_plan(source, options)
    with TemporaryDirectory(prefix="mlx_qwen35-plan-") as folder:
        return open_checkpoint(write_holes(plan, Path(folder)))


def write_holes(plan: ConversionPlan, folder: Path) -> Path:
    """Write a plan's folder with holes in the place of the weights, which take no room on the disk."""
    for shard in plan.shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    (folder / INDEX).write_text(json.dumps(plan.index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(plan.config), encoding="utf-8")
    return folder
