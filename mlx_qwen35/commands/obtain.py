"""From a model's name to a loaded model: its conversion where the original does not fit, made where there is none."""

import argparse
import math
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35.budget.plan import SHORT, MemoryPlan, check_model_fits, plan_memory, this_machine
from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.adapter_choice import choose
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.converted import Converted, converted, folder_of
from mlx_qwen35.checkpoint.hub import is_local, look
from mlx_qwen35.checkpoint.shapes import text_shapes
from mlx_qwen35.console import run
from mlx_qwen35.console.interrupt import as_typed
from mlx_qwen35.console.notices import quiet, tell
from mlx_qwen35.console.options import add_options, given_options
from mlx_qwen35.console.streams import standard_input
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions, choose_dtype
from mlx_qwen35.machine.memory import limit_of, usable_bytes
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import option, options_of
from mlx_qwen35.prompt.processor import Processor

if TYPE_CHECKING:
    from mlx_qwen35.convert.cached import Prospect

OFFERED = "4bit"
_REFUSALS = ("memory_exceeded", "fp8_not_runnable")  # of an original, where a conversion could be loaded


def _check_recipe(name: str, value: Any) -> str:
    from mlx_qwen35.convert.cached import KEPT
    from mlx_qwen35.values import choice

    return choice(name, value, KEPT)


@dataclass(frozen=True)
class RecipeOptions:
    """Whether a conversion of the model is loaded in its place."""

    recipe: str | None = option(
        help="load a conversion of a Hugging Face id: 8bit, 6bit, 5bit, 4bit, mxfp4 or nvfp4. The first time it is "
        "made while the original is downloaded, file by file, and kept; default: the original, or where that does not "
        "fit into memory a conversion that is kept, else an offer to make one", metavar="NAME", check=_check_recipe,
    )  # fmt: skip


def add_recipe_option(parser: argparse.ArgumentParser) -> None:
    add_options(parser.add_argument_group("conversion"), options_of(RecipeOptions).values())


def load_model(args: argparse.Namespace, command: str) -> tuple[Model, Processor]:
    """The model that the options name, or its conversion, with progress on stderr. command: for what to type instead.

    Raises InputError, like `load`; where nobody can be asked for a conversion, the message has the command for it.
    """
    folder = _settled(args)
    if folder is None:
        try:
            return run.load_model(args)
        except InputError as error:
            if not run.is_alone(args):
                raise
            folder = _instead(args, error, command)
    return run.load_model(args, folder)


def settle(args: argparse.Namespace, command: str) -> Path | None:
    """The folder to load in place of the model's name, made if need be; None: the name itself. Loads nothing."""
    if (folder := _settled(args)) or is_local(args.model, args.revision) or not run.is_alone(args):
        return folder
    try:
        with look(args.model, args.revision) as headers:
            _check_fits(_Loading(args), open_checkpoint(headers, rope_scaling=args.rope_scaling), args.model)
    except InputError as error:
        return _instead(args, error, command)
    return None


# --- which folder ----------------------------------------------------------------------------------------------------


class _Loading:
    """What the options say of how a model is loaded."""

    def __init__(self, args: argparse.Namespace):
        given = LoadOptions(**given_options(args, [LoadOptions]))
        self.dtype, self.limit = given.dtype, usable_bytes(limit_of(given.memory_limit))
        self._adapter, self._scale = given.adapter, given.adapter_scale

    def adapters(self, checkpoint: Checkpoint) -> list[Adapter]:
        """The adapters, checked against a model. InputError, as `load` raises it, for one that does not suit it."""
        return choose(self._adapter, self._scale, checkpoint).listed

    def plan(self, checkpoint: Checkpoint) -> MemoryPlan:
        """Of the shortest useful context."""
        dtype = choose_dtype(checkpoint, self.dtype)
        machine = this_machine(checkpoint.config.text, dtype, self.limit)
        return plan_memory(checkpoint, machine, SHORT, adapters=self.adapters(checkpoint))

    def fits_unpacked(self, checkpoint: Checkpoint) -> bool:
        """Whether the original of a conversion fits, which has the same tensors."""
        plan = self.plan(checkpoint)
        weights = sum(map(math.prod, text_shapes(checkpoint.config.text).values())) * plan.machine.dtype.size
        return replace(plan, weights=weights).fits


def _check_fits(loading: _Loading, checkpoint: Checkpoint, name: str) -> None:
    dtype = choose_dtype(checkpoint, loading.dtype)
    check_model_fits(checkpoint, dtype, loading.limit, name, loading.adapters(checkpoint))


def _settled(args: argparse.Namespace) -> Path | None:
    """The conversion that --recipe asks for, or that is kept of a model which does not fit; None where neither is."""
    name, revision = run.require_model(args), args.revision
    if args.recipe:
        from mlx_qwen35.convert.cached import kept

        found = None if is_local(name, revision) else kept(name, args.recipe, revision)
        if not found:
            _check_adapters(args)
        return _told(found, "") if found else _converted(name, args.recipe, revision)
    if is_local(name, revision) or not run.is_alone(args):
        return None
    found = _kept(args)
    if not found or _Loading(args).fits_unpacked(open_checkpoint(found.folder)):
        return None
    return _told(found, f"{name} does not fit into memory as published: ")


