"""Where the emulator can run, and its cache of compiled kernels."""

import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from kernels.emulator import build, missing
from kernels.small import run

runs_here = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64"), ("Darwin", "x86_64")])
def test_another_machine_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert missing() == "the Metal emulator switches lanes with x86-64 Linux instructions"


@runs_here
def test_a_missing_compiler_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install ziglang" in missing()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The texts that are compiled from now on; libraries go to a folder of the test's own."""
    texts: list[str] = []
    original: Callable[..., Path] = build._compile

    def compile_and_note(text: str, *how: Any) -> Path:
        texts.append(text)
        return original(text, *how)

    monkeypatch.setattr(build, "_compile", compile_and_note)
    monkeypatch.setattr(build, "libraries", lambda: tmp_path)
    return texts


@runs_here
def test_a_kernel_is_compiled_once_for_each_text_and_each_kind_of_build(compiled: list[str]) -> None:
    def launch(number: int, **options: bool) -> None:
        run(f"out[i] = x[i] + {number};", {"x": mx.zeros((32,))}, ((32,), mx.float32), **options)

    for _ in range(2):
        launch(1)
        launch(2)
        launch(1, police=True)
    assert len(compiled) == 3


@runs_here
def test_a_threadgroup_declaration_in_a_comment_is_no_declaration(compiled: list[str]) -> None:
    source = "// threadgroup float s[4];\nout[i] = x[i]; /* threadgroup int t; */"
    run(source, {"x": mx.zeros((32,))}, ((32,), mx.float32))
    assert "EMU_THREADGROUP" not in compiled[0]
