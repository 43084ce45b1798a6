"""The command mlx_qwen35.chat: an interactive conversation in the terminal."""

import argparse
import sys

from mlx_qwen35.commands import (
    add_generation_options,
    add_model_options,
    add_sampling_options,
    clean_errors,
    given_options,
    print_pieces,
    prompt_bar,
    require_model,
)
from mlx_qwen35.conversation import Conversation
from mlx_qwen35.errors import InputError
from mlx_qwen35.generate.options import PREFILL_STEP
from mlx_qwen35.load import load

COMMAND = "mlx_qwen35.chat"
HELP = """\
/reset   forget the conversation
/exit    leave (so does Ctrl-D)
/help    this list
Ctrl-C   stop the answer; what was written stays in the conversation"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Talk to a model. In the session:\n" + HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_options(parser)
    add_generation_options(parser)
    add_sampling_options(parser)
    return parser


def answer(conversation: Conversation, text: str, step: int) -> None:
    try:
        with prompt_bar(step) as progress:
            print_pieces(conversation.send(text, progress))
    except KeyboardInterrupt:
        print()
    if conversation.result is None:
        return
    result = conversation.result
    new = conversation.total - conversation.reused
    print(
        f"[prompt {conversation.total} tokens, {conversation.reused} reused, {new} read in "
        f"{conversation.reading_seconds:.2f} s; {result.generation_tokens} tokens at {result.generation_tps:.1f} per "
        f"second, {result.finish_reason}; {result.peak_memory:.3f} GB]",
        file=sys.stderr,
    )


def session(conversation: Conversation, step: int) -> None:
    """Read lines until /exit or the end of input; a message that cannot be read is told and the session goes on."""
    while True:
        try:
            line = input(">> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            print(f"error: a line must be UTF-8 text: {error}", file=sys.stderr)
            continue
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
        elif line == "/help":
            print(HELP)
        elif line.startswith("/"):
            print(f"there is no command {line.split()[0]}; /help lists them", file=sys.stderr)
        elif line:
            try:
                answer(conversation, line, step)
            except InputError as error:
                print(f"error: {error}", file=sys.stderr)


def main() -> None:
    args = parser().parse_args()
    with clean_errors(COMMAND):
        name, options = require_model(args), given_options(args)
        model, processor = load(name, revision=args.revision, dtype=args.dtype)
        if sys.stdin.isatty():
            import readline  # noqa: F401  line editing and history for input()

            print(f"{name}. /help lists the commands.")
        session(Conversation(model, processor, **options), options.get("prefill_step_size", PREFILL_STEP))


if __name__ == "__main__":
    main()
