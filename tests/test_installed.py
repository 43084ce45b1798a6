"""What a user has of the package beside what it does: versions, names, types; and what a source distribution holds."""

import importlib
import os
import signal
import subprocess
import sys
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import mlx_qwen35

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("command", sorted(PROJECT["project"]["scripts"]))
def test_every_command_tells_its_version(command, capsys, monkeypatch):
    module, function = PROJECT["project"]["scripts"][command].split(":")
    monkeypatch.setattr(sys, "argv", [command, "--version"])
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)()
    assert (ended.value.code, capsys.readouterr().out) == (0, f"{command} {mlx_qwen35.__version__}\n")


def test_the_version_is_that_of_the_installed_package():
    assert mlx_qwen35.__version__ == metadata.version("mlx-qwen35")


def test_every_name_of_the_package_is_there():
    assert "Conversation" in mlx_qwen35.__all__
    assert all(hasattr(mlx_qwen35, name) for name in mlx_qwen35.__all__)


def test_one_folder_on_the_path_is_all_of_the_package():
    """What an editable install is, and all that type checkers see of it."""
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        assert (ROOT / Path(*package.split("."))).is_dir()
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"": "."}
    for file in (ROOT / "convert").glob("*.py"):  # a link in the repository, a copy in a source distribution
        assert (ROOT / "mlx_qwen35" / "convert" / file.name).read_bytes() == file.read_bytes()


def test_the_converter_is_no_module_of_its_own():
    done = subprocess.run(
        [sys.executable, "-c", "import convert"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "ModuleNotFoundError: there is no module convert; import mlx_qwen35.convert" in done.stderr


@pytest.mark.full
def test_a_run_with_ctrl_c_ignored_takes_it_back():
    code = "import signal, conftest, pytest; conftest.pytest_configure(pytest.Config.fromdictargs({}, []))"
    code += "; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    ignored = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", preexec_fn=ignored, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "True\n", done.stderr


@pytest.mark.full
def test_the_source_distribution_holds_every_file_but_those_of_the_repository_itself(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if tracked.returncode:
        pytest.skip("this is no repository")
    code = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {name for name in tracked.stdout.split("\n") if name and not name.startswith(".")}
    assert wanted - held == set()


@pytest.mark.full
def test_mypy_sees_the_types_of_an_editable_install(tmp_path):
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(
        "from mlx_qwen35 import generate, load\n"
        "from mlx_qwen35.convert import convert\n"
        "model, processor = load('nano')\n"
        "reveal_type(model)\n"
        "reveal_type(generate(model, processor, prompt='x', temp=0.5))\n"
        "reveal_type(convert('a', 'b'))\n"
        "generate(model, processor, prompt='x', temprature=0.5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", os.devnull, "--follow-imports=silent", str(program)],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    for fact in ('"mlx_qwen35.model.model.Model"', '"mlx_qwen35.generate.Result"', '"pathlib.Path"', "temprature"):
        assert fact in done.stdout, done.stdout + done.stderr
    assert "Any" not in done.stdout and "import-not-found" not in done.stdout
