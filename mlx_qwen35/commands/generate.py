"""The command mlx_qwen35.generate: one prompt in, text out as it comes, then the statistics."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_qwen35.commands.common import (
    Parser,
    add_generation_options,
    add_model_options,
    add_sampling_options,
    add_version,
    add_vision_options,
    as_command,
    check_there,
    given_options,
    load_model,
    print_media,
    print_pieces,
    require_model,
    tell_cut,
)
from mlx_qwen35.commands.interrupt import INTERRUPTED
from mlx_qwen35.commands.progress import Step
from mlx_qwen35.commands.streams import read_file, read_input, standard_input
from mlx_qwen35.engine.generation import Generation, Result, start
from mlx_qwen35.engine.options import one_message
from mlx_qwen35.errors import InputError
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.prompt.processor import Messages

COMMAND = "mlx_qwen35.generate"


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=COMMAND,
        description="Answer one prompt. The text goes to standard output, statistics and progress to standard error.",
    )
    add_version(parser)
    add_model_options(parser)
    group = parser.add_argument_group("prompt")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", "-p", help="the message; - reads standard input, as does giving none with a pipe")
    source.add_argument("--prompt-file", type=Path, help="a text file that holds the message")
    for kind, source in (("image", "a file, URL or data: URI"), ("video", "a file, URL, or a folder of pictures")):
        group.add_argument(
            f"--{kind}",
            dest="media",
            action="append",
            default=[],
            type=lambda name, kind=kind: (kind, name),
            metavar="FILE",
            help=f"{source}, put before the message; images and videos may repeat and mix and keep their order",
        )
    group.add_argument("--ignore-chat-template", action="store_true", help="complete the raw text instead of chatting")
    add_generation_options(parser)
    add_sampling_options(parser)
    add_vision_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text and statistics")
    return parser


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt_file:
        return read_file("--prompt-file", args.prompt_file)
    if args.prompt not in (None, "-"):
        return args.prompt
    if args.prompt is None and standard_input().isatty():
        raise InputError(
            "option_missing", "a prompt must be given: --prompt TEXT, --prompt-file FILE, or text on standard input"
        )
    return read_input()


def with_media(prompt: str, media: Sequence[tuple[str, str]], options: dict[str, Any]) -> str | Messages:
    """The prompt, as a message with its images and clips where there are some; takes what it uses out of options."""
    if options.get("ignore_chat_template"):
        for kind, source in media:
            options.setdefault(f"{kind}s", []).append(source)
        return prompt
    if not media:
        return prompt
    return one_message(prompt, media, options.pop("system_prompt", None))


def print_statistics(result: Result, media: Sequence[Media]) -> None:
    shown = sum(item.tokens for item in media)
    lines = (
        "=" * 10,
        *([f"Vision: {shown:,} tokens in {result.vision_seconds:.2f} s"] if result.vision_seconds else []),
        f"Prompt: {result.prompt_tokens} tokens, {result.prompt_tps:.1f} tokens per second",
        f"Generation: {result.generation_tokens} tokens, {result.generation_tps:.1f} tokens per second "
        f"({result.finish_reason}, seed {result.seed})",
        f"Drafts: {result.mtp}",
        f"Peak memory: {result.peak_memory:.3f} GB",
    )
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    require_model(args)
    prompt = read_prompt(args)
    options = given_options(args) | {"ignore_chat_template": args.ignore_chat_template or None}
    check_there(args.media)
    prompt = with_media(prompt, args.media, options)
    model, processor = load_model(args)
    status = 0
    with Step("reading the prompt", "tokens") as reading:
        generation = start(model, processor, [prompt], progress=reading, **options)
        media = [placed.media for placed in generation.prompts[0].media]
        print_media(media)
        try:
            if args.json:
                wait_for(generation, reading)
            else:
                print_pieces((piece for _, piece in generation), reading)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            status = INTERRUPTED
    (result,) = generation.results()
    if args.json:
        print(json.dumps(dataclasses.asdict(result), ensure_ascii=False))
    else:
        print_statistics(result, media)
    tell_cut(result)
    return status


def wait_for(generation: Generation, step: Step) -> None:
    """Run it to its end; how far it has come on stderr, of the most tokens that it may have, each a piece of text."""
    for count, _ in enumerate(generation, start=1):
        if count == 1:
            step.say("writing")
        step(count, generation.plan.limits[0])


def main() -> None:
    with as_command(COMMAND):
        sys.exit(run(parser().parse_args()))


if __name__ == "__main__":
    main()
