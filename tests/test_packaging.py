"""The package as it is installed and imported."""

import itertools
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

IMPORTS = {
    "package": "import mlx_qwen35",
    "function": "from mlx_qwen35 import generate",
    "module": "import mlx_qwen35.generate",
    "inside": "import mlx_qwen35.engine.engine as engine",
    "convert": "import mlx_qwen35.convert",
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.core(2)
@pytest.mark.parametrize("order", list(itertools.permutations(["module", "inside", "convert"])), ids="-".join)
def test_generate_is_the_function_after_any_order_of_imports(order):
    lines = [IMPORTS[name] for name in order]
    check = "from mlx_qwen35 import generate; import mlx_qwen35 as m, inspect"
    both = "assert inspect.isfunction(generate) and m.generate is generate; print('yes')"
    assert python("; ".join([*lines, check, both])) == "yes\n"


HEAVY = {"transformers", "mlx_lm", "mlx_vlm", "torch", "llguidance", "lm_eval", "datasets"}
ANSWER = """
import sys
from mlx_qwen35 import generate, load
model, processor = load("nano")
assert "92" in str(generate(model, processor, "What is 34 + 58?", max_tokens=100))
print(*sys.modules)
"""


def test_importing_the_package_brings_nothing_heavy():
    assert not (HEAVY | {"PIL"}) & set(python("import sys, mlx_qwen35; print(*sys.modules)").split())


def test_loading_a_model_and_answering_brings_nothing_heavy():
    assert not HEAVY & set(python(ANSWER).split())


def test_every_folder_with_python_is_listed_as_a_package():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("mlx_qwen35/**/*.py")}
    folders |= {f"mlx_qwen35.{'.'.join(file.parent.relative_to(ROOT).parts)}" for file in ROOT.glob("convert/**/*.py")}
    assert listed == folders | {"mlx_qwen35.nano"}


def test_every_command_exists():
    for name, target in PROJECT["project"]["scripts"].items():
        module, function = target.split(":")
        assert python(f"from {module} import {function}; print(callable({function}))") == "True\n", name


@pytest.mark.parametrize("command", ["generate", "chat", "convert", "bench", "doctor"])
def test_python_m_shows_the_help_of_every_command_without_a_warning_or_a_heavy_import(command):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "importtime", "-m", f"mlx_qwen35.{command}", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: mlx_qwen35.{command}")
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported and not HEAVY & imported


@pytest.mark.full
def test_a_wheel_holds_every_module_the_bundled_model_and_the_page(tmp_path: Path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    import zipfile

    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(file.relative_to(ROOT)) for file in ROOT.glob("mlx_qwen35/**/*.py")}
    expected |= {f"mlx_qwen35/{file.relative_to(ROOT)}" for file in ROOT.glob("convert/*.py")}
    for data in ("nano", "server/page"):
        files = [file for file in (ROOT / "mlx_qwen35" / data).rglob("*") if file.is_file()]
        expected |= {str(file.relative_to(ROOT)) for file in files}
    assert expected <= names
