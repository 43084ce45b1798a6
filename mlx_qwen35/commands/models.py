"""The command mlx_qwen35.models: what is cached, what it takes, what fits."""

from mlx_qwen35.console.parser import Parser
from mlx_qwen35.console.run import as_command

COMMAND = "mlx_qwen35.models"


def parser() -> Parser:
    return Parser(prog=COMMAND, description="List, remove and choose models.")


def main() -> None:
    with as_command(COMMAND):
        parser().parse()
