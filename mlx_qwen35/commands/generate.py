"""The command mlx_qwen35.generate: one prompt in, text out as it comes, then the statistics."""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_qwen35.commands.obtain import add_recipe_option, load_model
from mlx_qwen35.commands.output import print_media, print_pieces, spread_json, spread_text, tell_cut
from mlx_qwen35.commands.session import NO_SESSION, check_session, opened, tell_interrupted
from mlx_qwen35.console.interrupt import INTERRUPTED
from mlx_qwen35.console.json_output import STDOUT, check_json, meaning, write_json
from mlx_qwen35.console.notices import tell
from mlx_qwen35.console.options import (
    DeclaredAction,
    add_answer_options,
    add_model_options,
    add_options,
    add_rank_options,
    check_one_adapter,
    given_options,
)
from mlx_qwen35.console.parser import Parser
from mlx_qwen35.console.progress import Step
from mlx_qwen35.console.run import as_command, refuse_with_ranks, require_model
from mlx_qwen35.console.safe import safe_name
from mlx_qwen35.console.streams import read_file, read_input, standard_input
from mlx_qwen35.distributed.ranks import ranks
from mlx_qwen35.engine.conversation import Turn
from mlx_qwen35.engine.encode import one_message
from mlx_qwen35.engine.generation import start
from mlx_qwen35.engine.options import PromptOptions
from mlx_qwen35.engine.result import Result
from mlx_qwen35.engine.sequence import Sequence as Request
from mlx_qwen35.errors import InputError
from mlx_qwen35.media.fetch import is_remote
from mlx_qwen35.media.pdf import open_pdf
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import option, options_of
from mlx_qwen35.prompt.piece import Piece
from mlx_qwen35.prompt.processor import Messages

COMMAND = "mlx_qwen35.generate"
FULL = {"max_tokens": "cut at --max-tokens", "context": "the context is full", "memory": "memory is full"}
MEDIA = ("images", "videos", "pdfs")


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
    json: Path | None = option(help=meaning("the answer and its counts"), metavar="FILE", bare=STDOUT)
    verbose: bool = option(False, help="tell seed, end and drafts in the statistics too")


class _MediaAction(DeclaredAction):
    """Collects images, videos and PDFs in one list, each with its kind, in the order given."""

    def value(self, namespace: argparse.Namespace, text: list[str], typed: str) -> list[tuple[str, str]]:
        return [*namespace.media, *((self.declared.flag, name) for name in text)]


