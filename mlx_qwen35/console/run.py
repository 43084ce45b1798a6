"""What every command runs in: settings of MLX, errors in one line, Ctrl-C; and how it loads its model."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_qwen35.budget.splitting import AUTO
from mlx_qwen35.checkpoint.hub import CHOICES
from mlx_qwen35.console.ending import told
from mlx_qwen35.console.options import given_options
from mlx_qwen35.console.progress import Step
from mlx_qwen35.distributed.loading import Spreading
from mlx_qwen35.distributed.options import RankOptions
from mlx_qwen35.distributed.ranks import Ranks, as_rank, join, ranks
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions, load, load_given
from mlx_qwen35.machine.chip import tune
from mlx_qwen35.machine.process import check_folder
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import on_command_line
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
    joined = joined_ranks(args)
    with Step(f"loading {name}", "B", timed=True) as progress:
        if not joined:
            return load(**options, progress=progress)
        loads = Spreading(joined, given := LoadOptions(**options), args.split or AUTO, progress.waits)
        return load_given(given, progress, loads)


def joined_ranks(args: argparse.Namespace) -> Ranks | None:
    """The ranks that this command leads; started now by --with. None: it runs alone.

    Raises InputError option_no_effect for --split in a command that does.
    """
    given = RankOptions(**given_options(args, [RankOptions]))
    if given.hosts:
        with Step(f"starting {', '.join(given.hosts)}"):
            return join(given.hosts)
    found = ranks()
    if not found and given_options(args, [RankOptions]):
        raise InputError(
            "option_no_effect", "--split must be given with --with: one machine holds all of a model. Leave it out"
        )
    return found
