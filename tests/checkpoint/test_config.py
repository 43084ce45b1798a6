"""config.json: what is read from it, and that nothing which changes the computation is guessed."""

import copy
import json

import pytest
import refusing
from geometries import changed

from mlx_qwen35.checkpoint.config import FULL, LINEAR, parse_config, read_config
from mlx_qwen35.checkpoint.random import GEOMETRIES, geometry


def config(**text):
    return changed(geometry("4b"), **text)


def without(*path: str):
    values = copy.deepcopy(geometry("4b"))
    place = values
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return values


def with_rope(**fields):
    return config(rope_parameters=geometry("4b")["text_config"]["rope_parameters"] | fields)


def refused(values, code: str, *facts: object) -> None:
    """Parsing is refused, see refusing.refused."""
    with refusing.refused(code, *facts):
        parse_config(values)


def test_the_published_4b_is_read_field_by_field():
    text = parse_config(geometry("4b")).text
    assert (text.hidden_size, text.intermediate_size, text.vocab_size, text.num_hidden_layers) == (
        2560,
        9216,
        248320,
        32,
    )
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (16, 4, 256)
    assert (text.linear_num_key_heads, text.linear_num_value_heads) == (16, 32)
    assert (text.linear_key_head_dim, text.linear_value_head_dim, text.linear_conv_kernel_dim) == (128, 128, 4)
    assert (text.key_dim, text.value_dim, text.conv_dim) == (2048, 4096, 8192)
    assert [i for i, kind in enumerate(text.layer_types) if kind == FULL] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert text.rms_norm_eps == 1e-6 and text.tie_word_embeddings is True and text.mtp_num_hidden_layers == 1
    assert (text.rope.theta, text.rope.dims, text.rope.sections) == (1e7, 64, (11, 11, 10))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_member_of_the_family_is_read(name):
    assert parse_config(geometry(name)).vision is not None


def test_layer_types_follow_the_interval_where_they_are_not_listed():
    assert parse_config(without("text_config", "layer_types")).text.layer_types == (LINEAR, LINEAR, LINEAR, FULL) * 8


def test_layer_types_count_where_they_differ_from_the_interval():
    kinds = [FULL] + [LINEAR] * 31
    assert parse_config(config(layer_types=kinds)).text.layer_types == tuple(kinds)


def test_a_text_only_config_is_read_at_the_top():
    values = geometry("4b")["text_config"]
    parsed = parse_config(values)
    assert parsed.vision is None and parsed.token_ids == {}
    assert parsed.text == parse_config(geometry("4b")).text


@pytest.mark.parametrize(
    "field", ["attn_output_gate", "mamba_ssm_dtype", "mlp_only_layers", "mtp_use_dedicated_embeddings"]
)
def test_a_field_with_one_possible_value_may_be_absent(field):
    assert parse_config(without("text_config", field)).text == parse_config(geometry("4b")).text


def test_mlx_lm_writes_type_for_rope_type():
    values = with_rope(type="default")
    del values["text_config"]["rope_parameters"]["rope_type"]
    assert parse_config(values).text == parse_config(geometry("4b")).text
    values["text_config"]["rope_parameters"]["type"] = "linear"
    refused(values, "config_field_unsupported", "rope_type")


def test_newer_relatives_name_their_gate_swish():
    assert parse_config(config(output_gate_type="swish")).text == parse_config(geometry("4b")).text


def test_the_tie_is_found_at_the_top_first_and_then_in_the_text_config():
    values = without("text_config", "tie_word_embeddings")
    assert parse_config(values | {"tie_word_embeddings": False}).text.tie_word_embeddings is False
    assert parse_config(geometry("4b") | {"tie_word_embeddings": False}).text.tie_word_embeddings is False
    assert parse_config(without("tie_word_embeddings")).text.tie_word_embeddings is True


def test_end_tokens_of_both_files_are_united_in_order():
    values = geometry("4b") | {"eos_token_id": [248046, 248044]}
    assert parse_config(values).eos_token_ids == (248044, 248046)
    assert parse_config(geometry("4b"), {"eos_token_id": [248046]}).eos_token_ids == (248044, 248046)


# --- absent -----------------------------------------------------------------------------------------------------------

CHANGES_THE_COMPUTATION = (
    "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim", "rms_norm_eps", "hidden_act", "attention_bias", "max_position_embeddings",
    "rope_parameters",
)  # fmt: skip


@pytest.mark.parametrize("field", CHANGES_THE_COMPUTATION)
def test_an_absent_text_field_is_named(field):
    refused(without("text_config", field), "config_field_missing", "text_config", repr(field))


@pytest.mark.parametrize("field", ["rope_type", "rope_theta", "partial_rotary_factor", "mrope_section"])
def test_an_absent_rope_field_is_named(field):
    refused(without("text_config", "rope_parameters", field), "config_field_missing", "rope_parameters", repr(field))


def test_rope_fields_at_the_top_are_no_substitute():
    refused(
        without("text_config", "rope_parameters") | {"rope_theta": 1e7},
        "config_field_missing",
        "text_config",
        "rope_parameters",
    )


