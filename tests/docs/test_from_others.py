"""The pages for users of mlx-lm and mlx-vlm name every option of theirs, and the programs on them run.

The parsers are read as text: to import them would import transformers.
"""

import ast
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

import mlx_qwen35
from mlx_qwen35.commands import umbrella

ROOT = Path(__file__).parents[2]
NANO = str(Path(mlx_qwen35.__file__).parent / "nano")


class Theirs(NamedTuple):
    """A command of another program: the file of its parser, in the program's folder."""

    program: str
    command: str
    file: str

    @property
    def page(self) -> str:
        return (ROOT / "docs" / f"from-{self.program.replace('_', '-')}.md").read_text()

    @property
    def section(self) -> list[list[str]]:
        """The rows of its table."""
        found = re.search(rf"^### {self.program}\.{self.command}\n(.*?)(?=^##)", self.page, re.MULTILINE | re.DOTALL)
        assert found, f"there is no section {self.program}.{self.command}"
        return [line.strip("| ").split(" | ") for line in found[1].splitlines() if line.startswith("| ")]

    @property
    def options(self) -> set[str]:
        """Those that its parser declares."""
        spec = find_spec(self.program)
        if spec is None:
            pytest.skip(f"{self.program} is not installed")
        tree = ast.parse((Path(spec.submodule_search_locations[0]) / self.file).read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        added = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
        return {name.value for call in added for name in call.args if isinstance(name, ast.Constant)}


QUANT = {"awq", "dwq", "dynamic_quant", "gptq"}
MLX_LM = {"benchmark", "cache_prompt", "chat", "convert", "evaluate", "fuse", "generate", "lora", "manage",
          "perplexity", "server", "share", "upload", *QUANT}  # fmt: skip
COMMANDS = [Theirs("mlx_lm", name, f"quant/{name}.py" if name in QUANT else f"{name}.py") for name in sorted(MLX_LM)]
COMMANDS += [
    Theirs("mlx_vlm", *own)
    for own in [("generate", "generate/dispatch.py"), ("chat", "chat.py"), ("server", "server/cli.py"),
                ("convert", "convert.py")]
]  # fmt: skip
each_command = pytest.mark.parametrize("theirs", COMMANDS, ids=lambda own: f"{own.program}.{own.command}")


def named(cell: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", cell))


def test_these_are_the_commands_of_mlx_lm():
    tree = ast.parse((Path(find_spec("mlx_lm").submodule_search_locations[0]) / "cli.py").read_text())
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    (known,) = [node.value for node in assigned if ast.unparse(node.targets[0]) == "subcommands"]
    assert set(ast.literal_eval(known)) == MLX_LM
    commands = COMMANDS[0].page.split("## Options")[0]
    assert set(re.findall(r"`mlx_lm\.(\w+)`", commands)) == MLX_LM


@each_command
def test_every_option_of_theirs_has_one_row_and_there_is_no_other(theirs: Theirs):
    found = [named(cell) for cell, _ in theirs.section[1:]]
    assert set().union(*found) == theirs.options
    assert sum(map(len, found)) == len(theirs.options)


@each_command
def test_what_takes_an_options_place_exists(theirs: Theirs, monkeypatch, capsys):
    (_, ours), *others = theirs.section
    if ours == "mlx_qwen35":
        return  # nothing takes their place
    monkeypatch.setattr(sys, "argv", [*ours.split(), "--help"])
    with pytest.raises(SystemExit):
        umbrella.main()
    known = named(capsys.readouterr().out)
    for cell, told in others:
        wanted = named(told) | (named(cell) if told.startswith("the same") else set())
        assert wanted <= known, f"{ours} has no {wanted - known}"


@pytest.mark.full
def test_the_programs_for_mlx_lm_run_on_both_sides(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = {}
    for info in ("python mlx-lm", "python"):
        programs, names = re.findall(rf"^```{info}\n(.*?)^```$", COMMANDS[0].page, re.MULTILINE | re.DOTALL), {}
        assert len(programs) == 5
        for program in programs:
            exec(compile(program.replace('load("nano")', f'load("{NANO}")'), info, "exec"), names)
        said[info] = capsys.readouterr().out
    for text in said.values():
        assert text.startswith("92\n") and "['42', 'I am nano" in text and text.endswith("42\n")
