"""Fixtures that many tests share: random checkpoints, written once a session, and the references of the parity tests.

Options: --real-model FOLDER (tests of the published tokenizer and chat template), --golden (never import torch: the
parity tests read their golden files, as they do wherever torch or transformers' Qwen3.5 is absent).
"""

import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("MLX_ENABLE_TF32", "0")  # float32 is whole (kernels/products.py); before mlx is imported
sys.path.insert(0, str(Path(__file__).parent))

import mlx.core as mx
import numpy as np
import pytest
from geometries import changed
from parity import cases
from patching import guard

from mlx_qwen35.backend import CUDA, backend
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.console.notices import be_quiet
from mlx_qwen35.load import load_model
from mlx_qwen35.machine import chip as machine
from mlx_qwen35.model.model import Model

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real-model", metavar="FOLDER", help="folder with the published tokenizer and chat template")
    parser.addoption("--golden", action="store_true", help="hide torch: compare with the golden files alone")


def pytest_configure(config: pytest.Config) -> None:
    guard()
    # A run that was started with signals ignored (nohup, a script's &) would hand that to every process it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # A warning is an error, except deprecations inside the programs that we only compare with.
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("filterwarnings", "ignore::mlx_qwen35.errors.EmptyAnswer")  # of short answers in tests
    for program in ("torch", "transformers", "mlx_lm", "mlx_vlm", "huggingface_hub", "PIL", "importlib", "<frozen"):
        for kind in ("DeprecationWarning", "FutureWarning", "UserWarning", "PendingDeprecationWarning"):
            config.addinivalue_line("filterwarnings", rf"ignore::{kind}:{program}.*")
    if config.getoption("--golden"):
        sys.modules["torch"] = None  # type: ignore[assignment]


def _torch() -> bool:
    return sys.modules.get("torch", True) is not None and importlib.util.find_spec("torch") is not None


def pytest_report_header(config: pytest.Config) -> str:
    if not _torch():
        return "parity: with the golden files (torch is not there)"
    import torch
    import transformers

    return f"parity: live, with transformers {transformers.__version__} and torch {torch.__version__}"


@pytest.hookimpl(tryfirst=True)  # before -m selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The mark `gpu` says that a test needs a GPU, `cuda` that it needs one of NVIDIA, `core(n)` that all but n of its
    sets of parameters, evenly spread, are part of the full matrix only.
    """
    families: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("core") and not item.get_closest_marker("full"):
            families.setdefault((item.path, item.name.partition("[")[0]), []).append(item)
    for family in families.values():
        mark = family[0].get_closest_marker("core")
        count = mark.args[0] if mark else 0
        kept = {place * len(family) // count for place in range(count)}
        for place, item in enumerate(family):
            if place not in kept:
                item.add_marker(pytest.mark.full)
    lacking = {"gpu": not backend().fused_kernels, "cuda": backend() != CUDA}
    for item in items:
        for mark, lacks in lacking.items():
            if lacks and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason={"gpu": "needs a GPU", "cuda": "needs an NVIDIA GPU"}[mark]))


@pytest.fixture(autouse=True)
def speaks() -> Iterator[None]:
    """A command line with --quiet that a test reads is that test's alone."""
    yield
    be_quiet(False)


@pytest.fixture(scope="session")
def real_model(request: pytest.FixtureRequest) -> Path:
    """The folder given with --real-model."""
    folder = request.config.getoption("--real-model")
    if folder is None:
        pytest.skip("needs --real-model FOLDER: the published tokenizer.json and chat_template.jinja")
    path = Path(folder).expanduser()
    assert path.is_dir(), f"--real-model must be a folder, there is none at {folder}"
    return path


