"""Completion scripts: that they are those of the parsers, and what they complete, asked of the shells that are here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_qwen35.commands.completion import SHELLS, script

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/docs"))

SYNTAX = {"bash": ("bash", "-n"), "zsh": ("zsh", "-n"), "fish": ("fish", "--no-execute")}
ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
compopt() { printf '%s\\n' "$*" > quoting; }  # what bash would be told
_shtab_mlx_qwen35
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_the_scripts_are_those_of_the_parsers():
    """Renewed by python tests/docs/completion_scripts.py."""
    pytest.importorskip("shtab")
    import completion_scripts

    assert {shell: script(shell) for shell in SHELLS} == completion_scripts.scripts()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_that_is_here_reads_its_script(shell, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"no {shell} on this machine")
    file = tmp_path / "script"
    file.write_text(script(shell))
    done = subprocess.run([*SYNTAX[shell], str(file)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def completed(tmp_path, monkeypatch):
    """The words of a command line -> what bash offers for the last of them."""
    if not shutil.which("bash"):
        pytest.skip("no bash on this machine")
    file = tmp_path / "mlx_qwen35.bash"
    file.write_text(script("bash"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_HOME", "HF_HUB_CACHE", "MLX_QWEN35_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def ask(*words: str) -> list[str]:
        command = ["bash", "-c", ASK, "bash", str(file), "mlx_qwen35", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path).stdout.splitlines()

    return ask


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("ch",), ["chat"]),
        (("models", ""), ["list", "remove", "fit"]),
        (("models", "fit", "--me"), ["--memory"]),
        (("chat", "--kv-bits", "8"), ["8", "8/4"]),
        (("generate", "--json", "--prompt-f"), ["--prompt-file"]),
        (("completion", ""), ["zsh", "bash", "fish"]),
        (("generate", "--prompt-file", "mlx"), ["mlx_qwen35.bash"]),
    ],
)
def test_commands_options_values_and_files_are_completed(completed, words, offered):
    assert completed(*words) == offered


def test_names_of_models_are_those_that_this_machine_has(completed, tmp_path):
    hub = tmp_path / ".cache/huggingface/hub"
    for place in ("models--Qwen--Qwen3.5-4B", "models--else--bert"):
        (hub / place).mkdir(parents=True)
    (tmp_path / ".cache/mlx_qwen35/models/Qwen--Qwen3.5-9B").mkdir(parents=True)
    studio = tmp_path / ".lmstudio/models/org/name"
    studio.mkdir(parents=True)
    offered = ["nano", "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-9B", str(studio)]
    assert sorted(set(completed("chat", "--model", "")) - {".cache", ".lmstudio"}) == sorted(offered)


HOSTILE = "$(touch PWNED)Qwen3.5"


@pytest.fixture(params=[HOSTILE, "`touch PWNED` Qwen3.5", "a name; touch PWNED"])
def folder(request, tmp_path):
    """A folder of LM Studio whose name a shell would run."""
    found = tmp_path / ".lmstudio/models/org" / request.param
    found.mkdir(parents=True)
    return found


def test_a_name_is_offered_whole_and_never_run(completed, tmp_path, folder):
    hub = tmp_path / ".cache/huggingface/hub"
    (hub / f"models--org--{HOSTILE}").mkdir(parents=True)
    offered = completed("chat", "--model", "")
    assert {str(folder), f"org/{HOSTILE}"} <= set(offered)
    assert str(folder) in completed("chat", "--model", str(folder.parent) + "/")
    assert not (tmp_path / "PWNED").exists()
    assert (tmp_path / "quoting").read_text() == "-o filenames\n"  # so that bash quotes what it inserts