@pytest.mark.parametrize(
    "field",
    [
        "depth", "hidden_size", "intermediate_size", "num_heads", "in_channels", "patch_size", "temporal_patch_size",
        "spatial_merge_size", "num_position_embeddings", "out_hidden_size", "hidden_act",
    ],
)  # fmt: skip
def test_an_absent_vision_field_is_named(field):
    refused(without("vision_config", field), "config_field_missing", "vision_config", repr(field))


@pytest.mark.parametrize("name", ["image", "video", "vision_start", "vision_end"])
def test_an_absent_token_id_is_named(name):
    refused(without(f"{name}_token_id"), "config_field_missing", "config.json", name, "_token_id")


def test_both_kinds_of_layer_list_absent_is_an_error():
    values = without("text_config", "layer_types")
    del values["text_config"]["full_attention_interval"]
    refused(values, "config_field_missing", "layer_types", "full_attention_interval")


def test_the_tie_absent_in_both_places_is_an_error():
    values = without("text_config", "tie_word_embeddings")
    del values["tie_word_embeddings"]
    refused(values, "config_field_missing", "tie_word_embeddings")


# --- unsupported ------------------------------------------------------------------------------------------------------


INVALID, UNSUPPORTED = "config_field_invalid", "config_field_unsupported"


@pytest.mark.parametrize(
    ("values", "code", "fact"),
    [
        (config(hidden_act="gelu"), UNSUPPORTED, "hidden_act"),
        (config(attention_bias=True), UNSUPPORTED, "attention_bias"),
        (config(attn_output_gate=False), UNSUPPORTED, "attn_output_gate"),
        (config(mamba_ssm_dtype="bfloat16"), UNSUPPORTED, "mamba_ssm_dtype"),
        (config(output_gate_type="sigmoid"), UNSUPPORTED, "output_gate_type"),
        (config(mtp_use_dedicated_embeddings=True), UNSUPPORTED, "mtp_use_dedicated_embeddings"),
        (config(mlp_only_layers=[1]), UNSUPPORTED, "mlp_only_layers"),
        (config(rope_scaling={"rope_type": "linear", "factor": 4.0}), UNSUPPORTED, "rope_scaling"),
        (config(use_sliding_window=True), UNSUPPORTED, "use_sliding_window"),
        (config(rms_norm_eps=-1.0), INVALID, "rms_norm_eps"),
        (config(eos_token_id="end"), INVALID, "eos_token_id"),
        (with_rope(rope_type="dynamic", factor=4.0), UNSUPPORTED, "rope_type"),
        (with_rope(mrope_interleaved=False), UNSUPPORTED, "mrope_interleaved"),
        (with_rope(mrope_section=[11, 11, 11]), INVALID, "mrope_section"),
        (with_rope(mrope_section=[16, 16]), INVALID, "mrope_section"),
        (with_rope(rope_theta="1e7"), INVALID, "rope_theta"),
        (config(num_key_value_heads=5), INVALID, "num_key_value_heads"),
        (config(linear_num_key_heads=5), INVALID, "linear_num_key_heads"),
        (config(linear_conv_kernel_dim=1), INVALID, "linear_conv_kernel_dim"),
        (config(hidden_size=0), INVALID, "hidden_size"),
        (config(hidden_size="2560"), INVALID, "hidden_size"),
        (config(hidden_size=2560.0), INVALID, "hidden_size"),
        (config(hidden_size=True), INVALID, "hidden_size"),
        (config(layer_types=[LINEAR] * 31), INVALID, "layer_types"),
        (config(layer_types=["sliding_attention"] * 32), INVALID, "sliding_attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_that_is_not_implemented_is_named(values, code, fact):
    refused(values, code, fact)


def test_deepstack_is_refused():
    values = geometry("4b")
    values["vision_config"]["deepstack_visual_indexes"] = [5, 11]
    refused(values, "config_field_unsupported", "deepstack_visual_indexes", "5", "11")


def test_a_vision_tower_of_another_width_is_refused():
    values = geometry("4b")
    values["vision_config"]["out_hidden_size"] = 2048
    refused(values, "config_field_invalid", "out_hidden_size", "2048", "hidden_size", "2560")


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3_5_moe_text"])
def test_mixture_of_experts_is_refused_by_name(kind):
    refused(
        geometry("4b") | {"model_type": kind}, "model_type_unsupported", repr(kind), "0.8B", "2B", "4B", "9B", "27B"
    )


def test_experts_under_a_dense_name_are_refused():
    refused(config(num_experts=256), "model_type_unsupported")


@pytest.mark.parametrize("kind", ["qwen3_next", "llama", None])
def test_another_architecture_is_refused_by_name(kind):
    refused(geometry("4b") | {"model_type": kind}, "model_type_unsupported", "model_type", repr(kind), "Qwen3.5")


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_folder_without_config_is_refused(tmp_path):
    with refusing.refused("config_missing", "config.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"", b"not JSON", b"\xff\xfe\x00"])
def test_a_config_that_is_not_json_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with refusing.refused("json_invalid", "config.json"):
        read_config(tmp_path)


def test_a_config_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with refusing.refused("json_invalid"):
        read_config(tmp_path)


def test_generation_config_adds_its_end_tokens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(geometry("tiny")))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert read_config(tmp_path).eos_token_ids == (991, 7, 8)
