"""The command mlx_qwen35.doctor."""

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path

import mlx.core as mx
from rich.console import Console

from mlx_qwen35.checkpoint.adapter_choice import choose
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.dtypes import DTYPES
from mlx_qwen35.checkpoint.hub import is_local, look, resolve
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.rope_fields import rescaled
from mlx_qwen35.console.json_output import add_json, check_json, write_json
from mlx_qwen35.console.options import add_model_options, add_options, given_options
from mlx_qwen35.console.parser import Parser
from mlx_qwen35.console.plot import check_plot
from mlx_qwen35.console.progress import Step
from mlx_qwen35.console.run import as_command, load_model
from mlx_qwen35.console.streams import read_file
from mlx_qwen35.distributed.options import RankOptions
from mlx_qwen35.doctor import check, facts, probe
from mlx_qwen35.doctor.facts import Facts
from mlx_qwen35.doctor.pair import pair
from mlx_qwen35.doctor.pair_show import as_json as pair_json
from mlx_qwen35.doctor.pair_show import sections as pair_sections
from mlx_qwen35.doctor.picture import draw_planned
from mlx_qwen35.doctor.plan import CONTEXT, plan_model
from mlx_qwen35.doctor.plan_json import as_json
from mlx_qwen35.doctor.show_plan import show as show_planned
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions, default_dtype, stored_dtype
from mlx_qwen35.machine.memory import limit_of
from mlx_qwen35.model.enabled import enabled_kernels
from mlx_qwen35.options import as_flag, options_of

COMMAND = "mlx_qwen35.doctor"
PAIR = (
    "look at this machine and these, as --with takes them, and at the link between, and say which split of --model "
    "(default: the 4B in 4 bit) they should run; no weights are read"
)
OF_MODEL = ("probe", "revision", "kv_bits", "kv_rotate", "adapter", "adapter_scale")


