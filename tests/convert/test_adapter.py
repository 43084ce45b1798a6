"""An adapter fused by the converter: what is written is the source with the adapter, rounded once."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from converting import arrays_of, converted, files_of, fp8_folder, nearest
from refusing import refused

from mlx_qwen35.checkpoint.adapter import Pair, read_adapter
from mlx_qwen35.checkpoint.adapter_choice import Chosen
from mlx_qwen35.checkpoint.adapter_write import write_adapter
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.fusing import fuse
from mlx_qwen35.checkpoint.shapes import is_matrix
from mlx_qwen35.convert import convert, stream
from mlx_qwen35.convert.__main__ import main
from mlx_qwen35.convert.calibrate import statistics
from mlx_qwen35.convert.card import CARD, QUALITY, Facts
from mlx_qwen35.convert.card import card as make_card
from mlx_qwen35.convert.evaluate import evaluate
from mlx_qwen35.convert.fusion import AdapterOptions
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import StorageOptions
from mlx_qwen35.convert.sensitivity import sensitivity
from mlx_qwen35.convert.stream import write
from mlx_qwen35.convert.target import appearing_whole
from mlx_qwen35.load import load_model
from mlx_qwen35.quantization import Quantization

TEXT, VISION = "model.language_model.", "model.visual."
MAPS = (
    f"{TEXT}layers.0.linear_attn.in_proj_qkv.weight", f"{TEXT}layers.1.linear_attn.out_proj.weight",
    f"{TEXT}layers.2.mlp.up_proj.weight", f"{TEXT}layers.3.self_attn.q_proj.weight",
)  # fmt: skip
OF_PARTS = (f"{VISION}blocks.0.attn.qkv.weight", "mtp.layers.0.mlp.up_proj.weight")
IDS = np.random.default_rng(5).integers(0, 980, (1, 12))
TOKENS = IDS.tolist()


def pairs_of(folder, names=MAPS, size=0.05, rank=2, scale=1.5) -> dict[str, Pair]:
    """Low-rank parts for a checkpoint, random but the same each time."""
    random, shapes = np.random.default_rng(3), open_checkpoint(folder, fp8=True).shapes
    made = {}
    for name in names:
        out, width = shapes[name]
        a, b = (mx.array(random.normal(0, size, shape).astype(np.float32)) for shape in ((rank, width), (out, rank)))
        made[name] = Pair(a, b, scale)
    return made


@pytest.fixture(scope="module")
def adapter(raw, tmp_path_factory):
    """PEFT's folder for maps of the text model, of the vision encoder and of the draft head."""
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    write_adapter(folder, pairs_of(raw, MAPS + OF_PARTS))
    return folder


@pytest.fixture(scope="module")
def fused(raw, adapter, tmp_path_factory):
    """The bfloat16 source with the adapter, in bfloat16."""
    return convert(raw, tmp_path_factory.mktemp("fused") / "out", adapter=adapter, recipe="bf16")


def exactly(source, target, adapter=None, scale=1.0, dtype="float32"):
    """The unquantized source with an adapter, in this dtype."""
    converted(source, target, adapter=AdapterOptions(adapter, scale), dtype=dtype, verify=False)
    return target


def logits(folder, adapters=None) -> mx.array:
    model = load_model(open_checkpoint(folder), mx.float32, str(folder), adapters=adapters)
    return model(mx.array(IDS), model.make_cache(1))


def beside(folder, adapter) -> mx.array:
    return logits(folder, Chosen({"mine": read_adapter(adapter, open_checkpoint(folder))}, "mine"))


def largest(difference: mx.array) -> float:
    return mx.abs(difference.astype(mx.float32)).max().item()


# --- weights ---------------------------------------------------------------------------------------------------------


