"""The command mlx_qwen35.chat: an interactive conversation in the terminal."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.commands.chat.loop import run
from mlx_qwen35.commands.chat.orders import help_text
from mlx_qwen35.commands.chat.reader import PlainReader
from mlx_qwen35.commands.chat.screen import PlainScreen
from mlx_qwen35.commands.chat.talk import Talk
from mlx_qwen35.commands.obtain import add_recipe_option, load_model
from mlx_qwen35.commands.session import check_session, opened
from mlx_qwen35.console.options import add_answer_options, add_model_options, add_options, given_options
from mlx_qwen35.console.parser import Parser
from mlx_qwen35.console.run import as_command, require_model
from mlx_qwen35.console.streams import standard_input
from mlx_qwen35.engine.conversation import Conversation
from mlx_qwen35.engine.options import PromptOptions
from mlx_qwen35.options import option, options_of

COMMAND = "mlx_qwen35.chat"


@dataclass(frozen=True)
class CommandOptions:
    """What chat on the command line takes beside the options of a conversation."""

    session: Path | None = option(
        help="a file that holds the conversation: read where it is there, written by /save and at the end",
        metavar="FILE",
    )


def parser() -> Parser:
    parser = Parser(
        prog=COMMAND,
        usage="%(prog)s --model MODEL [options]",
        description="Talk to a model. In the session:\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prompt = options_of(PromptOptions)
    add_model_options(parser)
    add_recipe_option(parser)
    group = parser.add_argument_group("prompt")
    shown = [prompt["system_prompt"], prompt["enable_thinking"]]
    add_answer_options(parser, group, shown, without=("logprobs", "top_logprobs", "tool_choice", "parallel_tool_calls"))
    add_options(group, options_of(CommandOptions).values())
    return parser


def main() -> None:
    with as_command(COMMAND):
        args = parser().parse()
        name, options = require_model(args), given_options(args)
        if args.session:
            check_session(args.session)
        model, processor = load_model(args, COMMAND)
        reader, screen = PlainReader(), PlainScreen()
        if standard_input().isatty():
            screen.say(f"{name}. /help lists the commands.")
        if not args.session:
            run(Talk(Conversation(model, processor, **options), reader, screen))
            return
        with opened(args.session, model, processor, options) as session:
            run(Talk(session.conversation, reader, screen, session))


if __name__ == "__main__":
    main()
