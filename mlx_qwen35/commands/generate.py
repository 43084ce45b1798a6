"""The command mlx_qwen35.generate: one prompt in, text out as it comes, then the statistics."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_qwen35.commands.interrupt import INTERRUPTED
from mlx_qwen35.commands.options import (
    DeclaredAction,
    add_answer_options,
    add_model_options,
    add_options,
    given_options,
)
from mlx_qwen35.commands.output import print_media, print_pieces, tell_cut
from mlx_qwen35.commands.parser import Parser
from mlx_qwen35.commands.progress import Step
from mlx_qwen35.commands.run import as_command, load_model, require_model
from mlx_qwen35.commands.streams import read_file, read_input, standard_input
from mlx_qwen35.engine.encode import one_message
from mlx_qwen35.engine.generation import Generation, start
from mlx_qwen35.engine.options import PromptOptions
from mlx_qwen35.engine.result import Result
from mlx_qwen35.errors import InputError
from mlx_qwen35.media.fetch import is_remote
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.options import option, options_of
from mlx_qwen35.prompt.processor import Messages

COMMAND = "mlx_qwen35.generate"


@dataclasses.dataclass(frozen=True)
class CommandOptions:
    """What generate on the command line takes beside the options of the Python function."""

    prompt: str | None = option(
        help="the message; - reads standard input, as a pipe does without this option", aliases=("p",), metavar="TEXT"
    )
    prompt_file: Path | None = option(help="a text file that holds the message", metavar="FILE")
    session: Path | None = option(
        help="a file that holds the conversation: the prompt is its next message, and the answer is saved in it; "
        "written anew where it is absent", metavar="FILE",
    )  # fmt: skip
    json: bool = option(False, help="print one JSON object instead of text and statistics")


class _MediaAction(DeclaredAction):
    """Collects images and videos in one list, each with its kind, in the order given."""

    def value(self, namespace: argparse.Namespace, text: list[str], typed: str) -> list[tuple[str, str]]:
        return [*namespace.media, *((self.declared.flag, name) for name in text)]


def parser() -> Parser:
    parser = Parser(
        prog=COMMAND,
        usage="%(prog)s --model MODEL --prompt TEXT [options]",
        description="Answer one prompt. The text goes to standard output, statistics and progress to standard error.",
        stray="a prompt follows --prompt",
    )
    own, prompt = options_of(CommandOptions), options_of(PromptOptions)
    add_model_options(parser)
    group = parser.add_argument_group("prompt")
    add_options(group.add_mutually_exclusive_group(), [own["prompt"], own["prompt_file"]])
    for name in ("images", "videos"):
        group.add_argument(
            *prompt[name].flags, dest="media", action=_MediaAction, declared=prompt[name], nargs="+", default=[],
            metavar="FILE", help=prompt[name].help,
        )  # fmt: skip
    add_answer_options(parser, group, [option for option in prompt.values() if option.name not in ("images", "videos")])
    add_options(group, [own["session"]])
    add_options(parser.add_argument_group("output"), [own["json"]])
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


def check_there(media: Sequence[tuple[str, str]]) -> None:
    """Refuse files that are not there, given as pairs of kind and name, before the model is loaded."""
    for kind, name in media:
        if is_remote(name):
            continue
        try:
            there = bool(name) and Path(name).expanduser().exists()
        except (OSError, RuntimeError) as error:  # too long, in a closed folder, a home that is none
            raise InputError("media_unreadable", f"--{kind} must name a file that can be read: {error}") from error
        if not there:
            raise InputError(
                "media_not_found",
                f"--{kind} must name files or http(s) URLs; there is no file {name!r}. A prompt follows --prompt",
            )


def with_media(prompt: str, media: Sequence[tuple[str, str]], options: dict[str, Any]) -> str | Messages:
    """The prompt, as messages where it has images or videos; takes what it uses out of options."""
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
    text, options = read_prompt(args), given_options(args)
    if options.get("logprobs") and not args.json:
        raise InputError("option_no_effect", "--logprobs must be given with --json, which has them: text has no place")
    check_there(args.media)
    prompt = with_media(text, args.media, options)
    model, processor = load_model(args)
    status = 0
    with Step("prefill", "tokens", timed=True) as prefill:
        generation = start(model, processor, [prompt], progress=prefill, **options)
        media = [placed.media for placed in generation.requests[0].prompt.media]
        prefill.clear()
        print_media(media)
        try:
            if args.json:
                wait_for(generation, prefill)
            else:
                print_pieces((piece for _, piece in generation), prefill)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            status = INTERRUPTED
    (result,) = generation.results()
    if args.json:
        found = dataclasses.asdict(result) | {"loop": result.loop and dataclasses.asdict(result.loop)}
        print(json.dumps(found, ensure_ascii=False, default=list))  # bytes as numbers
    else:
        print_statistics(result, media)
    tell_cut(result)
    return status


def wait_for(generation: Generation, step: Step) -> None:
    """Run it to its end; how far it has come on stderr, of the most tokens that it may have, each a piece of text."""
    for count, _ in enumerate(generation, start=1):
        if count == 1:
            step.say("writing")
        step(count, generation.requests[0].limit)


def main() -> None:
    with as_command(COMMAND):
        sys.exit(run(parser().parse()))


if __name__ == "__main__":
    main()
