"""The folder that a conversion would write, as headers alone: to be planned for, without a weight read or written."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import StorageOptions


def planned(source: Path, options: StorageOptions) -> Checkpoint:
    """The checkpoint that converting this folder, or its headers, would give. Its files are gone already."""
    with warnings.catch_warnings(action="ignore"):  # they come with the conversion
        plan = make_plan(source, options)
    with TemporaryDirectory(prefix="mlx_qwen35-plan-") as folder:
        return open_checkpoint(plan.write_headers(Path(folder)))
