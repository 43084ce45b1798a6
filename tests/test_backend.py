"""What MLX computes on, its memory, and machines on which MLX cannot be loaded."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen35.backend import CPU, CUDA, METAL, assume, backend
from mlx_qwen35.doctor import facts

ROOT = Path(__file__).parent.parent
H100 = {  # what MLX 0.32.4 tells of one (mlx/backend/cuda/device_info.cpp)
    "device_name": "NVIDIA H100 80GB HBM3", "architecture": "sm_90", "total_memory": 85_520_809_984,
    "free_memory": 80_000_000_000, "compute_capability_major": 9, "compute_capability_minor": 0,
}  # fmt: skip
M1 = {"device_name": "Apple M1", "memory_size": 16 << 30, "max_recommended_working_set_size": 11_453_251_584}


def test_the_backend_follows_the_default_device():
    with mx.stream(mx.cpu):
        assert backend() is CPU


def test_the_machine_has_memory():
    assert 1e9 < backend().usable_memory() < 1e13


def test_another_backend_is_assumed_within_a_block_alone_even_where_it_fails():
    before = backend()
    with assume(METAL):
        with pytest.raises(ZeroDivisionError), assume(CUDA):
            assert backend() is CUDA
            raise ZeroDivisionError
        assert backend() is METAL
    assert backend() is before


@pytest.mark.parametrize(
    ("gpu", "told", "usable"), [(CUDA, H100, 76_968_728_985), (METAL, M1, 11_453_251_584)], ids=["cuda", "metal"]
)
def test_on_a_gpu_its_name_and_memory_are_told(monkeypatch, gpu, told, usable):
    known = mx.device_info
    monkeypatch.setattr(mx, "device_info", lambda device: told if device == mx.gpu else known(device))
    with assume(gpu):
        assert backend().usable_memory() == usable
        shown = facts.machine(usable)
    assert shown["MLX computes on"] == f"the GPU, {told['device_name']}"
    assert shown["memory"].endswith(f"of which a model may use {usable / 1e9:.1f} GB")


def test_both_gpus_join_projections_and_run_kernels_and_a_mac_alone_has_a_watchdog():
    assert [on.joins_projections for on in (CPU, METAL, CUDA)] == [False, True, True]
    assert [on.kernel_language for on in (CPU, METAL, CUDA)] == ["", "metal", "cuda"]
    assert [on.watchdog for on in (CPU, METAL, CUDA)] == [False, True, False]
    assert not replace(CUDA, kernel_language="").fused_kernels


# --- where MLX cannot be loaded --------------------------------------------------------------------------------------

NO_DRIVER = "libcuda.so.1: cannot open shared object file: No such file or directory"  # of the CUDA wheel, 0.32.4
NO_BACKEND = "libmlx.so: cannot open shared object file: No such file or directory"  # of plain mlx on Linux


@pytest.fixture
def without_mlx(tmp_path):
    """(what the loader says, arguments of Python) -> the process that ran there."""
    (tmp_path / "mlx").mkdir()

    def run(said: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "mlx" / "core.py").write_text(f"raise ImportError({said!r})\n")
        (tmp_path / "mlx" / "__init__.py").touch()
        environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PATH": os.defpath}
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)

    return run


@pytest.mark.parametrize("command", ["generate", "chat", "convert", "bench", "doctor"])
def test_a_command_without_nvidia_s_driver_ends_in_one_line(without_mlx, command):
    done = without_mlx(NO_DRIVER, "-m", f"mlx_qwen35.{command}", "--help")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"mlx_qwen35.{command}: error: ") and line.endswith(" [mlx_unusable]")
    assert "NVIDIA's driver" in line and "libcuda.so.1" in line


def test_a_command_s_script_ends_in_one_line_too(without_mlx, tmp_path):
    script = tmp_path / "mlx_qwen35.generate"
    script.write_text("from mlx_qwen35.generate.__main__ import main\nmain()\n")
    done = without_mlx(NO_DRIVER, str(script))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "[mlx_unusable]" in done.stderr


@pytest.mark.parametrize(("said", "remedy"), [(NO_DRIVER, "NVIDIA's driver"), (NO_BACKEND, "mlx-qwen35[cpu]")])
def test_a_program_that_imports_the_package_gets_an_error_with_a_code(without_mlx, said, remedy):
    program = "try:\n import mlx_qwen35\nexcept ValueError as error:\n print(error.code, error)"
    done = without_mlx(said, "-c", program)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"mlx_unusable MLX cannot be loaded ({said})") and remedy in done.stdout


def test_on_a_mac_that_computes_on_its_cpu_a_model_may_take_what_the_gpu_may(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device: {"max_recommended_working_set_size": 5_726_623_061})
    with assume(CPU):
        assert backend().usable_memory() == 5_726_623_061
