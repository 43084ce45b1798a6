"""The command mlx_qwen35.train: --model MODEL --data FOLDER --adapter OUT"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.hub import look
from mlx_qwen35.console.interrupt import unwound_when_ended
from mlx_qwen35.console.json_output import STDOUT, add_json, check_json, write_json
from mlx_qwen35.console.options import add_options, given_options
from mlx_qwen35.console.parser import Parser
from mlx_qwen35.console.run import as_command, require_model
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions
from mlx_qwen35.options import listed, options_of
from mlx_qwen35.train.dry_run import look_ahead
from mlx_qwen35.train.options import RunOptions, TrainOptions
from mlx_qwen35.train.shown import Shown, summary
from mlx_qwen35.train.state import RunFolder
from mlx_qwen35.train.training import prepared, train

COMMAND = "mlx_qwen35.train"
OF_MODEL = ("model", "revision", "dtype", "memory_limit")  # the options of load that a run has
GROUPS = {
    "what is trained": ("rank", "alpha", "targets", "layers", "from_adapter", "draft_head", "adapter_format"),
    "rows": ("max_length", "mask_prompt", "batch_size", "accumulate", "pieces"),
    "steps": ("steps", "epochs", "optimizer", "learning_rate", "schedule", "warmup", "weight_decay", "clip", "seed"),
    "validation and saving": ("validate_every", "validation_rows", "patience", "save_every"),
}


def parser() -> Parser:
    parser = Parser(
        prog=COMMAND,
        usage="%(prog)s --model MODEL --data FOLDER --adapter FOLDER [options]",
        description="Train low-rank parts beside a model's weights (LoRA; QLoRA where the model is quantized) on the "
        "rows of FOLDER/train.jsonl: messages with tools and images, prompt and completion, or text. Write an adapter "
        "in PEFT's format.",
        examples=(
            "--model Qwen/Qwen3.5-4B --data lessons --adapter lessons-adapter --dry-run",
            "--model Qwen/Qwen3.5-4B --data lessons --adapter lessons-adapter",
            "--model Qwen/Qwen3.5-4B --data lessons --adapter lessons-adapter --resume",
        ),
    )
    load, own = options_of(LoadOptions), options_of(TrainOptions)
    add_options(parser, options_of(RunOptions).values())
    add_options(parser.add_argument_group("model"), [load[name] for name in OF_MODEL])
    for title, names in GROUPS.items():
        add_options(parser.add_argument_group(title), [own[name] for name in names])
    add_json(parser, "what was trained, or would be,")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    with as_command(COMMAND):
        args = parser().parse(arguments)
        check_json(args.json)
        require_model(args)
        if not args.data:
            raise InputError("option_missing", "--data must be given: a folder with a train.jsonl")
        options, given = TrainOptions(**given_options(args, [TrainOptions])), _of_model(args)
        if args.dry_run:
            _look(args, options, given)
            return
        if not args.adapter:
            raise InputError("option_missing", "--adapter must be given: the folder to write")
        _train(args, options, given)


def _of_model(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in given_options(args, [LoadOptions]).items() if name in OF_MODEL}


def _look(args: argparse.Namespace, options: TrainOptions, given: dict[str, Any]) -> None:
    """Print what --dry-run finds."""
    if idle := [name for name in ("resume", "report") if getattr(args, name) is not None]:
        raise InputError("option_no_effect", f"{listed(idle)} has no effect with --dry-run; leave it out")
    if args.adapter:
        RunFolder(Path(args.adapter).expanduser()).check(resume=True)
    load = LoadOptions(**given)
    assert load.model is not None
    with Shown() as shown, look(load.model, load.revision, texts=True) as folder:
        found = look_ahead(prepared(load, args.data, options, folder, shown.reads))
    if not write_json(args.json, found.as_json()):
        print(found.described())


def _train(args: argparse.Namespace, options: TrainOptions, given: dict[str, Any]) -> None:
    with unwound_when_ended(), Shown() as shown:
        trained = train(
            data=args.data, adapter=args.adapter, options=options, resume=bool(args.resume),
            report=args.report is not False, watchers=[shown], reads=shown.reads, **given,
        )  # fmt: skip
    if args.json != STDOUT:
        print(summary(trained), flush=True)
    write_json(args.json, trained.as_json())
