"""How a command ends: errors in one line, Ctrl-C and a reader that left in silence."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_qwen35.console.interrupt import INTERRUPTED, as_typed, interruptible
from mlx_qwen35.console.notices import be_quiet, tell
from mlx_qwen35.console.streams import OutputError, give_up_output, standard_streams
from mlx_qwen35.errors import InputError


@contextmanager
def told(command: str) -> Iterator[None]:
    """Messages in the place of tracebacks, under the name of the command that was typed. command: its dotted name.

    What the user can mend is printed in one message, and ends with 2, as does standard output that cannot be written; a
    warning is printed and ends nothing.
    """
    name = as_typed(command)
    try:
        with interruptible(), standard_streams(), _clean_warnings(name):
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
    finally:
        be_quiet(False)  # --quiet belongs to one command


@contextmanager
def _clean_warnings(name: str) -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        tell(f"{name}: warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