def _check_adapters(args: argparse.Namespace) -> None:
    """Refuse adapters that do not suit the model, before a conversion of it is made."""
    if args.adapter and not is_local(args.model, args.revision):
        with look(args.model, args.revision) as headers:
            _Loading(args).adapters(open_checkpoint(headers))


def _kept(args: argparse.Namespace) -> Converted | None:
    """The largest of the conversions that are kept and fit."""
    loading = _Loading(args)
    there = [one for one in converted(args.model) if one.revision == args.revision and _is_whole(one)]
    fitting = [one for one in there if loading.plan(open_checkpoint(one.folder)).fits]
    return max(fitting, key=lambda one: one.nbytes, default=None)


def _is_whole(found: Converted) -> bool:
    """Whether a conversion can be read; a damaged one is warned of."""
    try:
        open_checkpoint(found.folder)
    except InputError as error:
        remove = f"{as_typed('mlx_qwen35.models')} remove {found.name} --recipe {found.recipe}"
        warnings.warn(f"a conversion is damaged and not used ({error}). Remove it: {remove}", UserWarning, stacklevel=2)
        return False
    return True


def _told(found: Converted, why: str) -> Path:
    """The folder of a conversion, which is told in a line."""
    tell(f"{why}using the {found.recipe} conversion of {found.name} in {found.folder}")
    return found.folder


def _converted(name: str, recipe: str, revision: str | None) -> Path:
    """Make a conversion, with progress on stderr."""
    from mlx_qwen35.convert import convert_cached
    from mlx_qwen35.convert.progress import downloading

    if not is_local(name, revision):  # which is refused
        tell(f"making the {recipe} conversion of {name} in {folder_of(name, recipe, revision)}")
    try:
        with downloading("downloading and converting") as told:
            return convert_cached(name, recipe, revision, progress=told)
    except KeyboardInterrupt:
        tell("interrupted: the same command goes on where this one was")
        raise


# --- the offer -------------------------------------------------------------------------------------------------------


def _instead(args: argparse.Namespace, refusal: InputError, command: str) -> Path:
    """The folder of a conversion that takes the place of a model which was refused, if that is wanted."""
    name, revision = args.model, args.revision
    if refusal.code == "hub_failed" and (found := _kept(args)):
        return _told(found, f"{name} could not be had as published: ")
    if refusal.code not in _REFUSALS or is_local(name, revision):
        raise refusal
    with _offered(args, refusal) as (loading, planned):
        facts = _facts(loading, planned, name, revision)
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    typed = f"{as_typed(command)} --model {name}{at} --recipe {OFFERED}"
    if quiet() or not (standard_input().isatty() and sys.stderr.isatty()):
        raise InputError(refusal.code, f"{refusal.fault}. {facts}. That is done by\n  {typed}") from refusal
    print(f"{refusal.fault}.\n{facts}.\nDo that now? [Y/n] ", end="", file=sys.stderr, flush=True)
    if standard_input().readline().strip().lower() not in ("", "y", "yes"):
        raise InputError(refusal.code, f"{name} was not converted. To do it later:\n  {typed}") from refusal
    return _converted(name, OFFERED, revision)


@contextmanager
def _offered(args: argparse.Namespace, refusal: InputError) -> Iterator[tuple[_Loading, "Prospect"]]:
    """The conversion that is offered, and what it would take. InputError where it does not fit either."""
    from mlx_qwen35.convert.cached import prospect
    from mlx_qwen35.convert.space import check_space

    loading = _Loading(args)
    with prospect(args.model, OFFERED, args.revision) as planned:
        try:
            _check_fits(loading, planned.checkpoint, f"its {OFFERED} conversion")
        except InputError as error:
            raise InputError(
                refusal.code,
                f"{args.model} does not fit into memory: even {error.fault}. Choose a smaller model of the family; "
                "mlx_qwen35 models fit lists what fits",
            ) from refusal
        check_space(planned.disk, folder_of(args.model, OFFERED, args.revision), planned.most - planned.disk)
        yield loading, planned


def _facts(loading: _Loading, planned: "Prospect", name: str, revision: str | None) -> str:
    folder = folder_of(name, OFFERED, revision)
    memory, download, disk, most = (
        f"{count / 1e9:.{1 if count >= 1e8 else 4}f} GB"
        for count in (loading.plan(planned.checkpoint).text, planned.download, planned.disk, planned.most)
    )
    return (
        f"Converted to 4 bit it takes {memory} of memory. That downloads {download} and converts it file by file, "
        f"takes {most} of the disk while it runs, and keeps {disk} in {folder}"
    )