def parser() -> Parser:
    parser = Parser(
        prog=COMMAND,
        usage="%(prog)s --model MODEL --prompt TEXT [options]",
        description="Answer one prompt. The text goes to standard output, statistics and progress to standard error.",
        stray="a prompt follows --prompt",
        quiet=("-q", "--quiet"),
        examples=(
            '--model nano --prompt "What is 34 + 58?"',
            '--model nano --image a.png --prompt "What do you see?"',
            "--model Qwen/Qwen3.5-4B --recipe 4bit --prompt Hello",
            "--model nano --prompt Hi --quiet --json --max-tokens 20",
        ),
    )
    own, prompt = options_of(CommandOptions), options_of(PromptOptions)
    add_model_options(parser)
    add_recipe_option(parser)
    add_rank_options(parser)
    group = parser.add_argument_group("prompt")
    add_options(group.add_mutually_exclusive_group(), [own["prompt"], own["prompt_file"]])
    for name in MEDIA:
        group.add_argument(
            *prompt[name].flags, dest="media", action=_MediaAction, declared=prompt[name], nargs="+", default=[],
            metavar="FILE", help=prompt[name].help,
        )  # fmt: skip
    add_answer_options(parser, group, [option for option in prompt.values() if option.name not in MEDIA])
    add_options(group, [own["session"]])
    add_options(parser.add_argument_group("output"), [own["json"], own["verbose"]])
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
    if (joined := ranks()) and not joined.launch:
        raise InputError(
            "option_missing",
            "a prompt must be given by --prompt TEXT or --prompt-file FILE to ranks of mlx.launch, which never passes "
            "on the end of standard input",
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


def open_documents(media: Sequence[tuple[str, str]], options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The media with the PDFs opened: one that cannot be, or has other pages, is refused before the model is loaded."""
    opened: list[tuple[str, Any]] = []
    for kind, name in media:
        document = open_pdf(name, options.get("allow_private_urls", False)) if kind == "pdf" else None
        if document:
            document.chosen(options.get("pages"))
        opened.append((kind, document or name))
    return opened


def with_media(prompt: str, media: Sequence[tuple[str, Any]], options: dict[str, Any]) -> str | Messages:
    """The prompt, as messages where it has images, videos or PDFs; takes what it uses out of options."""
    if options.get("ignore_chat_template"):
        for kind, source in media:
            options.setdefault(f"{kind}s", []).append(source)
        return prompt
    if not media and "pages" not in options:
        return prompt
    return one_message(prompt, media, options.pop("system_prompt", None), options.pop("pages", None))


def print_statistics(result: Result, model: Model, media: Sequence[Media], verbose: bool) -> None:
    """What was read and written, how fast, and the memory; with verbose everything."""
    shown = sum(item.tokens for item in media)
    reused = f", {result.cached_tokens} of them read before" if result.cached_tokens else ""
    drafts = result.mtp
    end = FULL[result.limited_by] if result.finish_reason == "length" else result.finish_reason
    ended = "" if end in ("stop", "tool_calls") else f" ({end})"
    details = [f"Ended by: {result.finish_reason}, seed {result.seed}", f"Drafts: {drafts}"]
    details += [f"Adapter: {safe_name(result.adapter)}"] if result.adapter else []
    details += [spread_text(model)] if model.spread else []
    accepted = [f"Drafts: {100 * drafts.accepted / drafts.drafted:.0f} % accepted"] if drafts.drafted else []
    tell(
        "=" * 10,
        *([f"Vision: {shown:,} tokens in {result.vision_seconds:.2f} s"] if result.vision_seconds else []),
        f"Prompt: {result.prompt_tokens} tokens{reused}, {result.prompt_tps:.1f} tokens per second",
        f"Generation: {result.generation_tokens} tokens, {result.generation_tps:.1f} tokens per second{ended}",
        f"Peak memory: {result.peak_memory:.3f} GB",
        *(details if verbose else accepted),
    )


def check_output(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Refuse what would have no effect on the output, or could not be written."""
    if options.get("logprobs") and not args.json:
        raise InputError("option_no_effect", "--logprobs must be given with --json, which has them: text has no place")
    if args.verbose and (args.quiet or args.json == STDOUT):
        other = "--quiet" if args.quiet else "--json without a file, which has all of it"
        raise InputError("option_conflict", f"--verbose must not be given with {other}. Leave one out")
    check_json(args.json)


def run(args: argparse.Namespace) -> int:
    require_model(args)
    check_one_adapter(args)
    refuse_with_ranks(args, "session", NO_SESSION)
    text, options = read_prompt(args), given_options(args)
    check_output(args, options)
    check_there(args.media)
    args.media = open_documents(args.media, options)
    if args.session:
        if options.get("ignore_chat_template"):
            raise InputError(
                "option_conflict", "--ignore-chat-template must not be given with --session: raw text is no message"
            )
        check_session(args.session)
        return run_session(args, text, options)
    prompt = with_media(text, args.media, options)
    model, processor = load_model(args, COMMAND)
    with Step("prefill", "tokens", timed=True) as prefill:
        generation = start(model, processor, [prompt], progress=prefill, media_progress=prefill.images, **options)
        (request,) = generation.requests
        media = [placed.media for placed in request.prompt.media]
        whole = print_answer((piece for _, piece in generation), request, media, prefill, args.json == STDOUT)
    (result,) = generation.results()
    print_result(result, model, media, args)
    return 0 if whole else INTERRUPTED


def run_session(args: argparse.Namespace, text: str, options: dict[str, Any]) -> int:
    """The prompt is the next message of the conversation in a file."""
    content = one_message(text, args.media, None, options.pop("pages", None))[0]["content"]
    model, processor = load_model(args, COMMAND)
    with opened(args.session, model, processor, options) as session:
        if args.media:
            with Step("reading", "images") as reading:
                content = processor.read_parts(content, session.conversation.vision, reading)
        media = [part[part["type"]] for part in content if part["type"] != "text"] if args.media else []
        with Step("prefill", "tokens", timed=True) as prefill:
            turn = session.conversation.send(content, prefill)
            turn.media_progress = prefill.images
            whole = print_answer(turn, turn, media, prefill, args.json == STDOUT)
            turn.cancel()
        if turn.result is not None:
            print_result(turn.result, model, media, args)
        if not whole:
            tell_interrupted(session.conversation, turn)
    return 0 if whole else INTERRUPTED


def print_answer(
    pieces: Iterable[Piece], answer: Request | Turn, media: Sequence[Media], prefill: Step, as_json: bool
) -> bool:
    """Print an answer as it comes, or with as_json how far it has come; False where it was interrupted."""
    prefill.clear()
    print_media(media)
    try:
        if as_json:
            wait_for(pieces, answer, prefill)
        else:
            print_pieces(pieces, prefill)
    except KeyboardInterrupt:
        tell("")
        return False
    return True


def print_result(result: Result, model: Model, media: Sequence[Media], args: argparse.Namespace) -> None:
    found = dataclasses.asdict(result) | {"loop": result.loop and dataclasses.asdict(result.loop)}
    found |= spread_json(model)
    if not write_json(args.json, found, in_a_line=True):
        print_statistics(result, model, media, bool(args.verbose))
    tell_cut(result, model)


def wait_for(pieces: Iterable[Piece], answer: Request | Turn, step: Step) -> None:
    """Run it to its end; how far it has come on stderr, of the most tokens that it may have, each a piece of text."""
    for count, _ in enumerate(pieces, start=1):
        if count == 1:
            step.say("writing")
        step(count, answer.limit)


def main() -> None:
    with as_command(COMMAND, spreads=True):
        sys.exit(run(parser().parse()))


if __name__ == "__main__":
    main()
