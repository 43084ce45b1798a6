"""The command mlx_qwen35.chat: an interactive conversation in the terminal."""

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qwen35.commands.output import print_media, print_pieces, tell_cut
from mlx_qwen35.commands.session import check_session, opened, save, tell_interrupted
from mlx_qwen35.console.options import add_answer_options, add_model_options, add_options, given_options
from mlx_qwen35.console.parser import Parser
from mlx_qwen35.console.progress import Step
from mlx_qwen35.console.run import as_command, load_model, require_model
from mlx_qwen35.console.streams import MARK, standard_input
from mlx_qwen35.engine.conversation import Conversation
from mlx_qwen35.engine.options import PromptOptions
from mlx_qwen35.engine.result import Result
from mlx_qwen35.engine.session import Session
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import option, options_of

COMMAND = "mlx_qwen35.chat"
HELP = """\
/image F add the image F (a file or URL) to the next message; again for more
/video F add the video F (a file, URL or folder of images)
/drop    remove what was added
/reset   forget the conversation
/save    write the conversation into the file of --session, as leaving does
/exit    leave (so does Ctrl-D)
/help    this list
Ctrl-C   stop the answer; what was written stays in the conversation"""


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
        description="Talk to a model. In the session:\n" + HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prompt = options_of(PromptOptions)
    add_model_options(parser)
    group = parser.add_argument_group("prompt")
    shown = [prompt["system_prompt"], prompt["enable_thinking"]]
    add_answer_options(parser, group, shown, without=("logprobs", "top_logprobs", "tool_choice", "parallel_tool_calls"))
    add_options(group, options_of(CommandOptions).values())
    return parser


def answer(conversation: Conversation, content: str | list[dict[str, Any]]) -> bool:
    """Send a message and print the answer; False where it was interrupted before the message was taken."""
    with Step("prefill", "tokens", timed=True) as prefill:
        turn = conversation.send(content, prefill)
        try:
            print_pieces(turn, prefill)
        except KeyboardInterrupt:
            turn.cancel()
            print()
            if turn.result and not turn.result.tokens:
                tell_interrupted(conversation, turn)
    result = turn.result
    if result is None:
        return False
    if not result.tokens:
        return False
    print(
        f"[prompt {turn.total} tokens, {turn.reused} reused, {turn.total - turn.reused} prefilled in "
        f"{turn.prefill_seconds:.2f} s; {result.generation_tokens} tokens at {result.generation_tps:.1f} per "
        f"second, {result.finish_reason}; {_drafts(result)}{result.peak_memory:.3f} GB]",
        file=sys.stderr,
    )
    tell_cut(result, conversation.model, "/reset begins anew")
    return True


def _drafts(result: Result) -> str:
    drafts = result.mtp
    return f"{drafts.accepted} of {drafts.drafted} drafts accepted; " if drafts.drafted else ""


def read_media(
    conversation: Conversation, command: str, name: str, shown: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Read an image or a video, which is refused now if it must be, and return the media of the next message."""
    kind = command.removeprefix("/")
    if not name:
        raise InputError("option_missing", f"{command} must name a file or URL")
    with Step(f"reading {name}"):
        parts = conversation.processor.read_parts([{"type": kind, kind: _unquoted(name)}], conversation.vision)
    print_media([parts[0][kind]], [part[part["type"]] for part in shown])
    return shown + parts


def _unquoted(name: str) -> str:
    """A file's name as it was typed, quoted, or dropped from the Finder, which escapes blanks."""
    try:
        words = shlex.split(name)
    except ValueError:
        return name
    return words[0] if len(words) == 1 else name


def talk(conversation: Conversation, session: Session | None = None) -> None:
    """Read lines until /exit or the end of input; a message that cannot be read is told and the talk goes on.

    session: the file of the conversation.
    """
    shown: list[dict[str, Any]] = []  # goes with the next message
    while True:
        try:
            line = input(">> ").removeprefix(MARK).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            print(f"error: a line must be UTF-8 text: {error} [text_unreadable]", file=sys.stderr)
            continue
        except OSError as error:
            raise InputError("text_unreadable", f"standard input must be readable: {error}") from error
        if line == "/exit":
            return
        try:
            if line.split(None, 1)[:1] == ["/save"]:
                _save(session, line)
            else:
                shown = _obey(conversation, line, shown)
        except InputError as error:
            print(f"error: {error} [{error.code}]", file=sys.stderr)
        except KeyboardInterrupt:
            print()


def _save(session: Session | None, line: str) -> None:
    if line != "/save":
        raise InputError("option_unknown", f"/save takes no name: the file is that of --session; got {line}")
    if session is None:
        raise InputError("option_missing", "/save needs --session FILE when the command starts; there is no file")
    save(session)


def _obey(conversation: Conversation, line: str, shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Do what a line says, and return what goes with the next message."""
    command, *rest = line.split(None, 1) or [""]
    if command in ("/image", "/video"):
        return read_media(conversation, command, "".join(rest), shown)
    if line in ("/reset", "/drop"):
        if line == "/reset":
            conversation.reset()
        return []
    if line == "/help":
        print(HELP)
    elif line.startswith("/"):
        print(f"there is no command {command}; /help lists them", file=sys.stderr)
    elif line:
        taken = answer(conversation, [*shown, {"type": "text", "text": line}] if shown else line)
        return [] if taken else shown
    return shown


def main() -> None:
    with as_command(COMMAND):
        args = parser().parse()
        name, options = require_model(args), given_options(args)
        at_terminal = standard_input().isatty()
        if args.session:
            check_session(args.session)
        model, processor = load_model(args)
        if at_terminal:
            import readline  # noqa: F401  line editing and history for input()

            print(f"{name}. /help lists the commands.")
        if not args.session:
            talk(Conversation(model, processor, **options))
            return
        with opened(args.session, model, processor, options) as session:
            talk(session.conversation, session)


if __name__ == "__main__":
    main()
