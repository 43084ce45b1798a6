"""The command mlx_qwen35.chat: an interactive conversation in the terminal."""

import argparse
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.commands.chat.about import describe
from mlx_qwen35.commands.chat.loop import run
from mlx_qwen35.commands.chat.orders import ORDERS, help_text
from mlx_qwen35.commands.chat.reader import PlainReader, Reader
from mlx_qwen35.commands.chat.screen import PlainScreen, Screen
from mlx_qwen35.commands.chat.talk import Talk
from mlx_qwen35.commands.obtain import add_recipe_option, settle
from mlx_qwen35.commands.session import NO_SESSION, check_session, open_session
from mlx_qwen35.console.interrupt import unwound_when_ended
from mlx_qwen35.console.options import (
    add_answer_options,
    add_model_options,
    add_options,
    add_rank_options,
    given_options,
)
from mlx_qwen35.console.parser import Parser
from mlx_qwen35.console.run import as_command, load_model, refuse_with_ranks, require_model
from mlx_qwen35.console.streams import standard_input
from mlx_qwen35.engine.conversation import Conversation
from mlx_qwen35.engine.options import PromptOptions
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import option, options_of

COMMAND = "mlx_qwen35.chat"


@dataclass(frozen=True)
class CommandOptions:
    """What chat on the command line takes beside the options of a conversation."""

    session: Path | None = option(
        help="a file that holds the conversation: read where it is there, written by /save and at the end",
        metavar="FILE",
    )
    hide_thinking: bool = option(False, help="show one line in place of the reasoning")
    verbose: bool = option(False, help="show all figures of each answer")


def parser() -> Parser:
    parser = Parser(
        prog=COMMAND,
        usage="%(prog)s --model MODEL [options]",
        description="Talk to a model. In the session:\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        quiet=("-q", "--quiet"),
        examples=(
            "--model nano",
            "--model Qwen/Qwen3.5-4B --recipe 4bit",
            "--model nano --session notes.session --no-enable-thinking",
        ),
    )
    prompt = options_of(PromptOptions)
    add_model_options(parser, adapters="/set adapter takes one, where several are loaded")
    add_recipe_option(parser)
    add_rank_options(parser)
    group = parser.add_argument_group("prompt")
    shown = [prompt["system_prompt"], prompt["enable_thinking"]]
    add_answer_options(parser, group, shown, without=("logprobs", "top_logprobs", "tool_choice", "parallel_tool_calls"))
    add_options(group, options_of(CommandOptions).values())
    return parser


def interface(hide_thinking: bool, verbose: bool) -> tuple[Reader, Screen]:
    """What reads and what shows: each plain where it has no terminal that moves a cursor."""
    moves = os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    typed, outputs = standard_input().isatty(), [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]
    reader: Reader = PlainReader(">>> " if typed and sys.stderr.isatty() else "")
    screen: Screen = PlainScreen(hide_thinking, verbose)
    if moves and typed and outputs:
        from mlx_qwen35.commands.chat.prompt import TerminalReader

        reader = TerminalReader(ORDERS, outputs[0])
    if moves and sys.stdout.isatty():
        from mlx_qwen35.commands.chat.terminal import TerminalScreen

        screen = TerminalScreen(hide_thinking, verbose)
    return reader, screen


def main() -> None:
    with as_command(COMMAND, spreads=True), unwound_when_ended():
        args = parser().parse()
        name, options = require_model(args), given_options(args)
        if args.quiet and args.verbose:
            raise InputError("option_conflict", "--verbose and --quiet must not be given together. Leave one out")
        refuse_with_ranks(args, "session", NO_SESSION)
        if args.session:
            check_session(args.session)
        reader, screen = interface(bool(args.hide_thinking), bool(args.verbose))
        folder = settle(args, COMMAND)  # which may ask, while the terminal still shows what is typed
        with screen.opened():
            model, processor = load_model(args, folder)
            if standard_input().isatty():
                screen.note(describe(name, model))
            session = open_session(args.session, model, processor, options) if args.session else None
            conversation = session.conversation if session else Conversation(model, processor, **options)
            with closing(Talk(conversation, reader, screen, session, name)) as talk:
                run(talk)


if __name__ == "__main__":
    main()
