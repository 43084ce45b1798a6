"""What every command runs in: settings of MLX, errors in one line, Ctrl-C; and how it loads its model."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_qwen35.checkpoint.hub import CHOICES
from mlx_qwen35.console.ending import told
from mlx_qwen35.console.options import given_options
from mlx_qwen35.console.progress import Step
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions, load
from mlx_qwen35.machine.chip import tune
from mlx_qwen35.machine.process import check_folder
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import on_command_line
from mlx_qwen35.prompt.processor import Processor


@contextmanager
def as_command(name: str, tuned: bool = True) -> Iterator[None]:
    """What a command runs in: settings of MLX that suit the machine, if `tuned`, messages in place of tracebacks, and
    options spelled as flags. name: its dotted name.
    """
    if tuned:
        tune()
    with told(name), on_command_line():
        check_folder()
        yield


def require_model(args: argparse.Namespace) -> str:
    if not args.model:
        raise InputError("option_missing", f"--model must be given: {CHOICES}. To try at once: --model nano")
    return args.model


def load_model(args: argparse.Namespace, folder: Path | None = None) -> tuple[Model, Processor]:
    """The model that the options name, with progress on stderr. folder: what is loaded in its place."""
    name, options = require_model(args), given_options(args, [LoadOptions])
    if folder:
        options |= {"model": folder, "revision": None}
    with Step(f"loading {name}", "B", timed=True) as progress:
        return load(**options, progress=progress)
