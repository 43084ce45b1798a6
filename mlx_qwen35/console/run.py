"""What every command runs in: settings of MLX, errors in one line, Ctrl-C; and how it loads its model."""

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.hub import CHOICES
from mlx_qwen35.console.interrupt import INTERRUPTED, interruptible
from mlx_qwen35.console.options import given_options
from mlx_qwen35.console.progress import Step
from mlx_qwen35.console.streams import OutputError, give_up_output, standard_streams
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions, load
from mlx_qwen35.machine.chip import tune
from mlx_qwen35.machine.process import check_folder
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import on_command_line
from mlx_qwen35.prompt.processor import Processor


@contextmanager
def as_command(name: str, tuned: bool = True) -> Iterator[None]:
    """What a command runs in: settings of MLX that suit the machine, if `tuned`, and messages in place of tracebacks.

    What the user can mend is printed in one message, and ends with 2, as does standard output that cannot be written; a
    warning is printed and ends nothing. Ctrl-C and a reader that left end in silence.
    """
    if tuned:
        tune()
    try:
        with interruptible(), standard_streams(), _clean_warnings(name), on_command_line():
            check_folder()
            yield
    except InputError as error:
        print(f"{name}: error: {error} [{error.code}]", file=sys.stderr)
        raise SystemExit(2) from None
    except OutputError as error:
        give_up_output()
        print(f"{name}: error: {error} [output_unwritable]", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        give_up_output()
        raise SystemExit(1) from None


@contextmanager
def _clean_warnings(name: str) -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"{name}: warning: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
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
    with Step(f"loading {name}", "B") as progress:
        return load(**options, progress=progress)
