"""The command mlx_qwen35.eval: --model MODEL --tasks kl,nano,FILE.yaml --out FOLDER"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from mlx_qwen35.checkpoint.hub import look
from mlx_qwen35.console.interrupt import unwound_when_ended
from mlx_qwen35.console.json_output import STDOUT, add_json, check_json, write_json
from mlx_qwen35.console.options import add_options, add_rank_options, given_options
from mlx_qwen35.console.parser import Parser
from mlx_qwen35.console.run import as_command, require_model
from mlx_qwen35.distributed.options import RankOptions
from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.dry_run import look_ahead
from mlx_qwen35.evaluate.evaluation import prepared
from mlx_qwen35.evaluate.options import OF_ANSWERS, EvalOptions
from mlx_qwen35.evaluate.shown import Shown
from mlx_qwen35.evaluate.summary import described
from mlx_qwen35.load import LoadOptions
from mlx_qwen35.options import options_of

COMMAND = "mlx_qwen35.eval"


def parser() -> Parser:
    parser = Parser(
        prog=COMMAND,
        usage="%(prog)s --model MODEL --tasks NAMES --out FOLDER [options]",
        description="Measure how well a model answers: on questions of your own, on tasks of lm-eval, or against "
        "another form of it, by KL divergence. Write a line for each answer and a summary. A run that was ended goes "
        "on by the same command.",
        examples=(
            "--model nano --tasks nano --out nano-eval",
            "--model Qwen3.5-4B-4bit --against Qwen/Qwen3.5-4B --tasks kl --text book.txt --out 4bit-eval",
            "--model Qwen/Qwen3.5-4B --tasks house.yaml --adapter house-adapter --out house-eval",
            "--model Qwen/Qwen3.5-4B --tasks house.yaml --dry-run",
        ),
    )
    add_options(parser, options_of(EvalOptions).values())
    add_options(parser.add_argument_group("model"), options_of(LoadOptions).values())
    add_rank_options(parser)
    group = parser.add_argument_group("answers (default: as the task has it, else the published preset)")
    add_options(group, OF_ANSWERS.values())
    add_json(parser, "the summary, or what --dry-run finds,")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    with as_command(COMMAND, spreads=True):
        args = parser().parse(arguments)
        check_json(args.json)
        require_model(args)
        options = EvalOptions(**given_options(args, [EvalOptions]))
        load = LoadOptions(**given_options(args, [LoadOptions]))
        machines = RankOptions(**given_options(args, [RankOptions]))
        answers = {name: value for name, value in vars(args).items() if name in OF_ANSWERS and value is not None}
        if options.dry_run:
            if machines.hosts:
                raise InputError("option_no_effect", "--with has no effect on --dry-run, which loads nothing")
            _look(args, load, options, answers)
            return
        out = Path(options.out) if options.out else None
        with unwound_when_ended(), Shown(out) as shown:
            summary = prepared(load, options, answers, shown.watch, ranks=machines).run()
        if args.json != STDOUT:
            print(described(summary), flush=True)
        write_json(args.json, summary)


def _look(args: argparse.Namespace, load: LoadOptions, options: EvalOptions, answers: dict[str, object]) -> None:
    """Print what --dry-run finds."""
    assert load.model is not None
    with Shown() as shown, ExitStack() as stack:
        folder = stack.enter_context(look(load.model, load.revision, texts=True))
        other = options.against and stack.enter_context(look(options.against, texts=True))
        found = look_ahead(prepared(load, options, answers, shown.watch, (folder, other or None)))
    if not write_json(args.json, found.as_json()):
        print(found.described())