def parser() -> Parser:
    parser = Parser(
        prog=COMMAND,
        usage="%(prog)s [--model MODEL | --plan MODEL] [--pair HOST] [options]",
        description="Print the machine, the kernels that run on it, the dtype and chunk lengths that are chosen, and "
        "the speed: text to paste into an issue. Without --model, layers of the 4B with random weights in 4 bit are "
        "measured.",
        examples=(
            "", "--plan Qwen/Qwen3.5-4B", "--plan nano --context 4096 --mtp", "--model nano --no-check",
            "--pair mini.local --model Qwen/Qwen3.5-9B",
        ),
    )
    add_model_options(parser, adapters="all are loaded and counted, and what is measured has the one that is alone")
    parser.add_argument(
        "--plan", metavar="MODEL", help="print the memory plan of this model, here and on Macs, and load nothing"
    )
    parser.add_argument("--context", type=int, metavar="N", help=f"tokens for --plan (default: {CONTEXT})")
    parser.add_argument(
        "--mtp",
        type=int,
        nargs="?",
        const=1,
        default=0,
        choices=range(1, 4),
        metavar="DEPTH",
        help="with --plan: count the draft head, and 1 to 3 drafted tokens for a step (default: 1)",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="show the largest activation of each layer of --model, and whether single elements of its keys stand out",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text for --probe (default: a short one)")
    parser.add_argument("--no-check", action="store_true", help="do not measure speed, which takes half a minute")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with --plan: draw the memory into this PNG file")
    add_options(parser, [replace(options_of(RankOptions)["hosts"], name="pair", flag="", help=PAIR)])
    parser.add_argument("--verbose", action="store_true", help="with --plan: every recipe and context, and all parts")
    add_json(parser, "the report, or the plan,")
    return parser


def show_plan(args: argparse.Namespace) -> None:
    """Print the plan of --plan, from headers alone."""
    if others := [as_flag(name) for name in ("model", "probe", "text", "no_check") if getattr(args, name)]:
        raise InputError(
            "option_conflict",
            f"{', '.join(others)} must not be given with --plan, which loads nothing. Choose one",
        )
    if args.plot:
        check_plot(args.plot)
    with Step(f"reading the headers of {args.plan}"), look(args.plan, args.revision) as folder:
        checkpoint = open_checkpoint(folder, rope_scaling=args.rope_scaling)
        given = given_options(args, [LoadOptions])
        options, limit = LoadOptions(**given), limit_of(args.memory_limit)
        adapters = choose(options.adapter, options.adapter_scale, checkpoint, is_local(args.plan, args.revision))
        kv = options.kv_format(checkpoint.config.text.head_dim)
        planned = plan_model(
            args.plan, folder, args.context, args.dtype, args.mtp, limit, kv, args.rope_scaling, adapters
        )
    planned = replace(planned, given=given)
    if not write_json(args.json, as_json(planned)):
        show_planned(planned, Console(file=sys.stdout), args.verbose)
    if args.plot:
        draw_planned(args.plot, planned)


def show_pair(args: argparse.Namespace) -> None:
    """Print what --pair finds. It ends with 1 where the machines cannot run the model together."""
    of_others = ("plan", "context", "mtp", "plot", "verbose", "probe", "text", "no_check")
    if others := [as_flag(name) for name in of_others if getattr(args, name)]:
        raise InputError(
            "option_conflict",
            f"{', '.join(others)} must not be given with --pair, which looks at several machines and loads nothing. "
            "Leave one out",
        )
    if not args.model and (idle := [as_flag(name) for name in OF_MODEL if getattr(args, name)]):
        raise InputError("option_no_effect", f"{', '.join(idle)} must be given with --model, which --pair looks for")
    found = pair(args)
    if not write_json(args.json, pair_json(found)):
        show(pair_sections(found))
    if found.reasons:
        raise SystemExit(1)


def examine(args: argparse.Namespace, given: Mapping[str, str]) -> dict[str, Facts]:
    """Section -> facts; the first is the verdict. given: the environment before this command changed it."""
    of_plan = (args.context is not None, args.mtp, args.verbose, args.plot)
    if idle := [*compress(("--context", "--mtp", "--verbose", "--plot"), of_plan)]:
        raise InputError(
            "option_no_effect", f"{', '.join(idle)} has no effect without --plan; add that or leave it out"
        )
    if args.text and not args.probe:
        raise InputError("option_no_effect", "--text has no effect without --probe; add that or leave it out")
    if not args.model and (idle := [as_flag(name) for name in OF_MODEL if getattr(args, name)]):
        raise InputError(
            "option_no_effect", f"{', '.join(idle)} must be given with --model: there is no other model to look at"
        )
    text_to_probe = _read_text(args.text)
    limit = limit_of(args.memory_limit)
    report = {"machine": facts.machine(limit), "settings of MLX": facts.settings(given)}
    if args.model:
        model, processor = load_model(args)  # refuses a model that does not fit before it is downloaded
        checkpoint = open_checkpoint(resolve(args.model, args.revision), rope_scaling=args.rope_scaling)
        title, stored = f"model {args.model}", stored_dtype(checkpoint)
    else:
        text, stored = parse_config(rescaled(geometry("4b"), args.rope_scaling)).text, mx.bfloat16
        with Step("making random weights"):
            model = check.sample_model(text, DTYPES[args.dtype] if args.dtype else default_dtype(stored), limit)
        title = f"no --model: {check.SAMPLE_LAYERS} layers and the head of the 4B, random weights in 4 bit"
    report[title] = {"dtype": facts.dtype(model.dtype, stored, args.dtype)}
    report[title] |= facts.adapters(model) | facts.prefill(model)
    with Step("checking kernels"):
        enabled = enabled_kernels(model)
        report["kernels"] = facts.kernels(enabled) | facts.rotary(model.rotary)
    if args.probe:
        tokens = processor.tokenizer.encode(text_to_probe, add_special_tokens=False)
        with Step("running the text", "tokens") as progress:
            maxima = probe.residual_maxima(model, tokens, progress)
        report["residual stream"] = {
            f"largest over {len(tokens)} tokens": probe.describe(maxima),
            "after each layer": " ".join(f"{value:.4g}" for value in maxima),
            "key norms, largest weight over median": probe.describe_key_norms(model),
        }
    speed, scale = None, 1 if args.model else len(text.layer_types) / check.SAMPLE_LAYERS
    if not args.no_check:
        with Step("measuring speed", "s") as progress:
            speed = check.measure(model, progress=progress)
        report["check"] = facts.speed(speed, scale)
    return {"verdict": facts.verdict(enabled, speed, scale)} | report


def _read_text(file: Path | None) -> str:
    if file is None:
        return probe.TEXT
    text = read_file("--text", file)
    if not text:
        raise InputError("text_too_short", f"--text must hold some text; {file} is empty")
    return text


def show(report: Mapping[str, Facts]) -> None:
    """The verdict, then the whole report."""
    verdict = [_between_words(name, text) for name, text in report["verdict"].items()]
    print(*verdict, f"\n{COMMAND}, paste from here\n", sep="\n")
    for title, section in report.items():
        print(f"{title}")
        for name, text in section.items():
            print(_between_words(name, f"  {name}: {text}"))
        print()


def _between_words(name: str, line: str) -> str:
    """In a terminal, lines that end between words; whole where a command in it may be copied."""
    if not sys.stdout.isatty() or name == "command" or name.startswith("reason"):
        return line
    indent = "    " if line.startswith(" ") else ""
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def main(arguments: Sequence[str] | None = None) -> None:
    given = dict(os.environ)
    with as_command(COMMAND):
        args = parser().parse(arguments)
        check_json(args.json)
        if args.plan and not args.pair:
            show_plan(args)
            return
        if args.pair:
            show_pair(args)
            return
        report = examine(args, given)
        if not write_json(args.json, report):
            show(report)
