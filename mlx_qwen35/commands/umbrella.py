"""The command mlx_qwen35: generate, chat, serve and the others behind one name."""

import importlib
import sys

from mlx_qwen35.console.parser import Parser

# Name -> the module whose main() it is, and what it is for.
COMMANDS = {
    "generate": ("mlx_qwen35.commands.generate", "answer one prompt"),
    "chat": ("mlx_qwen35.commands.chat", "talk to a model"),
    "serve": ("mlx_qwen35.commands.serve", "serve a model: OpenAI's and Anthropic's APIs, and a page"),
    "convert": ("mlx_qwen35.convert.__main__", "quantize a checkpoint"),
    "models": ("mlx_qwen35.commands.models", "list, remove and choose models"),
    "bench": ("mlx_qwen35.bench", "measure speed"),
    "doctor": ("mlx_qwen35.doctor", "look at this machine, and what fits"),
}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        name = sys.argv.pop(1)
        importlib.import_module(COMMANDS[name][0]).main()
        return
    listed = "\n".join(f"  {name:10} {what}" for name, (_, what) in COMMANDS.items())
    parser = Parser(prog="mlx_qwen35", description="Qwen3.5 on Apple Silicon.", epilog=listed)
    parser.parse()
    parser.print_help()
