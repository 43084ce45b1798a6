"""The command mlx_qwen35: generate, chat, serve and the others behind one name.

Help and completion come at once: MLX is imported by the command that runs.
"""

import difflib
import importlib
import sys

from mlx_qwen35 import __version__
from mlx_qwen35.console.ending import told
from mlx_qwen35.console.interrupt import PACKAGE, tell_errors
from mlx_qwen35.errors import InputError

# Name -> the module that has its main() and its parser(), and what it is for. A new command is one line here.
COMMANDS = {
    "generate": ("mlx_qwen35.commands.generate", "answer one prompt"),
    "chat": ("mlx_qwen35.commands.chat", "talk to a model"),
    "serve": ("mlx_qwen35.commands.serve", "serve a model: OpenAI's and Anthropic's APIs, and a page"),
    "convert": ("mlx_qwen35.convert.__main__", "quantize a checkpoint"),
    "train": ("mlx_qwen35.train.command", "train an adapter on your own rows (LoRA, QLoRA)"),
    "eval": ("mlx_qwen35.evaluate.command", "measure how well a model answers"),
    "models": ("mlx_qwen35.commands.models", "say which models fit, list and remove those that are here"),
    "bench": ("mlx_qwen35.bench.command", "measure speed"),
    "doctor": ("mlx_qwen35.doctor.command", "look at this machine, and plan memory"),
    "completion": ("mlx_qwen35.commands.completion", "print the completion script of a shell"),
}
LIGHT = ("completion",)  # commands that need no MLX
EXAMPLES = """\
  mlx_qwen35 chat --model nano              a tiny model: nothing is downloaded
  mlx_qwen35 models fit                     what fits here, and how to get it
  mlx_qwen35 chat --model Qwen/Qwen3.5-4B   the 4B, downloaded once
"""


def help_text() -> str:
    listed = "".join(f"  {name:12}{what}\n" for name, (_, what) in COMMANDS.items())
    return (
        f"usage: {PACKAGE} COMMAND [options]\n\nQwen3.5 on Apple Silicon: text, images and video.\n\n"
        f"To begin with:\n{EXAMPLES}\ncommands:\n{listed}\n"
        f"{PACKAGE} COMMAND --help shows a command's options and examples."
    )


def main() -> None:
    """Run the command that the process's words name."""
    first, *rest = sys.argv[1:] or ["--help"]
    if first == "help" and rest:
        first, rest = rest[0], ["--help"]
    if first in COMMANDS:
        sys.argv[1:] = rest
        if first not in LIGHT:
            with tell_errors():
                importlib.import_module("mlx_qwen35.backend")  # before all else that needs MLX, which may be unusable
        importlib.import_module(COMMANDS[first][0]).main()
    else:
        with told(PACKAGE):
            answer(first)
        sys.exit(0)


def answer(word: str) -> None:
    """What a word that is no command asks for."""
    if word in ("help", "-h", "--help"):
        print(help_text())
    elif word == "--version":
        print(PACKAGE, __version__)
    else:
        nearest = difflib.get_close_matches(word, [*COMMANDS, "help", "--help", "--version"], n=1)
        meant = f"; did you mean {nearest[0]}?" if nearest else "."
        raise InputError("option_unknown", f"there is no command {word}{meant} {PACKAGE} --help lists them")
