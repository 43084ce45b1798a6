"""What a converted folder holds: names, layout, dtypes, configuration, files."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from converting import nearest, unpacked
from geometries import changed
from safetensors import safe_open

from mlx_qwen35.checkpoint.checkpoint import FP32_ORIGINAL, open_checkpoint
from mlx_qwen35.checkpoint.folder import INDEX
from mlx_qwen35.checkpoint.random import geometry, is_float32, write_random_checkpoint
from mlx_qwen35.checkpoint.shapes import is_matrix, mtp_shapes, text_shapes
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.card import CARD, PLOT, QUALITY
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.stream import write
from mlx_qwen35.fields import read_json


def load(folder: Path) -> dict[str, mx.array]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(mx.all(a == b))


def test_unquantized_folder_repeats_every_tensor_of_the_source(raw, tmp_path):
    before, after = load(raw), load(unpacked(raw, tmp_path / "out"))
    rounded = {name for name in before if name.endswith("linear_attn.norm.weight")}
    assert set(after) == set(before) | {FP32_ORIGINAL + name for name in rounded}
    assert [name for name in before if name not in rounded and not same(before[name], after[name])] == []


def test_float32_vector_is_rounded_in_place_and_kept_exactly_beside(raw, tmp_path):
    before, after = load(raw), load(convert(raw, tmp_path / "out"))
    names = [name for name in before if name.endswith("linear_attn.norm.weight")]
    assert len(names) == 3
    for name in names:
        assert same(after[name], before[name].astype(mx.bfloat16))
        assert same(after[FP32_ORIGINAL + name], before[name])
    assert set(open_checkpoint(tmp_path / "out").fp32_original) == set(names)


def test_float32_folder_needs_no_second_copies(raw, tmp_path):
    before, after = load(raw), load(unpacked(raw, tmp_path / "out", dtype="float32"))
    assert set(after) == set(before)
    assert [name for name in before if not same(before[name].astype(mx.float32), after[name])] == []


@pytest.mark.parametrize(
    "dtype", ["float16", *(pytest.param(dtype, marks=pytest.mark.full) for dtype in ("bfloat16", "float32"))]
)
@pytest.mark.parametrize("quantize", [False, True])
def test_a_log_stays_float32_and_exact(raw, tmp_path, dtype, quantize):
    before, after = load(raw), load(convert(raw, tmp_path / "out", dtype=dtype, quantize=quantize))
    names = [name for name in before if name.endswith("A_log")]
    assert len(names) == 3
    assert all(same(before[name], after[name]) for name in names)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_bits": 8, "q_group_size": 32},
        {"q_bits": 3, "dtype": "float16"},
        {"q_mode": "mxfp8", "dtype": "float32"},
        *(pytest.param({"q_mode": mode}, marks=pytest.mark.full) for mode in ("mxfp4", "nvfp4")),
    ],
)
def test_text_matrices_are_those_of_mx_quantize(raw, tmp_path, options):
    before, after = load(raw), load(nearest(raw, tmp_path / "out", quantize=True, **options))
    checkpoint = open_checkpoint(tmp_path / "out")
    shapes = text_shapes(checkpoint.config.text) | mtp_shapes(checkpoint.config.text)
    matrices = [name for name, shape in shapes.items() if is_matrix(name, shape)]
    assert len(matrices) == (3 * 8 + 7 + 1) + (7 + 1)
    for name in matrices:
        how = checkpoint.quantization(name)
        weight = before[name].astype(getattr(mx, options.get("dtype", "bfloat16")))
        parts = mx.quantize(weight, group_size=how.group_size, bits=how.bits, mode=how.mode, stream=mx.cpu)
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=False):
            assert same(after[name.removesuffix("weight") + suffix], part), (name, suffix)


def test_untied_head_is_quantized_too(tmp_path):
    source = write_random_checkpoint(tmp_path / "raw", changed(geometry("tiny"), tie_word_embeddings=True))
    assert "lm_head.scales" not in load(convert(source, tmp_path / "tied", quantize=True))
    source = write_random_checkpoint(tmp_path / "raw2", changed(geometry("tiny"), tie_word_embeddings=False))
    assert "lm_head.scales" in load(convert(source, tmp_path / "untied", quantize=True))


def test_names_of_a_text_only_source_stay_as_they_are(tmp_path):
    config = geometry("tiny")
    source = write_random_checkpoint(tmp_path / "raw", config, vision=False, mtp=False)
    short = {name.replace("model.language_model.", "model."): array for name, array in load(source).items()}
    for file in source.glob("*.safetensors"):
        file.unlink()
    (source / INDEX).unlink()
    mx.save_safetensors(str(source / "model.safetensors"), short)
    (source / "config.json").write_text(json.dumps(config["text_config"]))
    after = load(unpacked(source, tmp_path / "out"))
    assert {name for name in after if not name.startswith(FP32_ORIGINAL)} == set(short)
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


def test_converting_our_unquantized_folder_gives_what_the_source_gives(raw, tmp_path):
    direct = convert(raw, tmp_path / "direct", quantize=True, dtype="float32")
    again = convert(unpacked(raw, tmp_path / "step"), tmp_path / "again", quantize=True, dtype="float32")
    for file in direct.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_files_say_that_the_layout_is_hugging_faces(raw, tmp_path):
    out = convert(raw, tmp_path / "out", quantize=True)
    with safe_open(out / "model-00001-of-00001.safetensors", "np") as stream:
        assert stream.metadata() == {"format": "pt"}


def test_tensors_lie_at_multiples_of_their_width(tmp_path):
    config = changed(geometry("tiny"), linear_num_key_heads=1, linear_num_value_heads=3)  # three 16-bit numbers
    source = write_random_checkpoint(tmp_path / "raw", config)
    checkpoint = open_checkpoint(convert(source, tmp_path / "out"))
    wide = [e for e in (*checkpoint.entries.values(), *checkpoint.fp32_original.values()) if e.dtype == "F32"]
    assert len(wide) == 6 and all(entry.start % 4 == 0 for entry in wide)


def test_shards_stay_below_the_limit_and_the_index_names_them(raw, tmp_path):
    plan = make_plan(raw, shard_bytes=2_000_000)
    (tmp_path / "out").mkdir()
    write(plan, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 2_100_000 for file in files)
    index = read_json(tmp_path / "out" / INDEX)
    held = {file.name: set(mx.load(str(file))) for file in files}
    assert {name: file for file, names in held.items() for name in names} == index["weight_map"]
    before, after = load(raw), load(tmp_path / "out")
    assert index["metadata"] == {
        "total_size": sum(array.nbytes for array in after.values()),
        "total_parameters": sum(array.size for array in before.values()),
    }


def test_config_is_the_sources_with_quantization_tag_and_dtype(raw, tmp_path):
    out = convert(raw, tmp_path / "out", quantize=True, q_bits=8, q_vision_bits=4, dtype="float16")
    expected = read_json(raw / "config.json")
    expected["text_config"]["dtype"] = "float16"
    packed = {"group_size": 64, "bits": 8, "mode": "affine"}
    linear = ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
    tower = [f"blocks.{i}.{name}" for i in (0, 1) for name in linear] + ["merger.linear_fc1", "merger.linear_fc2"]
    packed |= {f"vision_tower.{name}": {"group_size": 64, "bits": 4, "mode": "affine"} for name in tower}
    expected |= {"quantization": packed, "quantization_config": packed}
    expected["mlx_qwen35"] = {"format": 1, "norms": "zero-centred"}
    assert read_json(out / "config.json") == expected


def test_unquantized_config_names_no_quantization(raw, tmp_path):
    config = read_json(unpacked(raw, tmp_path / "out") / "config.json")
    assert "quantization" not in config and "quantization_config" not in config


def test_every_dtype_field_of_the_config_follows(tmp_path):
    config = geometry("tiny") | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    config["vision_config"]["dtype"] = "bfloat16"
    source = write_random_checkpoint(tmp_path / "raw", config)
    values = read_json(convert(source, tmp_path / "out", dtype="float32") / "config.json")
    found = [values["torch_dtype"], values["dtype"], values["text_config"]["dtype"], values["vision_config"]["dtype"]]
    assert found == ["float32"] * 4


def test_dtype_without_a_config_field_is_that_of_the_embedding(tmp_path):
    config = geometry("tiny")
    del config["text_config"]["dtype"]
    source = write_random_checkpoint(tmp_path / "raw", config, dtype=mx.float16)
    out = unpacked(source, tmp_path / "out")
    assert {e.dtype for name, e in open_checkpoint(out).entries.items() if not name.endswith("A_log")} == {"F16"}
    assert read_json(out / "config.json")["text_config"]["dtype"] == "float16"


def test_tokenizer_template_and_licence_are_copied_and_code_is_not(raw, tmp_path):
    source = shutil.copytree(raw, tmp_path / "raw")
    for name in ("modeling.py", "pytorch_model.bin", "pytorch_model.bin.index.json", ".hidden.json", "README.md"):
        (source / name).write_text("not ours")
    out = convert(source, tmp_path / "out")
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"}
    assert all((out / name).read_bytes() == (raw / name).read_bytes() for name in copied)
    made = {"config.json", "generation_config.json", INDEX, "model-00001-of-00001.safetensors"}
    assert {file.name for file in out.iterdir()} == copied | made | {CARD, QUALITY, PLOT}
    assert "not ours" not in (out / CARD).read_text()


@pytest.mark.parametrize("holder", ["tokenizer_config.json", "tokenizer.json"])
def test_generation_config_names_both_end_tokens(tmp_path, holder):
    source = write_random_checkpoint(tmp_path / "raw", geometry("tiny"))
    tokens = {
        "tokenizer_config.json": {"added_tokens_decoder": {"993": {"content": "<|im_end|>"}}},
        "tokenizer.json": {"added_tokens": [{"id": 992, "content": "other"}, {"id": 993, "content": "<|im_end|>"}]},
    }
    (source / holder).write_text(json.dumps(tokens[holder]))
    out = convert(source, tmp_path / "out")
    assert read_json(out / "generation_config.json") == {"eos_token_id": [993, 991]}
    assert open_checkpoint(out).config.eos_token_ids == (991, 993)


def test_generation_config_of_the_source_keeps_its_values_and_gets_the_end_tokens_that_it_lacks(tmp_path):
    source = write_random_checkpoint(tmp_path / "raw", geometry("tiny"))
    (source / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6}')
    out = convert(source, tmp_path / "out")
    assert read_json(out / "generation_config.json") == {"eos_token_id": [7, 991], "temperature": 0.6}


def test_generation_config_that_names_all_end_tokens_is_copied(raw, tmp_path):
    source = shutil.copytree(raw, tmp_path / "raw")
    text = '{"eos_token_id": [991, 993], "top_k":   20}'
    (source / "generation_config.json").write_text(text)
    assert (convert(source, tmp_path / "out") / "generation_config.json").read_text() == text


def test_source_without_vision_and_draft_head_converts(tmp_path):
    source = write_random_checkpoint(tmp_path / "raw", geometry("tiny"), vision=False, mtp=False)
    checkpoint = open_checkpoint(convert(source, tmp_path / "out", quantize=True))
    assert not checkpoint.has("model.visual.") and not checkpoint.has("mtp.")


def test_float32_source_keeps_all_text_vectors_exactly_in_16_bits(source_of, tmp_path):
    before, after = load(source_of("float32")), load(convert(source_of("float32"), tmp_path / "out", dtype="bfloat16"))
    vectors = [n for n, a in before.items() if n.startswith("model.language_model.") and a.ndim == 1]
    exact = {name.removeprefix(FP32_ORIGINAL) for name in after if name.startswith(FP32_ORIGINAL)}
    assert exact == {name for name in vectors if not name.endswith("A_log")}
    assert all(same(after[FP32_ORIGINAL + name], before[name]) for name in exact)
    assert not any(is_matrix(name, before[name].shape) for name in exact)


def test_a_log_of_a_bfloat16_source_becomes_float32(tmp_path, raw):
    weights = {name: a.astype(mx.bfloat16) if is_float32(name) else a for name, a in load(raw).items()}
    source = write_random_checkpoint(tmp_path / "raw", geometry("tiny"), tensor=lambda name, shape: weights[name])
    for file in source.glob("*.safetensors"):
        file.unlink()
    (source / INDEX).unlink()
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    after = load(convert(source, tmp_path / "out"))
    name = "model.language_model.layers.0.linear_attn.A_log"
    assert same(after[name], weights[name].astype(mx.float32))