def test_each_tensor_is_fused_in_float32_and_rounded_once(raw, adapter, fused):
    before, after = arrays_of(raw), arrays_of(fused)
    for name, pair in pairs_of(raw, MAPS + OF_PARTS).items():
        whole = np.array(before[name].astype(mx.float32)) + 1.5 * np.array(pair.b) @ np.array(pair.a)
        steps = mx.view(mx.array(whole).astype(mx.bfloat16), mx.int16) - mx.view(after[name], mx.int16)
        assert largest(steps) <= 1 and mx.mean(steps != 0).item() < 1e-4, name  # sums of another order
        assert largest(after[name] - before[name]) > 0.01, name


def test_what_the_adapter_does_not_change_keeps_its_bytes(raw, adapter, fused):
    before, after = arrays_of(raw), arrays_of(fused)
    untouched = [name for name in before if name not in MAPS + OF_PARTS]
    assert any(name.startswith(VISION) for name in untouched) and any(name.startswith("mtp.") for name in untouched)
    for name in untouched:
        exact = after.get(f"mtp.float32.{name}", after[name])
        assert mx.array_equal(exact, before[name]) and exact.dtype == before[name].dtype, name


def test_quantizing_while_fusing_is_quantizing_what_was_fused(raw, adapter, fused, tmp_path):
    at_once = convert(raw, tmp_path / "at once", adapter=adapter, recipe="4bit", verify=False)
    after = convert(fused, tmp_path / "after", recipe="4bit", verify=False)
    assert files_of(at_once) == files_of(after)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.full)])
def test_fused_logits_are_those_of_the_adapter_beside(source_of, adapter, tmp_path, dtype):
    source = source_of(dtype)
    own = logits(exactly(source, tmp_path / "out", adapter, dtype=dtype))
    aside = beside(source, adapter)
    assert largest(aside - logits(source)) > 0.1
    assert largest(own - aside) < (2e-5 if dtype == "float32" else 5e-3)


@pytest.mark.full
def test_fp8_weights_are_fused_at_their_values(raw, adapter, tmp_path):
    source = fp8_folder(raw, tmp_path / "fp8")
    before, after = (arrays_of(exactly(source, tmp_path / str(given is None), given)) for given in (None, adapter))
    read = read_adapter(adapter, open_checkpoint(raw))
    for name in MAPS:
        assert largest(after[name] - fuse(read, name, before[name])) < 1e-6, name


def test_adapter_scale_is_a_factor_of_the_low_rank_part(source_of, adapter, tmp_path):
    source = source_of("float32")
    half = arrays_of(exactly(source, tmp_path / "half", adapter, 0.5))
    read = read_adapter(adapter, open_checkpoint(source), 0.5)
    for name in MAPS:
        assert largest(half[name] - fuse(read, name, arrays_of(source)[name])) < 1e-6


# --- the table and the head -------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_head_that_the_adapter_leaves_becomes_one_of_its_own(source_of, tmp_path):
    """PEFT's low-rank part of the table is none of the head's that is tied to it."""
    source, table = source_of("float32"), f"{TEXT}embed_tokens.weight"
    write_adapter(tmp_path / "mine", pairs_of(source, (table,)))
    folder = exactly(source, tmp_path / "out", tmp_path / "mine")
    arrays = arrays_of(folder)
    assert not open_checkpoint(folder).config.text.tie_word_embeddings
    assert mx.array_equal(arrays["lm_head.weight"], arrays_of(source)[table])
    assert largest(arrays[table] - arrays["lm_head.weight"]) > 0.001
    assert largest(logits(folder) - beside(source, tmp_path / "mine")) < 2e-5


# --- quantized sources ------------------------------------------------------------------------------------------------


