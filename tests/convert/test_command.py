"""The command: options, messages, exit codes, imports."""

import re
import subprocess
import sys

import pytest

from mlx_qwen35.checkpoint import open_checkpoint
from mlx_qwen35.convert.__main__ import main


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["mlx_qwen35.convert", *map(str, options)])
    main()


def test_options_reach_the_conversion(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = ("-q", "--q-bits", "8", "--q-group-size", "32", "--q-mode", "affine", "--dtype", "float16")
    run(monkeypatch, "--hf-path", raw, "--mlx-path", out, *options)
    checkpoint = open_checkpoint(out)
    assert checkpoint.config.quantization == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert checkpoint.entries["model.visual.pos_embed.weight"].dtype == "F16"
    run(monkeypatch, "--hf-path", raw, "--mlx-path", out, "--overwrite")
    assert not open_checkpoint(out).config.quantization


def test_summary_says_what_was_written(raw, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--hf-path", raw, "--mlx-path", tmp_path / "out", "--quantize", "--q-bits", "8")
    text = capsys.readouterr().out
    tensors = re.search(r"wrote .*out: (\d+) tensors in 1 file, 0\.0\d+ GB", text)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert int(tensors[1]) == len(checkpoint.entries) + len(checkpoint.exact)
    bits = float(re.search(r"text model: .*, (\S+) bits per weight", text)[1])
    assert 8.5 < bits < 8.6  # 8 bits, and two 16-bit numbers for each 64 weights; few weights are not packed
    assert re.search(r"time: \d+\.\d s", text)


def test_broken_rule_is_printed_without_traceback(raw, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--hf-path", raw, "--mlx-path", tmp_path / "out", "--q-bits", "4")
    assert stop.value.code == 2
    message = "mlx_qwen35.convert: error: --q-bits 4 has no effect without --quantize; add -q or leave it out\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("options", [("--q-mode", "gguf"), ("--dtype", "int8"), ("--q-bits", "four")])
def test_unknown_choice_is_a_usage_error(raw, tmp_path, monkeypatch, options):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--hf-path", raw, "--mlx-path", tmp_path / "out", "-q", *options)
    assert stop.value.code == 2


def test_module_runs_without_mlx_lm_and_transformers(raw, tmp_path):
    script = (
        "import sys; from mlx_qwen35.convert.__main__ import main; main(); "
        "print([name for name in ('mlx_lm', 'mlx_vlm', 'transformers', 'torch') if name in sys.modules])"
    )
    options = ("--hf-path", raw, "--mlx-path", tmp_path / "out", "-q")
    result = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("\n[]\n")


def test_module_is_a_command():
    command = [sys.executable, "-m", "mlx_qwen35.convert", "--help"]
    assert "--q-group-size" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