# --- random checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(config.json values = tiny, seed = 0, options of write_random_checkpoint) -> a folder, to be left as it is."""
    written: dict[str, Path] = {}

    def folder(config: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> Path:
        config = geometry("tiny") if config is None else config
        key = json.dumps([config, seed, {name: str(value) for name, value in options.items()}], sort_keys=True)
        if key not in written:
            target = tmp_path_factory.mktemp("checkpoint") / "model"
            written[key] = write_random_checkpoint(target, config, seed=seed, **options)
        return written[key]

    return folder


@pytest.fixture
def checkpoint_copy(checkpoint_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Like checkpoint_folder, and the folder is the test's own, to break."""

    def folder(config: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> Path:
        target = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        return Path(shutil.copytree(checkpoint_folder(config, seed, **options), target))

    return folder


@pytest.fixture(scope="session")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a dtype's name to the folder of a random checkpoint of that dtype, with a tokenizer."""
    folders: dict[str, Path] = {}

    def source(dtype: str) -> Path:
        if dtype not in folders:
            folder = tmp_path_factory.mktemp("source") / dtype
            config = changed(geometry("tiny"), dtype=dtype)
            folders[dtype] = write_random_checkpoint(folder, config, dtype=getattr(mx, dtype), shard_bytes=4e6)
            for name in TOKENIZER:
                shutil.copyfile(resolve("nano") / name, folder / name)
            (folder / "LICENSE").write_text("a licence")
        return folders[dtype]

    return source


@pytest.fixture(scope="session")
def raw(source_of: Callable[[str], Path]) -> Path:
    """The bfloat16 one, whose float32 tensors are A_log and linear_attn.norm, as in the published checkpoints."""
    return source_of("bfloat16")


def load_text_model(folder: Path, dtype: mx.Dtype = mx.float32) -> Model:
    return load_model(open_checkpoint(folder), dtype, str(folder))


@pytest.fixture(scope="session")
def text_model(checkpoint_folder: Callable[..., Path]) -> Callable[..., Model]:
    """(config = tiny, seed = 0, dtype = float32) -> the model of a random checkpoint, loaded once; it has no state."""
    loaded: dict[str, Model] = {}

    def model(config: dict[str, Any] | None = None, seed: int = 0, dtype: mx.Dtype = mx.float32) -> Model:
        folder = checkpoint_folder(config, seed)
        key = f"{folder} {dtype}"
        if key not in loaded:
            loaded[key] = load_text_model(folder, dtype)
        return loaded[key]

    return model


@pytest.fixture
def on_chip(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """(brand) -> the system says that this machine is a Mac with that chip. MLX goes on computing on what is here.

    What commands set for MLX in the environment is unset, and unset again when the test ends.
    """
    for name in machine.TUNED:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    run = subprocess.run

    def chip(brand: str) -> None:
        def asked(command: Any, *given: Any, **options: Any) -> subprocess.CompletedProcess:
            if "machdep.cpu.brand_string" not in command:
                return run(command, *given, **options)
            return subprocess.CompletedProcess(command, 0, f"{brand}\n", "")

        machine.this_chip.cache_clear()
        monkeypatch.setattr(platform, "system", lambda: "Darwin")
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
        monkeypatch.setattr(subprocess, "run", asked)

    yield chip
    machine.this_chip.cache_clear()


# --- parity with transformers ----------------------------------------------------------------------------------------

STALE = 2e-5  # between two machines' float32 answers of torch; a changed case differs by far more


@pytest.fixture(scope="session")
def parity_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[cases.Case], Path]:
    """The checkpoint folder of a parity case."""
    written: dict[str, Path] = {}

    def folder(case: cases.Case) -> Path:
        if case.name not in written:
            written[case.name] = cases.write(case, tmp_path_factory.mktemp("parity") / case.name)
        return written[case.name]

    return folder


@pytest.fixture(scope="session")
def parity_model(parity_folder: Callable[[cases.Case], Path]) -> Callable[[cases.Case], Model]:
    """Our float32 model of a parity case."""
    loaded: dict[str, Model] = {}

    def model(case: cases.Case) -> Model:
        if case.name not in loaded:
            loaded[case.name] = load_text_model(parity_folder(case))
        return loaded[case.name]

    return model


@pytest.fixture(scope="session")
def reference(parity_folder: Callable[[cases.Case], Path]) -> Callable[[cases.Case], cases.Reference]:
    """What transformers answers for a case: computed now where torch is there, and then the golden file must agree."""
    known: dict[str, cases.Reference] = {}

    def answer(case: cases.Case) -> cases.Reference:
        if case.name not in known:
            folder = parity_folder(case)
            golden = cases.read(case, cases.fingerprint(folder))
            known[case.name] = _live(case, folder, golden) if _torch() else golden
        return known[case.name]

    return answer


def _live(case: cases.Case, folder: Path, golden: cases.Reference) -> cases.Reference:
    from parity import reference, vision_reference

    answers = (reference if case.vision is None else vision_reference).answers(case, folder)
    assert set(answers) == set(golden.arrays), f"{case.golden.name} holds other answers than now: {cases.REMEDY}"
    for name, array in answers.items():
        error = golden.error(name, array)
        assert error < STALE, f"{case.golden.name} is out of date: {name} differs by {error:.1e}; {cases.REMEDY}"
    return cases.Reference(answers)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
