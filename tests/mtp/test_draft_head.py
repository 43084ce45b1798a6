"""A draft head beside the trunk, as other programs leave it, is the raw checkpoint's head."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_text_model
from geometries import changed
from refusing import refused

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.config import FULL
from mlx_qwen35.checkpoint.draft_head import PLACES, norms_are_raw
from mlx_qwen35.checkpoint.folder import INDEX
from mlx_qwen35.checkpoint.names import is_zero_centred
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.shapes import is_matrix
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.stream import write
from mlx_qwen35.fields import read_json
from mlx_qwen35.quantization import Quantization

SMALL = changed(
    geometry("tiny"), num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], intermediate_size=512
)
SAME = 2e-5  # one program and the same numbers; a norm taken for the other form is off by more than 0.1
PACKED = 1e-4  # products with packed matrices against those with what they stand for
BLOCK = "mtplx_mtp_quantization"
NORM = "mtp.layers.0.input_layernorm.weight"
UP = "mtp.layers.0.mlp.up_proj.weight"

Arrays = dict[str, mx.array]


def tensors(folder: Path) -> Arrays:
    return {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}


def drafted(folder: Path) -> np.ndarray:
    """What the head of a folder makes of 9 random pairs: (1, 9, D)."""
    model = load_text_model(folder)
    rng = np.random.default_rng(8)
    hidden, embeddings = (mx.array(rng.normal(size=(1, 9, 256)).astype(np.float32)) for _ in range(2))
    cache = Cache(replace(model.config, layer_types=(FULL,)), model.dtype, 1)
    with cache.forward(9) as context:
        rotary = model.rotary.table(context.positions)
        return np.array(model.mtp.part(embeddings, hidden, rotary, context, cache.layers))


def difference(folder: Path, expected: np.ndarray) -> float:
    return float(np.abs(drafted(folder) - expected).max())


@pytest.fixture(scope="module")
def raw(checkpoint_folder) -> Path:
    return checkpoint_folder(SMALL, 3, vision=False)


@pytest.fixture(scope="module")
def expected(raw) -> np.ndarray:
    return drafted(raw)


@pytest.fixture(scope="module")
def head(raw) -> Arrays:
    return {name: array for name, array in tensors(raw).items() if name.startswith("mtp.")}


@pytest.fixture(scope="module")
def trunk(raw) -> Arrays:
    """As mlx-lm writes it, its norms in float32."""
    arrays = {}
    for name, array in tensors(raw).items():
        if name.startswith("mtp."):
            continue
        if name.endswith("conv1d.weight"):
            array = mx.contiguous(array.swapaxes(1, 2))
        elif is_zero_centred(name):
            array = array.astype(mx.float32) + 1.0
        arrays[name.replace("model.language_model.", "language_model.model.")] = array
    return arrays


@pytest.fixture
def written(tmp_path, trunk) -> Callable[..., Path]:
    """(head, its place, what config.json says, arrays of the trunk, whether an index names the trunk) -> the folder."""

    def write(head: Arrays, place: str = PLACES[0], said: dict | None = None, body=None, index: bool = True) -> Path:
        folder, body = tmp_path / "model", trunk if body is None else body
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(folder / "model.safetensors"), body)
        mx.save_safetensors(str(folder / place), head)
        if index:
            (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(body, "model.safetensors")}))
        (folder / "config.json").write_text(json.dumps(SMALL | (said or {})))
        return folder

    return write


def shifted(head: Arrays, dtype: mx.Dtype) -> Arrays:
    """The one added to the norms, as programs do: in float32, then rounded."""
    return {n: (a.astype(mx.float32) + 1.0).astype(dtype) if is_zero_centred(n) else a for n, a in head.items()}


def unshifted(head: Arrays) -> Arrays:
    return {n: a.astype(mx.float32) - 1.0 if is_zero_centred(n) else a for n, a in head.items()}


def of_raw(raw: Path, head: Arrays, folder: Path) -> np.ndarray:
    """What a raw checkpoint drafts that has this head."""
    folder.mkdir()
    arrays = {name: array for name, array in tensors(raw).items() if not name.startswith("mtp.")}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays | head)
    (folder / "config.json").write_text(json.dumps(SMALL))
    return drafted(folder)


# --- places and names ------------------------------------------------------------------------------------------------

NAMINGS = {"mtp.": str, "language_model.mtp.": "language_model.{}".format, "bare": lambda n: n.removeprefix("mtp.")}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("place", [*PLACES, "heads/own.safetensors"])
def test_a_head_beside_the_trunk_drafts_as_that_of_the_raw_folder(place, naming, head, expected, written):
    named = {} if place in PLACES else {"mlx_lm_extra_tensors": {"mtp_file": place}}
    arrays = {NAMINGS[naming](name): array for name, array in head.items()}
    assert difference(written(arrays, place, named), expected) < SAME


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("place", [PLACES[0], PLACES[2]])
def test_a_head_is_found_where_no_index_names_the_trunk(place, naming, head, expected, written):
    arrays = {NAMINGS[naming](name): array for name, array in head.items()}
    assert difference(written(arrays, place, index=False), expected) < SAME


def test_a_head_that_config_json_names_goes_before_one_that_lies_elsewhere(head, expected, written):
    folder = written(head, "own.safetensors", {"mlx_lm_extra_tensors": {"mtp_file": "own.safetensors"}})
    mx.save_safetensors(str(folder / PLACES[0]), {"fc.weight": mx.zeros((2, 2))})
    assert difference(folder, expected) < SAME


@pytest.mark.parametrize("index", [True, False])
def test_the_first_of_several_places_wins(index, head, expected, written):
    folder = written(head, PLACES[0], index=index)
    mx.save_safetensors(str(folder / PLACES[2]), {"fc.weight": mx.zeros((2, 2))})
    assert difference(folder, expected) < SAME


@pytest.mark.parametrize("index", [True, False])
def test_a_head_in_the_shards_goes_before_one_beside_them(index, trunk, head, expected, written):
    said = {"mlx_lm_extra_tensors": {"mtp_file": "absent.safetensors"}}
    folder = written({"fc.weight": mx.zeros((2, 2))}, PLACES[0], said, trunk | head, index)
    assert difference(folder, expected) < SAME
    assert open_checkpoint(folder).mtp_head_fault is None  # nothing is looked for beside the trunk


def test_a_folder_whose_configuration_has_no_head_is_not_searched_for_one(head, written):
    said = changed(SMALL, mtp_num_hidden_layers=0) | {"mlx_lm_extra_tensors": {"mtp_file": "absent.safetensors"}}
    folder = written(head, PLACES[0], said)
    assert not open_checkpoint(folder).has("mtp.") and load_text_model(folder).mtp is None


def test_a_file_that_is_a_link_as_in_the_hubs_cache_is_read(head, expected, written, tmp_path):
    folder = written(head, PLACES[1], {"mlx_lm_extra_tensors": {"mtp_file": PLACES[1]}})
    (folder / PLACES[1]).rename(tmp_path / "blob")
    (folder / PLACES[1]).symlink_to(tmp_path / "blob")
    assert difference(folder, expected) < SAME


@pytest.mark.parametrize("named", [str, "mtp.{}".format, "language_model.{}".format])
def test_an_embedding_and_logits_in_a_heads_own_file_are_passed_over(named, head, expected, written):
    arrays = {named(f"{name}.weight"): mx.zeros((4, 256)) for name in ("embed_tokens", "lm_head")}
    arrays |= {named("embed_tokens.scales"): mx.zeros((4, 8))}
    assert difference(written(head | arrays), expected) < SAME


def test_a_file_that_config_json_names_is_no_shard_where_no_index_names_those(head, expected, written):
    bare = {name.removeprefix("mtp."): array for name, array in head.items()}
    said = {"mlx_lm_extra_tensors": {"mtp_file": "./own.safetensors"}}
    assert difference(written(bare, "own.safetensors", said, index=False), expected) < SAME


# --- heads that cannot be used ---------------------------------------------------------------------------------------


def left_out(folder: Path) -> str:
    """The folder opens and loads without a head; why."""
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.has("mtp.") and checkpoint.mtp_head_fault is not None
    load_text_model(folder)
    return checkpoint.mtp_head_fault


def renamed(head: Arrays) -> Arrays:
    return {re.sub(r"\bfc\b", "eh_proj", name): array for name, array in head.items()}


def test_a_folder_has_no_fault_where_its_head_is_used_or_there_is_none(head, trunk, written):
    folder = written(head)
    assert open_checkpoint(folder).mtp_head_fault is None
    (folder / PLACES[0]).unlink()
    assert open_checkpoint(folder).mtp_head_fault is None
    assert open_checkpoint(written({}, "other.safetensors", body=trunk | head)).mtp_head_fault is None


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("place", [PLACES[0], PLACES[3]])
def test_a_file_of_other_tensors_is_left_out_and_they_are_named(place, index, head, written):
    fault = left_out(written(renamed(head), place, index=index))
    wrong = "1 missing: mtp.fc.weight; 1 unexpected: mtp.eh_proj.weight"
    assert fault == f"the draft head in {place} cannot be used: {wrong}"


def test_a_head_of_another_model_is_left_out(head, written):
    fault = left_out(written(head | {"mtp.norm.weight": mx.zeros((128,))}))
    assert fault.endswith("cannot be used: 1 misshapen: mtp.norm.weight [128] instead of [256]")


def test_the_same_tensors_in_the_shards_are_refused(trunk, head, written):
    with refused("tensors_mismatch", "1", "mtp.fc.weight", "mtp.eh_proj.weight"):
        open_checkpoint(written(head, body=trunk | renamed(head)))


@pytest.mark.parametrize("index", [True, False])
def test_a_truncated_file_is_left_out(index, head, written):
    folder = written(head, index=index)
    (folder / PLACES[0]).write_bytes((folder / PLACES[0]).read_bytes()[:-1])
    assert re.match(r"the draft head in mtp.safetensors cannot be used: .*: truncated; download", left_out(folder))


@pytest.mark.parametrize("index", [True, False])
def test_a_file_that_is_named_and_absent_is_missed(index, head, written):
    said = {"mlx_lm_extra_tensors": {"mtp_file": "heads/mtp.safetensors"}}
    fault = left_out(written(head, PLACES[0], said, index=index))
    assert re.match(r"the draft head .* says that .* is in 'heads/mtp.safetensors' .*which is absent", fault)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_file_outside_of_the_folder_is_not_read(absolute, head, written, tmp_path):
    file = str(tmp_path / "out.safetensors") if absolute else "mtp/../../out.safetensors"
    mx.save_safetensors(str(tmp_path / "out.safetensors"), head)
    folder = written(head, "mtp/weights.safetensors", {"mlx_lm_extra_tensors": {"mtp_file": file}})
    assert f"must lie inside the folder, got '{file}'" in left_out(folder)


def test_a_file_that_the_system_cannot_open_is_left_out(head, written):
    said = {"mlx_lm_extra_tensors": {"mtp_file": "x" * 300}}
    assert re.search("cannot be used: .*x{300}", left_out(written(head, said=said)))


def test_a_packing_that_mlx_does_not_offer_leaves_a_head_out(head, written):
    folder = written(packed(head, lambda name: FINE), said={BLOCK: {"bits": 7, "group_size": 32}})
    assert left_out(folder).endswith("in mtp.safetensors cannot be used: mode affine offers bits "
                                     "(2, 3, 4, 5, 6, 8), got 7")  # fmt: skip


@pytest.mark.parametrize("name", ["mlx_lm_extra_tensors", BLOCK])
def test_an_entry_that_is_not_an_object_leaves_a_head_beside_the_trunk_out(name, head, written):
    fault = left_out(written(head, PLACES[0], {name: "mtp"}, index=False))
    assert fault.endswith(f"cannot be used: config.json: '{name}' must be an object, got 'mtp'")


@pytest.mark.parametrize("name", ["mlx_lm_extra_tensors", BLOCK])
def test_an_entry_that_is_not_an_object_is_refused_where_the_head_is_in_the_shards(name, trunk, head, written):
    with refused("config_field_invalid", "config.json", name):
        open_checkpoint(written({}, "other.safetensors", {name: "mtp"}, trunk | head))


# --- norms -----------------------------------------------------------------------------------------------------------

DTYPES = [mx.bfloat16, mx.float16, mx.float32]
RAW_WORDS = [
    {"mtplx_mtp_norm_encoding": "delta"}, {"mtp_norm_encoding": "Delta_Plus_One"},
    {BLOCK: {"norm_encoding": "mlx_delta"}}, {BLOCK: {"norm_weight_encoding": "delta"}},
]  # fmt: skip


@pytest.mark.parametrize("said", [{}, *RAW_WORDS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_less_one_are_known_declared_or_not(dtype, said, head, expected, written):
    arrays = {name: array.astype(dtype) if is_zero_centred(name) else array for name, array in head.items()}
    assert difference(written(arrays, said=said), expected) < SAME


@pytest.mark.parametrize("said", [{}, {"mtp_norm_encoding": "gamma"}, {BLOCK: {"norm_encoding": "absolute"}}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_with_the_one_added_are_known_declared_or_not(dtype, said, raw, head, written, tmp_path):
    arrays = shifted(head, dtype)
    expected = of_raw(raw, unshifted(arrays), tmp_path / "raw")
    assert difference(written(arrays, said=said), expected) < SAME


def test_norms_less_one_are_known_in_the_shards_of_a_converted_folder(trunk, head, expected, written):
    assert difference(written({}, body=trunk | head), expected) < SAME


def coarse(head: Arrays) -> Arrays:
    """Norms of few digits, which may be of either form."""
    return {n: mx.round(a * 64) / 64 if is_zero_centred(n) else a for n, a in head.items()}


@pytest.mark.parametrize("said", [{}, *RAW_WORDS])
def test_norms_that_may_be_either_have_the_one_added_unless_it_is_declared(said, raw, head, written, tmp_path):
    arrays = coarse(head)
    assert norms_are_raw({NORM: arrays[NORM]}, True) and not norms_are_raw({NORM: arrays[NORM]}, False)
    expected = of_raw(raw, arrays if said else unshifted(arrays), tmp_path / "raw")
    assert difference(written(arrays, said=said), expected) < SAME


@pytest.mark.parametrize("name", [NORM, *(NORM.replace("layers.0.input_layernorm", n) for n in (
    "layers.0.post_attention_layernorm", "pre_fc_norm_embedding", "pre_fc_norm_hidden",
))])  # fmt: skip
def test_one_norm_that_must_be_less_one_tells_for_the_whole_head(name, raw, head, written, tmp_path):
    arrays = coarse(head) | {name: head[name]}
    expected = of_raw(raw, arrays, tmp_path / "raw")
    assert difference(written(arrays), expected) < SAME


def test_a_sum_of_one_and_a_bfloat16_number_is_never_taken_for_less_one():
    """All of them from -64 to 64, in every dtype that it may be stored in."""
    every = mx.view(mx.arange(1 << 16).astype(mx.uint16), mx.bfloat16)
    every = mx.array(np.array(every.astype(mx.float32))[np.abs(np.array(every.astype(mx.float32))) <= 64])
    for dtype in DTYPES:
        assert every.size > 30000 and not norms_are_raw({NORM: (every + 1.0).astype(dtype)}, False)


def test_norms_trained_in_float32_prove_nothing():
    norm = mx.random.normal((256,), key=mx.random.key(1)) * 0.1
    for stored in (norm, 1.0 + norm):
        assert norms_are_raw({NORM: stored}, True) and not norms_are_raw({NORM: stored}, None)


def test_declared_the_one_added_and_stored_less_one_is_refused_by_name(head, written):
    model = load_text_model(written(head, said={"mtp_norm_encoding": "absolute"}))
    with refused("draft_head_contradicted", "1"):
        model.mtp.part  # noqa: B018


def test_declared_less_one_and_stored_with_the_one_added_is_refused_by_name(head, written):
    model = load_text_model(written(shifted(head, mx.float32), said={"mtp_norm_encoding": "delta"}))
    with refused("draft_head_contradicted", "1"):
        model.mtp.part  # noqa: B018


@pytest.mark.parametrize("tag", [{}, {"mlx_qwen35": {"format": 1, "norms": "zero-centred"}}])
def test_norms_beside_a_raw_trunk_are_less_one(tag, raw, head, written, tmp_path):
    body = {name: array for name, array in tensors(raw).items() if not name.startswith("mtp.")}
    arrays = coarse(head)  # no proof either way
    expected = of_raw(raw, arrays, tmp_path / "raw")
    folder = written(arrays, said=tag, body=body)
    assert not open_checkpoint(folder).is_folded(NORM)
    assert difference(folder, expected) < SAME


# --- packing ---------------------------------------------------------------------------------------------------------

FOUR, FINE, EIGHT = Quantization(64, 4, "affine"), Quantization(32, 4, "affine"), Quantization(32, 8, "affine")
MXFP4 = Quantization(32, 4, "mxfp4")


def form(how: Quantization) -> dict[str, Any]:
    return {"group_size": how.group_size, "bits": how.bits, "mode": how.mode}


def packed(arrays: Arrays, how: Callable[[str], Quantization]) -> Arrays:
    out: Arrays = {}
    for name, array in arrays.items():
        if not is_matrix(name, array.shape):
            out[name] = array
            continue
        parts = mx.quantize(array, **form(how(name)))
        out |= {name.removesuffix("weight") + s: p for s, p in zip(("weight", "scales", "biases"), parts, strict=False)}
    return out


def unpacked(arrays: Arrays, how: Callable[[str], Quantization]) -> Arrays:
    """The matrices as packing leaves them, in float32."""
    out = dict(arrays)
    for name, array in arrays.items():
        if is_matrix(name, array.shape):
            weight, *scales = mx.quantize(array, **form(how(name)))
            scales = [s if s.dtype == mx.uint8 else s.astype(mx.float32) for s in scales]
            out[name] = mx.dequantize(weight, *scales, **form(how(name))).astype(mx.float32)
    return out


@pytest.fixture
def four_bit_trunk(trunk) -> Arrays:
    return packed(trunk, lambda name: FOUR)


def test_a_finer_packed_head_over_a_packed_trunk(raw, head, written, four_bit_trunk, tmp_path):
    expected = of_raw(raw, unpacked(head, lambda name: FINE), tmp_path / "raw")
    said = {"quantization": form(FOUR), BLOCK: {"bits": 4, "group_size": 32, "policy": "x", "prequantized": True}}
    folder = written(packed(head, lambda name: FINE), said=said, body=four_bit_trunk)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.quantization(UP) == FINE
    assert checkpoint.quantization("model.language_model.layers.0.mlp.up_proj.weight") == FOUR
    assert difference(folder, expected) < PACKED


def test_a_head_of_which_nothing_is_said_is_packed_as_the_trunk(head, written, four_bit_trunk):
    folder = written(packed(head, lambda name: FOUR), said={"quantization": form(FOUR)}, body=four_bit_trunk)
    assert open_checkpoint(folder).quantization(UP) == FOUR


def test_a_packed_head_over_a_plain_trunk(raw, head, written, tmp_path):
    expected = of_raw(raw, unpacked(head, lambda name: MXFP4), tmp_path / "raw")
    assert difference(written(packed(head, lambda name: MXFP4), said={BLOCK: form(MXFP4)}), expected) < PACKED


def test_a_plain_head_over_a_packed_trunk(head, expected, written, four_bit_trunk):
    said = {"quantization": form(FOUR), BLOCK: {"bits": 4, "group_size": 64, "prequantized": False}}
    folder = written(head, said=said, body=four_bit_trunk)
    assert open_checkpoint(folder).quantization(UP) is None
    assert difference(folder, expected) < SAME


OVERRIDES = {
    "in the head's entry": ({}, {"mtp.layers.0.mlp.up_proj": form(EIGHT)}),
    "in the head's entry, a bare name": ({}, {"layers.0.mlp.up_proj": {"bits": 8}}),
    "in its modules": ({}, {"modules": {"language_model.mtp.layers.0.mlp.up_proj": {"bits": 8}}}),
    "in the trunk's entry": ({"language_model.mtp.layers.0.mlp.up_proj": form(EIGHT)}, {}),
    "in both, where the head's counts": (
        {"language_model.mtp.layers.0.mlp.up_proj": {"bits": 2, "group_size": 32}},
        {"mtp.layers.0.mlp.up_proj": {"bits": 8}},
    ),
}


@pytest.mark.parametrize("where", OVERRIDES)
def test_a_matrix_of_the_head_with_a_packing_of_its_own(where, raw, head, written, four_bit_trunk, tmp_path):
    def how(name: str) -> Quantization:
        return EIGHT if name == UP else FINE

    of_trunk, of_head = OVERRIDES[where]
    expected = of_raw(raw, unpacked(head, how), tmp_path / "raw")
    said = {"quantization": form(FOUR) | of_trunk, BLOCK: {"bits": 4, "group_size": 32} | of_head}
    assert difference(written(packed(head, how), said=said, body=four_bit_trunk), expected) < PACKED


# --- converting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("less_one", [True, False])
def test_a_converted_folder_has_the_head_in_its_shards(less_one, head, expected, written, tmp_path):
    arrays = head if less_one else shifted(head, mx.float32)
    said = {"mlx_lm_extra_tensors": {"mtp_file": PLACES[1], "other": 1}}
    said |= {"mtp_norm_encoding": "delta"} if less_one else {}
    out = convert(written(arrays, PLACES[1], said), tmp_path / "out", recipe="bf16")
    assert {entry.file.parent for entry in open_checkpoint(out).entries.values()} == {out}
    assert difference(out, expected) == 0 if less_one else difference(out, expected) < SAME
    config = read_json(out / "config.json")
    assert config["mlx_lm_extra_tensors"] == {"other": 1} and "mtp_norm_encoding" not in config


def test_bare_names_beside_a_raw_trunk_become_those_of_hugging_face(raw, head, expected, written, tmp_path):
    body = {name: array for name, array in tensors(raw).items() if not name.startswith("mtp.")}
    bare = {name.removeprefix("mtp."): array for name, array in head.items()}
    out = convert(written(bare, body=body), tmp_path / "out", recipe="bf16")
    assert set(head) < set(tensors(out))
    assert difference(out, expected) == 0


@pytest.mark.parametrize("plain", [True, False], ids=["plain trunk", "packed trunk"])
def test_a_packed_head_stays_as_it_is_packed(plain, head, trunk, written, four_bit_trunk, tmp_path):
    arrays = packed(head, lambda name: EIGHT if name == UP else FINE)
    said = {BLOCK: {"bits": 4, "group_size": 32, "modules": {"layers.0.mlp.up_proj": {"bits": 8}}}}
    said |= {} if plain else {"quantization": form(FOUR), "quantization_config": form(FOUR)}
    folder = written(arrays, said=said, body=trunk if plain else four_bit_trunk)
    out = tmp_path / "out"
    out.mkdir()
    write(make_plan(folder), out)
    after = tensors(out)
    assert all(mx.array_equal(array, after[name]) for name, array in arrays.items())
    config, checkpoint = read_json(out / "config.json"), open_checkpoint(out)
    assert {name: config["quantization"][name] for name in form(FOUR)} in (form(FOUR), form(EIGHT), form(FINE))
    assert BLOCK not in config and config.get("quantization_config", config["quantization"]) == config["quantization"]
    assert (checkpoint.quantization(UP), checkpoint.quantization("mtp.fc.weight")) == (EIGHT, FINE)
    assert np.array_equal(drafted(folder), drafted(out))


def test_a_head_packed_anew_is_packed_as_asked(head, written, tmp_path):
    said = {BLOCK: {"bits": 8, "group_size": 32}}
    with pytest.warns(UserWarning, match="already quantized"):
        out = convert(written(packed(head, lambda name: EIGHT), said=said), tmp_path / "out", quantize=True)
    assert open_checkpoint(out).quantization(UP) == FOUR


def test_a_head_that_changes_while_it_is_converted_is_noticed(head, written, tmp_path):
    from mlx_qwen35.convert.source import check_unchanged, open_source

    folder = written(head)
    source = open_source(folder)
    check_unchanged(source.files)
    with (folder / PLACES[0]).open("ab") as file:
        file.write(b"x")
    with refused("source_changed", "mtp.safetensors"):
        check_unchanged(source.files)


FAULTS = {
    "other tensors": (renamed, {}, "1 unexpected"),
    "absent": (dict, {"mlx_lm_extra_tensors": {"mtp_file": "absent.safetensors"}}, "absent"),
    "no object": (dict, {"mlx_lm_extra_tensors": "mtp"}, "must be an object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_head_that_cannot_be_used_is_told_of_and_not_converted(fault, head, written, tmp_path):
    change, said, why = FAULTS[fault]
    folder = written(change(head), said=said)
    with pytest.warns(UserWarning, match=rf"model is converted without a draft head: .* cannot be used: .*{why}"):
        out = convert(folder, tmp_path / "out")
    after = open_checkpoint(out)
    assert not after.has("mtp.") and after.mtp_head_fault is None
