"""The command mlx_qwen35.models: what is on this machine (list), taking it off (remove), and what fits (fit)."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from mlx_qwen35.commands.fit import as_json, fits, format_fits
from mlx_qwen35.commands.stored import PLACES, Stored, stored
from mlx_qwen35.console.interrupt import as_typed
from mlx_qwen35.console.json_output import STDOUT, add_json, check_json, write_json
from mlx_qwen35.console.notices import tell
from mlx_qwen35.console.parser import Parser
from mlx_qwen35.console.progress import Step
from mlx_qwen35.console.run import as_command
from mlx_qwen35.console.safe import safe_name
from mlx_qwen35.console.streams import standard_input
from mlx_qwen35.console.table import align, size
from mlx_qwen35.errors import CODES, InputError
from mlx_qwen35.machine.chip import chip_name
from mlx_qwen35.machine.memory import limit_of
from mlx_qwen35.options import either
from mlx_qwen35.values import choice

COMMAND = "mlx_qwen35.models"


def parser() -> Parser:
    """Of the list, which is what comes without another action."""
    parser = Parser(
        prog=COMMAND,
        usage="%(prog)s [list] [options]\n       %(prog)s remove NAME... [options]\n       %(prog)s fit [options]",
        description="List the models on this machine; remove some; say which fit. The options below are those of list; "
        "remove --help and fit --help show the others.",
        examples=("", "fit", "fit --memory 16 --chip M4", "remove Qwen/Qwen3.5-4B"),
    )
    parser.add_argument("--all", action="store_true", help="show models of other families too, which do not run here")
    add_json(parser, "the list")
    return parser


def remove_parser() -> Parser:
    parser = Parser(
        prog=f"{COMMAND} remove",
        description="Remove models from Hugging Face's cache, or conversions from this program's. LM Studio's are "
        "removed in LM Studio; one that a process has loaded, downloads or converts stays.",
        examples=("Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-4B --recipe 4bit", "Qwen/Qwen3.5-2B Qwen/Qwen3.5-4B --yes"),
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="as the list has it: what follows --model")
    parser.add_argument("--recipe", metavar="NAME", help="the conversion by this recipe, and not what was downloaded")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_json(parser, "what was removed")
    return parser


def fit_parser() -> Parser:
    parser = Parser(
        prog=f"{COMMAND} fit",
        description="Say which recipe of which size of Qwen3.5 fits this machine, or another Mac: memory, longest "
        "context and speed, computed, and the command to type.",
        examples=("", "--memory 8", "--memory 32 --chip 'M2 Max'", "--json"),
    )
    parser.add_argument("--memory", type=float, metavar="GB", help="of another Mac")
    parser.add_argument("--chip", metavar="NAME", help="of that Mac, as M4 or 'M2 Max' (default: M1)")
    add_json(parser, "the table")
    return parser


# --- list ------------------------------------------------------------------------------------------------------------


def list_models(args: argparse.Namespace) -> None:
    with Step("looking at the models on this machine"):
        found = [model for model in stored() if args.all or model.of_family]
    if not write_json(args.json, [described(model) for model in found]):
        print(format_list(found))


def described(model: Stored) -> dict[str, object]:
    return {
        "model": model.name, "recipe": model.recipe or None, "place": model.place, "folder": str(model.folder),
        "bytes": model.nbytes, "storage": model.storage or None, "holds": model.holds, "last_used": model.used,
        "fault": model.fault or None,
    }  # fmt: skip


def format_list(found: Sequence[Stored]) -> str:
    """A table for each place; what a model holds beside text; names last, so that long ones break nothing."""
    lines = []
    for place, title in PLACES.items():
        here = [model for model in found if model.place == place]
        rows = [
            (f"  {size(model.nbytes)}", safe_name(model.storage) or "-",
             ", ".join(model.holds[1:] or model.holds) or "-", day(model.used),
             safe_name(model.typed))
            for model in here
        ]  # fmt: skip
        faults = [f"  {safe_name(model.typed)}: {CODES.get(model.fault, model.fault)}" for model in here if model.fault]
        lines += [title, *align(rows, left=range(1, 5)), *faults, ""] if rows else []
    lines.append(f"{size(sum(model.nbytes for model in found))} in all. The last column is what follows --model.")
    return "\n".join(lines)


def day(seconds: float | None) -> str:
    """The day of a time in seconds since 1970."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d", time.localtime(seconds))


