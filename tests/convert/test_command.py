"""The command: options, messages, exit codes, imports."""

import re
import subprocess
import sys

import pytest

from mlx_qwen35.checkpoint import Quantization, open_checkpoint
from mlx_qwen35.convert.__main__ import main
from mlx_qwen35.random_checkpoint import geometry, write_random_checkpoint


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["mlx_qwen35.convert", *map(str, options)])
    main()


def test_options_reach_the_conversion(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = ("-q", "--q-bits", "8", "--q-group-size", "32", "--q-mode", "affine", "--dtype", "float16")
    options += ("--q-vision-bits", "5")
    run(monkeypatch, "--hf-path", raw, "--mlx-path", out, *options)
    checkpoint = open_checkpoint(out)
    text = {key: value for key, value in checkpoint.config.quantization.items() if not key.startswith("vision_tower.")}
    assert text == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert checkpoint.quantization("model.visual.blocks.0.attn.qkv.weight") == Quantization(64, 5, "affine")
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


def vision_line(capsys):
    return re.search(r"^vision tower: (\S+) GB, (\S+) bits per weight(.*)$", capsys.readouterr().out, re.M)


def test_summary_tells_size_and_bits_of_the_vision_tower(raw, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--hf-path", raw, "--mlx-path", tmp_path / "four", "-q", "--q-vision-bits", "4")
    four = vision_line(capsys)
    run(monkeypatch, "--hf-path", raw, "--mlx-path", tmp_path / "plain")
    plain = vision_line(capsys)
    packed, whole = (open_checkpoint(tmp_path / name).nbytes(("model.visual.",)) for name in ("four", "plain"))
    assert (four[1], plain[1]) == (f"{packed / 1e9:.3f}", f"{whole / 1e9:.3f}")
    assert (four[2], plain[2]) == (f"{16 * packed / whole:.3f}", "16.000")
    assert four[3] == plain[3] == ""


def test_summary_counts_the_vision_matrices_left_unquantized(tmp_path, monkeypatch, capsys):
    config = geometry("tiny")
    config["vision_config"]["intermediate_size"] = 208  # the width of linear_fc2, of which there are two
    source = write_random_checkpoint(tmp_path / "raw", config, mtp=False)
    run(monkeypatch, "--hf-path", source, "--mlx-path", tmp_path / "eight", "-q")
    assert vision_line(capsys)[3] == ", 2 of its 10 matrices unquantized"
    run(monkeypatch, "--hf-path", source, "--mlx-path", tmp_path / "none", "-q", "--q-vision-bits", "0")
    assert vision_line(capsys)[3] == ", 10 of its 10 matrices unquantized"


def test_summary_of_a_text_model_names_no_vision_tower(tmp_path, monkeypatch, capsys):
    source = write_random_checkpoint(tmp_path / "raw", geometry("tiny"), vision=False)
    run(monkeypatch, "--hf-path", source, "--mlx-path", tmp_path / "out", "-q")
    assert "vision" not in capsys.readouterr().out


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
