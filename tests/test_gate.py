"""A Python that cannot run the package is told so in one sentence: one that is too old, and an x86 one on a Mac."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_qwen35.backend import remedy
from mlx_qwen35.gate import LEAST, objection

ROOT = Path(__file__).parent.parent
READ_FIRST = ("__init__.py", "gate.py")  # what any Python reads before it is told


def older() -> str | None:
    """A Python before LEAST on this machine."""
    names = [f"python3.{minor}" for minor in range(LEAST[1] - 1, 5, -1)]
    installed = [str(path) for path in Path.home().glob(".pyenv/versions/3.*/bin/python3.*")]
    found = [path for path in (*map(shutil.which, names), *sorted(installed)) if path and Path(path).name in names]
    runs = (path for path in found if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0)
    return next(runs, None)  # one of pyenv's shims may be for none


def said(*command: str) -> list[str]:
    """Lines of standard error of a command that fails in a clone, and prints nothing else."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode in (1, 2) and done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize("file", READ_FIRST)
def test_python_3_9_can_read_what_tells_it(file):
    ast.parse((ROOT / "mlx_qwen35" / file).read_text(encoding="utf-8"), feature_version=(3, 9))


def test_the_package_imports_nothing_before_the_gate():
    body = ast.parse((ROOT / "mlx_qwen35/__init__.py").read_text(encoding="utf-8")).body
    first = next(node for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    assert ast.unparse(first) == "from mlx_qwen35 import gate"


OLDER = older()


@pytest.mark.skipif(OLDER is None, reason=f"there is no Python before {LEAST} here")
@pytest.mark.parametrize(
    "arguments",
    [("-m", "mlx_qwen35"), ("-m", "mlx_qwen35.doctor"), ("-c", "import mlx_qwen35"), ("mlx_qwen35/gate.py",)],
    ids=" ".join,
)
def test_an_older_python_ends_in_one_sentence(arguments):
    (line,) = said(OLDER, *arguments)
    assert "needs Python 3.11" in line and OLDER in line


PRETEND = "import sys; sys.version_info = (3, 9, 6); "


def test_a_program_may_catch_the_error_and_keeps_its_own_tracebacks():
    (line,) = said(sys.executable, "-c", PRETEND + "import mlx_qwen35")
    assert "3.9.6" in line
    caught = "\ntry:\n import mlx_qwen35\nexcept ImportError:\n 1 / 0"
    assert said(sys.executable, "-c", PRETEND + caught)[-1].startswith("ZeroDivisionError")


@pytest.mark.parametrize(
    ("version", "machine", "translated", "facts"),
    [
        ((3, 9, 6), "arm64", False, ("3.9.6", "/usr/bin/python3", "3.11")),
        ((3, 12, 1), "x86_64", True, ("Rosetta", "/usr/bin/python3", "arm64", "uv python install")),
        ((3, 12, 1), "x86_64", False, ()),  # Linux, or a Mac with an Intel processor, where MLX may have been built
        ((3, 11, 0), "arm64", False, ()),
    ],
)
def test_the_sentence_names_this_python_and_what_to_install(version, machine, translated, facts):
    sentence = objection(version, "/usr/bin/python3", machine, translated)
    assert bool(sentence) == bool(facts) and all(fact in sentence for fact in facts) and "\n" not in sentence


def test_rosetta_is_asked_for_on_a_mac_alone():
    program = (
        "import sys, subprocess, platform; sys.platform = {!r}; platform.machine = lambda: 'x86_64'\n"
        "subprocess.run = lambda *given, **options: subprocess.CompletedProcess(given, 0, b'1\\n')\n"
        "import mlx_qwen35.gate"
    )
    (line,) = said(sys.executable, "-c", program.format("darwin"))
    assert "Rosetta" in line
    assert subprocess.run([sys.executable, "-c", "import mlx_qwen35.gate"], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("system", "machine", "fact"),
    [("Linux", "x86_64", "mlx-qwen35[cpu]"), ("Darwin", "arm64", "pip install"), ("Darwin", "x86_64", "Intel")],
)
def test_where_mlx_is_absent_the_remedy_is_the_machine_s(system, machine, fact):
    assert fact in remedy("No module named 'mlx'", system, machine)