def test_a_packed_source_that_would_stay_packed_is_refused(raw, adapter, tmp_path):
    packed = nearest(raw, tmp_path / "packed", quantize=True)
    with refused("source_quantized", MAPS[0], "--adapter"):
        convert(packed, tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_packed_weights_are_fused_at_their_values_and_packed_again_with_a_warning(raw, adapter, tmp_path):
    packed = nearest(raw, tmp_path / "packed", quantize=True)
    folder = convert(packed, tmp_path / "plain", adapter=adapter, recipe="bf16")
    assert largest(logits(folder) - beside(packed, adapter)) < 0.05 < largest(logits(folder) - logits(packed)) / 2
    with pytest.warns(UserWarning, match="rounded away"):
        convert(packed, tmp_path / "again", adapter=adapter, quantize=True, rounding="nearest")
    before, after = open_checkpoint(packed), arrays_of(tmp_path / "again")
    for name in (name for name, shape in before.shapes.items() if name.startswith(TEXT) and is_matrix(name, shape)):
        same = mx.array_equal(after[name], arrays_of(packed)[name])
        assert same == (name not in MAPS), name


# --- measurements -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(source_of, tmp_path_factory):
    """(source, adapter folder, the adapter read, the fused folder), all float32; the table of tokens is changed too."""
    source, place = source_of("float32"), tmp_path_factory.mktemp("exact")
    write_adapter(place / "mine", pairs_of(source, (*MAPS, f"{TEXT}embed_tokens.weight")))
    folder = exactly(source, place / "out", place / "mine")
    return source, place / "mine", read_adapter(place / "mine", open_checkpoint(source)), folder


@pytest.mark.full
def test_evaluation_compares_with_the_fused_source(exact):
    source, _, read, folder = exact
    found = evaluate(open_checkpoint(source), open_checkpoint(folder), TOKENS, adapter=read)
    assert abs(found.kl) < 1e-9 and found.top1 == 1 and max(found.layers) < 1e-6


@pytest.mark.full
def test_calibration_runs_the_fused_source(exact):
    source, _, read, folder = exact
    fused, plain = statistics(open_checkpoint(folder), TOKENS), statistics(open_checkpoint(source), TOKENS)
    found = statistics(open_checkpoint(source), TOKENS, read)
    assert found.keys() == fused.keys()
    for name, squares in found.items():
        np.testing.assert_allclose(squares, fused[name], rtol=1e-4, err_msg=name)
    assert not np.allclose(found[MAPS[1]], plain[MAPS[1]], rtol=0.01)


@pytest.mark.full
def test_sensitivity_quantizes_the_fused_source(exact):
    source, _, read, folder = exact
    four = (Quantization(64, 4, "affine"),)
    ours, theirs = (
        {cost.group: cost.kl for cost in sensitivity(open_checkpoint(start), TOKENS, four, own) if cost.quantization}
        for start, own in ((source, read), (folder, None))
    )
    assert ours.keys() == theirs.keys() and all(abs(ours[group] - kl) < 1e-3 * kl for group, kl in theirs.items())


# --- the command ------------------------------------------------------------------------------------------------------


def test_dry_run_says_adapter_and_ranks_and_which_tensors_change(raw, adapter, capsys):
    main(["--hf-path", str(raw), "--adapter", str(adapter), "--dry-run", "--adapter-scale", "0.5"])
    text = capsys.readouterr().out
    assert "adapter mine (peft): 6 maps of rank 2, scaled by 0.5" in text
    changed = [line.split()[0] for line in text.splitlines() if "BF16 + rank 2" in line]
    assert sorted(changed) == sorted(MAPS + OF_PARTS)
    main(["--hf-path", str(raw), "--adapter", str(adapter), "--dry-run", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["adapter"]["maps"], told["adapter"]["ranks"], told["adapter"]["scale"]) == (6, [2], 1)


def test_the_card_names_adapter_and_base(raw, adapter, fused, monkeypatch, capsys, tmp_path):
    quality, card = json.loads((fused / QUALITY).read_text()), (fused / CARD).read_text()
    assert quality["adapter"]["fingerprint"] == read_adapter(adapter, open_checkpoint(raw)).fingerprint
    assert quality["tensors"][MAPS[0]]["relative_squared_error"] > 1e-7  # of rounding what was fused
    assert quality["tensors"][f"{TEXT}layers.0.mlp.up_proj.weight"]["relative_squared_error"] == 0
    assert f"fused into the weights of {raw.name}: mine (peft)" in card and str(adapter) not in card
    base = Facts("mine-4bit", "Qwen/Qwen3.5-4B", "4bit", adapter=quality["adapter"])
    assert "base_model: Qwen/Qwen3.5-4B\nbase_model_relation: finetune" in make_card(open_checkpoint(fused), base)


def test_the_summary_and_the_evaluation_name_the_adapter(raw, adapter, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("What is this? A red circle. ")
    given = ["--hf-path", str(raw), "--adapter", str(adapter), "--recipe", "bf16", "--eval", str(text)]
    main([*given, "--mlx-path", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "adapter mine (peft): 6 maps of rank 2" in told and "against the source with the adapter" in told
    found = json.loads((tmp_path / "out" / QUALITY).read_text())["evaluation"]
    assert found["kl"] < 1e-3  # bfloat16 against the unrounded; against the bare source it is 0.1
    assert "against the source with the adapter" in (tmp_path / "out" / CARD).read_text()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"adapter_scale": 2.0}, "option_no_effect"),
        ({"adapter": {"one": "mine"}}, "option_invalid"),
        ({"adapter": ["one", "two"]}, "option_invalid"),
        ({"adapter": "nowhere"}, "adapter_not_found"),
        ({"adapter": "ADAPTER", "adapter_scale": float("nan")}, "option_invalid"),
    ],
)
def test_what_cannot_be_fused_is_refused_before_anything_is_written(raw, adapter, tmp_path, options, code):
    given = {name: adapter if value == "ADAPTER" else value for name, value in options.items()}
    with refused(code):
        convert(raw, tmp_path / "out", **given)
    assert not any(tmp_path.iterdir())


def test_the_adapters_folder_is_never_written_into(raw, adapter, tmp_path):
    own = Path(shutil.copytree(adapter, tmp_path / "mine"))
    before = files_of(own)
    for target, code in ((own, "target_refused"), (own / "out", "target_overlaps_source")):
        with refused(code, own):
            convert(raw, target, adapter=own, overwrite=True)
    shutil.copytree(raw, tmp_path / "out")
    inside = Path(shutil.copytree(adapter, tmp_path / "out" / "mine"))
    with refused("target_overlaps_source", "mine"):
        convert(raw, tmp_path / "out", adapter=inside, overwrite=True)
    assert files_of(own) == before == files_of(inside)


# --- killed in the middle ---------------------------------------------------------------------------------------------


def broken_off(source, target, adapter, monkeypatch):
    """A conversion that ends after some chunks, as where the power fails: nothing is removed."""
    count, write_at = iter(range(10_000)), os.pwrite

    def fails(*given):
        if next(count) == 150:
            raise Stopped
        return write_at(*given)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(stream, "BATCH_BYTES", 200_000)
        patched.setattr(os, "pwrite", fails)
        patched.setattr(shutil, "rmtree", lambda *_: None)
        plan = make_plan(source, StorageOptions(recipe="bf16"), AdapterOptions(adapter))
        with appearing_whole(target, False, keeps=True) as folder:
            write(plan, folder)


class Stopped(BaseException):
    pass


def test_what_was_broken_off_resumes_with_its_own_adapter_and_ends_with_the_same_bytes(
    raw, adapter, fused, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 30_000)
    broken_off(raw, tmp_path / "out", adapter, monkeypatch)
    write_adapter(tmp_path / "mine", pairs_of(raw, MAPS + OF_PARTS, size=0.04))
    for given in ({"adapter": tmp_path / "mine"}, {"adapter": adapter, "adapter_scale": 0.5}, {}):
        with refused("resume_differs", "adapter"):
            convert(raw, tmp_path / "out", recipe="bf16", resume=True, **given)
    resumed = convert(raw, tmp_path / "out", adapter=adapter, recipe="bf16", resume=True)
    assert "resuming:" in capfd.readouterr().err
    assert files_of(resumed) == files_of(fused)

