"""What every command runs in: settings of MLX, errors in one line, Ctrl-C; and how it loads its model."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_qwen35.checkpoint.hub import CHOICES
from mlx_qwen35.console.ending import told
from mlx_qwen35.console.options import given_options
from mlx_qwen35.console.progress import Step
from mlx_qwen35.distributed.loading import Spreading, runs_alone
from mlx_qwen35.distributed.options import RankOptions
from mlx_qwen35.distributed.ranks import as_rank, join
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions, load, load_given
from mlx_qwen35.machine.chip import tune
from mlx_qwen35.machine.process import check_folder
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import on_command_line, spelled
from mlx_qwen35.prompt.processor import Processor


@contextmanager
def as_command(name: str, tuned: bool = True, spreads: bool = False) -> Iterator[None]:
    """What a command runs in: settings of MLX that suit the machine, if `tuned`, messages in place of tracebacks, and
    options spelled as flags. name: its dotted name. spreads: whether it runs a model over several machines.
    """
    if tuned:
        tune()
    with told(name), on_command_line():
        check_folder()
        with as_rank(name, spreads):
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
    with Step(f"loading {name}", "B", timed=True) as step:
        machines = RankOptions(**given_options(args, [RankOptions]))
        if runs_alone(machines):
            return load(**options, progress=step)
        with Step(f"starting {', '.join(machines.hosts or ())}"):
            joined = join(machines.hosts)
        return load_given(
            given := LoadOptions(**options), step, Spreading(joined, given, machines.split, step.waits)
        )


def is_alone(args: argparse.Namespace) -> bool:
    """Whether this process holds the whole model that a command line names."""
    return runs_alone(RankOptions(**given_options(args, [RankOptions])))


def refuse_with_ranks(args: argparse.Namespace, name: str, why: str) -> None:
    """InputError ranks_unsupported for an option that was given where several machines hold the model."""
    if getattr(args, name) is not None and not is_alone(args):
        raise InputError(
            "ranks_unsupported", f"{spelled(name)} must not be given with a model over several machines: {why}"
        )
