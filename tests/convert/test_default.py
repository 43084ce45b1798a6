"""What is written without a recipe, and what the command says of it."""

import json
import shutil

import pytest
from converting import fp8_folder, nearest
from refusing import refused

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.__main__ import main
from mlx_qwen35.convert.card import QUALITY
from mlx_qwen35.quantization import Quantization

LAYER = "model.language_model.layers.0."
MATRIX = f"{LAYER}mlp.up_proj.weight"
FOUR, EIGHT = Quantization(64, 4, "affine"), Quantization(64, 8, "affine")
NEAREST = {"rounding": "nearest", "verify": False}


def tensors(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def four(raw, tmp_path_factory):
    return convert(raw, tmp_path_factory.mktemp("default") / "4bit", recipe="4bit", **NEAREST)


def test_without_a_recipe_the_4bit_one_is_taken(raw, four, tmp_path):
    out = convert(raw, tmp_path / "out", **NEAREST)
    assert tensors(out) == tensors(four)
    assert "recipe `4bit`" in (out / "README.md").read_text()


def test_quantize_that_is_none_chooses_nothing(raw, four, tmp_path):
    for given in ({}, {"recipe": "4bit"}):
        out = convert(raw, tmp_path / f"out{len(given)}", quantize=None, **given, **NEAREST)
        assert tensors(out) == tensors(four)


def test_the_command_has_the_same_default(raw, four, tmp_path):
    main(["--hf-path", str(raw), "--mlx-path", str(tmp_path / "out"), "--rounding", "nearest", "--no-verify"])
    assert tensors(tmp_path / "out") == tensors(four)


def test_a_dry_run_tells_of_the_default(raw, capsys):
    main(["--hf-path", str(raw), "--dry-run"])
    without = capsys.readouterr().out
    main(["--hf-path", str(raw), "--dry-run", "--recipe", "4bit"])
    assert capsys.readouterr().out == without


def test_help_names_the_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "default: 4bit" in " ".join(capsys.readouterr().out.split())


def test_a_dtype_alone_is_that_of_what_the_default_leaves_unpacked(raw, tmp_path):
    out = open_checkpoint(convert(raw, tmp_path / "out", dtype="float16", **NEAREST))
    assert out.quantization(MATRIX) == FOUR and out.entries[f"{LAYER}input_layernorm.weight"].dtype == "F16"


def test_bits_of_the_tower_alone_go_with_the_default(raw, tmp_path):
    out = open_checkpoint(convert(raw, tmp_path / "out", q_vision_bits=5, **NEAREST))
    assert out.quantization(MATRIX) == FOUR
    assert out.quantization("model.visual.blocks.0.attn.qkv.weight") == Quantization(64, 5, "affine")


def test_q_keeps_the_meaning_that_it_has_in_mlx_lm(raw, tmp_path):
    out = open_checkpoint(convert(raw, tmp_path / "out", quantize=True, **NEAREST))
    names = (MATRIX, f"{LAYER}linear_attn.out_proj.weight", f"{LAYER}linear_attn.in_proj_a.weight")
    assert [out.quantization(name) for name in names] == [FOUR] * 3


def test_bf16_is_written_when_it_is_asked_for(raw, tmp_path):
    assert not open_checkpoint(convert(raw, tmp_path / "out", recipe="bf16", verify=False)).config.quantization


def test_fp8_gets_the_default(raw, tmp_path):
    out = open_checkpoint(convert(fp8_folder(raw, tmp_path / "fp8"), tmp_path / "out", **NEAREST))
    assert out.quantization(MATRIX) == FOUR


def test_what_an_mlx_program_has_packed_stays_as_it_is_packed(raw, tmp_path):
    packed = nearest(raw, tmp_path / "8bit", quantize=True, q_bits=8)
    out = convert(packed, tmp_path / "out", **NEAREST)
    assert open_checkpoint(out).quantization(MATRIX) == EIGHT and tensors(out) == tensors(packed)


def test_bits_of_the_tower_have_no_effect_on_what_stays_packed(four, tmp_path):
    with refused("option_no_effect", "--q-vision-bits 5"):
        convert(four, tmp_path / "out", q_vision_bits=5)


# --- the source's files ----------------------------------------------------------------------------------------------


def test_a_file_of_the_source_that_cannot_be_read_is_named_before_anything_is_written(tmp_path, monkeypatch):
    source = write_random_checkpoint(tmp_path / "raw", geometry("tiny"), vision=False, mtp=False)
    (source / "LICENSE").write_text("a licence")
    opened = open

    def shut(self, *rest, **options):
        if self.name == "LICENSE":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *rest, **options)

    monkeypatch.setattr("pathlib.Path.open", shut)
    with refused("source_unreadable", source / "LICENSE", "Permission denied"):
        convert(source, tmp_path / "out", quantize=True)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


BULK = '{"bulk": {"group_size": 64, "bits": 4, "mode": "affine"}, '
RECIPES = {
    "brackets": "[" * 100_000,
    "a number of 5,000 digits": '{"bulk": ' + "9" * 5000 + "}",
    "bits that are no whole number": '{"bulk": {"group_size": 64, "bits": 4.0, "mode": "affine"}, "exceptions": {}}',
    "a mode that is a list": '{"bulk": {"group_size": 64, "bits": 4, "mode": []}, "exceptions": {}}',
    "no bulk": '{"exceptions": {}}',
    "exceptions that are a list": BULK + '"exceptions": []}',
    "an exception that is 0": BULK + '"exceptions": {"x": 0}}',
    "reasons that are text": BULK + '"exceptions": {}, "reasons": "x"}',
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_a_damaged_recipe_is_refused(raw, tmp_path, text):
    (tmp_path / "mine.json").write_text(text)
    with refused("recipe_invalid", "mine.json"):
        convert(raw, tmp_path / "out", recipe=str(tmp_path / "mine.json"))


@pytest.mark.parametrize("name", ["x" * 300 + ".json", "~nobody-of-this-name/x.json"])
def test_a_recipe_of_an_impossible_name_is_refused(raw, tmp_path, name):
    with refused("recipe_not_found"):
        convert(raw, tmp_path / "out", recipe=name)


def test_a_source_whose_name_is_no_unicode_converts(raw, tmp_path):
    source = shutil.copytree(raw, tmp_path / "caf\udce9")
    assert "caf?" in (convert(source, tmp_path / "out", **NEAREST) / "README.md").read_text()


@pytest.mark.full
def test_a_mark_at_the_beginning_of_a_text_is_none_of_it(tmp_path):
    plain, marked = (tmp_path / name for name in ("plain.txt", "marked.txt"))
    plain.write_text("What is 34 + 58?", encoding="utf-8")
    marked.write_text("What is 34 + 58?", encoding="utf-8-sig")
    for file in (plain, marked):
        convert("nano", tmp_path / file.stem, recipe="bf16", evaluation=file, verify=False)
    first, second = (
        json.loads((tmp_path / name / QUALITY).read_text())["evaluation"]["positions"] for name in ("plain", "marked")
    )
    assert first == second


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a\0b", "x" * 300])
def test_a_text_of_an_impossible_name_is_refused(raw, tmp_path, name):
    with refused("text_unreadable"):
        convert(raw, tmp_path / "out", evaluation=name)
