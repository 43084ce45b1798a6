"""The command mlx_qwen35: its help, its commands, and the name that they go by."""

import importlib
import shlex
import subprocess
import sys

import pytest
from refusing import refused

from mlx_qwen35.commands import models, umbrella
from mlx_qwen35.commands.umbrella import COMMANDS
from mlx_qwen35.console.interrupt import started_as
from mlx_qwen35.console.notices import be_quiet
from mlx_qwen35.options import on_command_line

PARSERS = {name: importlib.import_module(module).parser for name, (module, _) in COMMANDS.items()}
PARSERS |= {f"models {name}": make for name, (make, _) in models.ACTIONS.items() if name != "list"}
HEAVY = {"mlx.core", "numpy", "transformers", "huggingface_hub", "prompt_toolkit", "rich"}


def run(*words: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, "-m", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def typed(monkeypatch, capsys):
    """The words after mlx_qwen35 -> (exit status, standard output, standard error)."""

    def answered(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlx_qwen35", *words])
        status = 0
        try:
            umbrella.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, *capsys.readouterr()

    return answered


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("completion", "zsh")], ids=" ".join)
def test_help_and_completion_import_nothing_heavy(words):
    done = run("mlx_qwen35", *words, python=("-X", "importtime"))
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and done.stdout
    assert "mlx_qwen35.commands.umbrella" in imported and not HEAVY & imported


def test_alone_it_shows_three_examples_nano_first_then_every_command(typed):
    status, out, err = typed()
    lines = [line.split()[:4] for line in out.splitlines() if line.startswith("  mlx_qwen35 ")]
    assert (status, err) == (0, "")
    assert lines[0] == ["mlx_qwen35", "chat", "--model", "nano"] and len(lines) == 3
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("words", [("help",), ("--help",), ("-h",)])
def test_help_has_several_names(typed, words):
    assert typed(*words) == typed()


def test_help_of_a_command_is_its_own(typed):
    assert typed("help", "completion") == typed("completion", "--help")


def test_the_version_is_told(typed):
    status, out, _ = typed("--version")
    assert status == 0 and out.startswith("mlx_qwen35 ")


@pytest.mark.parametrize(("word", "nearest"), [("chta", "chat"), ("model", "models"), ("--versoin", "--version")])
def test_an_unknown_command_is_refused_with_the_nearest(typed, word, nearest):
    status, out, err = typed(word)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert word in err and f" {nearest}?" in err and err.endswith("[option_unknown]\n")


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "original", "name"),
    [
        (["/bin/mlx_qwen35.chat", "--model"], [], "mlx_qwen35.chat"),
        (["/bin/mlx_qwen35", "chat", "--model"], [], "mlx_qwen35 chat"),
        (["/bin/mlx_qwen35", "--help"], [], "mlx_qwen35"),
        (["/bin/mlx_qwen35"], [], "mlx_qwen35"),
        (["-m", "chat"], ["python", "-m", "mlx_qwen35", "chat"], "mlx_qwen35 chat"),
        (["-m"], ["python", "-X", "dev", "-mmlx_qwen35"], "mlx_qwen35"),
        (["-m", "-q"], ["python", "-m", "mlx_qwen35.chat", "-q"], "mlx_qwen35.chat"),
        (["-m", "mlx_qwen35.chat"], ["python", "-m", "pytest", "mlx_qwen35.chat"], ""),
        (["program.py", "mlx_qwen35"], ["python", "program.py", "mlx_qwen35"], ""),
        (["-c"], ["python", "-c", "import mlx_qwen35"], ""),
        ([""], ["python"], ""),
        ([], [], ""),
    ],
)
def test_a_process_knows_the_command_that_it_was_started_as(argv, original, name):
    assert started_as(argv, original) == name


def test_an_error_has_the_name_that_was_typed():
    done = run("mlx_qwen35", "chat", "--modle", "nano")
    assert done.returncode == 2 and done.stderr.startswith("mlx_qwen35 chat: error: ") and done.stderr.count("\n") == 1


# --- parsers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARSERS)
def test_the_examples_of_every_help_can_be_parsed(name, capsys):
    parser = PARSERS[name]()
    assert 3 <= len(parser.examples) <= 5
    try:
        for example in parser.examples:
            action = example.split(" ")[0]
            made = models.ACTIONS[action][0]() if name == "models" and action in models.ACTIONS else parser
            words = shlex.split(example.partition(">")[0])
            with on_command_line():
                made.parse(words[1:] if made is not parser else words)
    finally:
        be_quiet(False)
    assert all(f"{parser.prog} {example}".rstrip() + "\n" in parser.format_help() for example in parser.examples)


@pytest.mark.parametrize("name", sorted(set(PARSERS) - {"completion", "models remove"}))
@pytest.mark.parametrize("words", [("--versiom",), ("--version=",), ("stray",), ("--json", "--modle", "x")])
def test_what_argparse_refuses_is_one_line_with_a_code(name, words):
    with pytest.raises(Exception) as refusal:
        PARSERS[name]().parse(words)
    assert refusal.type.__name__ == "InputError" and "\n" not in str(refusal.value)


def test_the_nearest_option_is_named():
    with refused("option_unknown", "--temp"):
        PARSERS["generate"]().parse(("--tmep", "1"))
