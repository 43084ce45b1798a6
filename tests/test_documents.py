"""What the documents say runs, and the examples do."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


SAID = {  # what nano's answers hold
    "acceptance": "after norm        183  100.0%", "ask": "answer:   92", "batch": "What is 12 + 30? -> 42",
    "clip": "\nright\n", "compare": "the same? no ", "conversation": "\n102\n",
    "describe": "A red circle and a blue square.", "digits": "47\n", "logits": "4", "second_turn": "green ",
    "stream": "nano",
}  # fmt: skip


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_in_the_readme_runs():
    assert blocks("python")
    for code in blocks("python"):
        assert run(sys.executable, "-c", code).strip()


def test_commands_in_the_readme_parse_and_those_on_nano_run():
    commands = [line for block in blocks("") for line in block.splitlines() if line.startswith("mlx_qwen35.")]
    assert commands
    for line in commands:
        name, *arguments = shlex.split(line, comments=True)
        if "nano" in arguments:
            assert run(sys.executable, "-m", name, *arguments).strip()
            continue
        help_text = run(sys.executable, "-m", name, "--help")
        for option in (argument for argument in arguments if argument.startswith("-")):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_text), f"{name} has no {option}"


def test_options_in_the_readme_s_table_exist():
    help_text = run(sys.executable, "-m", "mlx_qwen35.generate", "--help")
    for option in set(
        re.findall(r"(?<=[`\s])--[a-z][a-z-]+", README[README.index("| option") : README.index("In Python")])
    ):
        assert option in help_text, option


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str):
    source = (ROOT / "examples" / name).read_text()
    assert source.startswith('"""') and len(source.splitlines()[0]) > 20, "its first line says what it shows"
    assert SAID[name.removesuffix(".py")] in run(sys.executable, f"examples/{name}")


def test_files_that_the_documents_name_exist():
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/nvidia.md"):
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists(), f"{document} names {target}"
