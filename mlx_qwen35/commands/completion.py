"""The command mlx_qwen35.completion: the completion script of a shell, which tests/docs/completion_scripts.py made."""

from importlib import resources

from mlx_qwen35.console.ending import told
from mlx_qwen35.console.parser import Parser

COMMAND = "mlx_qwen35.completion"
SHELLS = ("zsh", "bash", "fish")


def parser() -> Parser:
    parser = Parser(
        prog=COMMAND,
        description="Print a script with which a shell completes commands, options, their values, files and names of "
        "models. It is for a file that the shell reads when it starts, or for this line in it: "
        'eval "$(mlx_qwen35 completion zsh)"',
        examples=(
            "zsh > ~/.zfunc/_mlx_qwen35",
            "bash > ~/.local/share/bash-completion/completions/mlx_qwen35",
            "fish > ~/.config/fish/completions/mlx_qwen35.fish",
        ),
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to read the script")
    return parser


def script(shell: str) -> str:
    return (resources.files("mlx_qwen35.commands") / "completions" / f"mlx_qwen35.{shell}").read_text("utf-8")


def main() -> None:
    with told(COMMAND):
        print(script(parser().parse().shell), end="")


if __name__ == "__main__":
    main()