# --- remove ----------------------------------------------------------------------------------------------------------


def remove_models(args: argparse.Namespace) -> None:
    check_json(args.json)
    with Step("looking at the models on this machine"):
        known = stored()
    chosen, removed = [named(name, args.recipe, known) for name in dict.fromkeys(args.names)], []
    for model in chosen:
        if not args.yes and not agreed(model):
            tell(f"kept {safe_name(model.typed)}")
            continue
        assert model.remove
        model.remove()
        removed.append(described(model))
        if args.json != STDOUT:
            print(f"removed {safe_name(model.typed)}: {size(model.nbytes)} freed", flush=True)
    write_json(args.json, removed)


def named(name: str, recipe: str | None, known: Sequence[Stored]) -> Stored:
    """The model of this name, which can be removed here, or InputError."""
    of_name = [model for model in known if name.rstrip("/") in (model.name, str(model.folder))]
    found = [model for model in of_name if model.recipe == (recipe or "")]
    if not found:
        recipes = [f"--recipe {model.recipe}" for model in of_name if model.recipe]
        hint = f"there is a conversion: {either(recipes)}" if recipes else f"{as_typed(COMMAND)} lists what is there"
        what = f"{name} --recipe {recipe}" if recipe else name
        raise InputError("model_not_found", f"there is no {what} on this machine; {hint}")
    (model, *_) = found
    if model.place == "lm studio":
        raise InputError("target_refused", f"{name} belongs to LM Studio: remove it there, under My Models")
    if not model.remove:
        raise InputError("target_refused", f"{name} comes with the package, and is a few MB: it stays")
    if model.check_unused:
        model.check_unused()
    return model


def agreed(model: Stored) -> bool:
    """Whether the user, at a terminal, wants it removed."""
    name = safe_name(model.typed)
    if not standard_input().isatty():
        raise InputError("option_missing", f"--yes must be given to remove {name} where nobody can be asked")
    where = PLACES[model.place]
    print(f"Remove {name} ({where}, {size(model.nbytes)})? [y/N] ", end="", file=sys.stderr, flush=True)
    return standard_input().readline().strip().lower() in ("y", "yes")


# --- fit -------------------------------------------------------------------------------------------------------------


def show_fit(args: argparse.Namespace) -> None:
    if args.chip and args.memory is None:
        raise InputError("option_no_effect", "--chip must be given with --memory: it is another Mac's")
    if args.memory is not None and not 1 <= args.memory <= 4096:
        raise InputError("option_invalid", f"--memory must be the GB of a Mac, 1 to 4,096, got {args.memory:g}")
    chip = chip_name("--chip", args.chip or "M1")
    with Step("planning memory"):
        machine, found = fits(limit_of(None), args.memory, chip)
    if not write_json(args.json, as_json(machine, found)):
        print(format_fits(machine, found))


# --- the command -----------------------------------------------------------------------------------------------------

ACTIONS: dict[str, tuple[Callable[[], Parser], Callable[[argparse.Namespace], None]]] = {
    "list": (parser, list_models),
    "remove": (remove_parser, remove_models),
    "fit": (fit_parser, show_fit),
}


def main(arguments: Sequence[str] | None = None) -> None:
    with as_command(COMMAND):
        words = list(sys.argv[1:] if arguments is None else arguments)
        named = bool(words) and not words[0].startswith("-")
        make, act = ACTIONS[choice("the action", words.pop(0), ACTIONS) if named else "list"]
        act(make().parse(words))


if __name__ == "__main__":
    main()
