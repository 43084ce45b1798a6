"""The command: options, messages, exit codes, imports."""

import json
import re
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.__main__ import main
from mlx_qwen35.quantization import Quantization


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
    run(monkeypatch, "--hf-path", raw, "--mlx-path", out, "--overwrite", "--recipe", "bf16")
    assert not open_checkpoint(out).config.quantization


def test_summary_says_what_was_written(raw, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--hf-path", raw, "--mlx-path", tmp_path / "out", "--quantize", "--q-bits", "8")
    text = capsys.readouterr().out
    tensors = re.search(r"wrote .*out: (\d+) tensors in 1 file, 0\.0\d+ GB", text)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert int(tensors[1]) == len(checkpoint.entries) + len(checkpoint.fp32_original)
    bits = float(re.search(r"text model: .*, (\S+) bits per weight", text)[1])
    assert 8.5 < bits < 8.6  # 8 bits, and two 16-bit numbers for each 64 weights; few weights are not packed
    assert re.search(r"time: \d+\.\d s", text)


def vision_line(capsys):
    return re.search(r"^vision encoder: (\S+) GB, (\S+) bits per weight(.*)$", capsys.readouterr().out, re.M)


def test_summary_tells_size_and_bits_of_the_vision_tower(raw, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--hf-path", raw, "--mlx-path", tmp_path / "four", "-q", "--q-vision-bits", "4")
    four = vision_line(capsys)
    run(monkeypatch, "--hf-path", raw, "--mlx-path", tmp_path / "plain", "--recipe", "bf16")
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
    err = capsys.readouterr().err
    assert err.startswith("mlx_qwen35.convert: error: ") and err.endswith(" [option_no_effect]\n")
    assert "--q-bits" in err and len(err.splitlines()) == 1


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


def test_a_dry_run_tells_every_tensor_and_writes_nothing(raw, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--hf-path", raw, "--dry-run", "--recipe", "4bit")
    told = capsys.readouterr().out
    written = open_checkpoint(convert(raw, tmp_path / "out", recipe="4bit"))
    for name, entry in written.entries.items():
        if name.endswith("weight"):
            assert entry.stored_name in told, name
    out = next(line for line in told.splitlines() if "layers.0.linear_attn.out_proj.weight" in line)
    assert out.split()[1:5] == ["256", "x", "384", "BF16"] and out.split()[5:10] == ["8", "bit,", "groups", "of", "64"]
    total = sum(entry.nbytes for entry in [*written.entries.values(), *written.fp32_original.values()])
    in_all = float(re.search(r"(\S+) GB in all, nothing was written", told)[1])
    assert abs(in_all - total / 1e9) < 0.002  # the header, the files that are copied, and three digits
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_dry_run_of_a_real_size_reads_headers_alone(raw, monkeypatch, capsys):
    monkeypatch.setattr("os.pread", lambda *_: pytest.fail("weights were read"))
    run(monkeypatch, "--hf-path", raw, "--dry-run", "-q")
    assert "nothing was written" in capsys.readouterr().out


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("What is 34 + 58? 34 + 58 = 92. The circle is red, and the square is blue. " * 3)
    return file


def test_a_conversion_that_is_evaluated_tells_how_far_it_is_from_the_source(text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run(monkeypatch, "--hf-path", "nano", "--mlx-path", out, "--recipe", "4bit", "--eval", text)
    line = re.search(r"against the source on (\d+) tokens: KL divergence (\S+), same", capsys.readouterr().out)
    quality = json.loads((out / "quality.json").read_text())
    assert quality["recipe"] == "4bit" and quality["evaluation"]["positions"] == int(line[1]) > 50
    assert 0 < quality["evaluation"]["kl"] < 0.5
    assert "KL divergence" in (out / "README.md").read_text() and (out / "error_by_layer.svg").is_file()


def test_calibration_changes_what_is_written_and_the_rest_stays(text, tmp_path):
    plain = convert("nano", tmp_path / "plain", recipe="4bit")
    tuned = convert("nano", tmp_path / "tuned", recipe="4bit", calibration=text)
    name = "model.language_model.layers.0.mlp.gate_proj."
    ours, theirs = (mx.load(str(next(folder.glob("*.safetensors")))) for folder in (plain, tuned))
    assert not mx.array_equal(ours[f"{name}scales"], theirs[f"{name}scales"])
    tower = "model.visual.blocks.0.attn.qkv.scales"
    assert mx.array_equal(ours[tower], theirs[tower])


def test_sensitivity_prints_what_a_group_costs_and_saves_a_recipe_under_a_cap(text, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.json"
    text.write_text("What is 34 + 58?")
    options = ("--sensitivity", text, "--cap", "0.0022", "--save-recipe", recipe)
    run(monkeypatch, "--hf-path", "nano", *options)
    told = capsys.readouterr().out
    assert "| DeltaNet out | 4 bit, groups of 64 |" in told and "proposed: 0.002 GB" in told
    run(monkeypatch, "--hf-path", "nano", "--mlx-path", tmp_path / "out", "--recipe", recipe)
    written = open_checkpoint(tmp_path / "out")
    assert sum(entry.nbytes for entry in [*written.entries.values(), *written.fp32_original.values()]) <= 2.2e6
    assert written.quantization("model.language_model.layers.0.linear_attn.out_proj.weight").bits == 8
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["recipe"] == "recipe.json"


def test_a_finished_folder_is_published(raw, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *a, **k: calls.append((a, k)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **k: calls.append(k))
    run(monkeypatch, "--hf-path", raw, "--mlx-path", tmp_path / "out", "-q", "--upload-repo", "name/model")
    assert calls[0][0] == ("name/model",) and calls[1]["folder_path"] == str(tmp_path / "out")
    assert "published: https://huggingface.co/name/model" in capsys.readouterr().out


def test_a_folder_that_cannot_be_published_is_whole(raw, tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refused)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--hf-path", raw, "--mlx-path", tmp_path / "out", "--upload-repo", "name/model")
    assert "[upload_failed]" in capsys.readouterr().err
    open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ((), "option_missing"),
        (("--cap", "3"), "option_no_effect"),
        (("--sensitivity", "x", "--cap", "nan"), "option_invalid"),
        (("--save-recipe", "x"), "option_no_effect"),
        (("--dry-run", "--mlx-path", "out", "--eval", "x"), "option_no_effect"),
        (("--sensitivity", "x", "--no-verify"), "option_no_effect"),
        (("--mlx-path", "out", "--recipe", "3bit"), "recipe_not_found"),
        (("--mlx-path", "out", "--recipe", "absent.json"), "recipe_not_found"),
        (("--mlx-path", "out", "--upload-repo", "no id"), "repository_invalid"),
        (("--dry-run", "--sensitivity", "x"), "option_conflict"),
        (("--sensitivity", "x", "--recipe", "4bit"), "option_conflict"),
        (("--sensitivity", "absent.txt"), "text_unreadable"),
        (("--sensitivity", "absent.txt", "--rounding", "search", "--cap", "2e9"), "text_unreadable"),
        (("--sensitivity", "x", "--cap", "inf"), "option_invalid"),
        (("--mlx-path", "out", "--recipe", "bf16", "--calibration", "x"), "option_no_effect"),
        (("--mlx-path", "out", "-q", "--rounding", "nearest", "--calibration", "x"), "option_no_effect"),
        (("--mlx-path", "out", "--eval", "absent.txt"), "text_unreadable"),
    ],
)
def test_options_that_break_a_rule_are_refused_in_one_line(raw, tmp_path, monkeypatch, capsys, options, code):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--hf-path", raw, *options)
    assert stop.value.code == 2 and f"[{code}]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
