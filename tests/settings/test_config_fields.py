"""Values of config.json and generation_config.json that would break a loop, an array or the computation later on."""

import copy
import math

import pytest
from refusing import refused

from mlx_qwen35.checkpoint.config import LINEAR, parse_config
from mlx_qwen35.checkpoint.random import geometry

HUGE = 10**8


def edited(part: str | None, **fields):
    values = copy.deepcopy(geometry("tiny"))
    (values[part] if part else values).update(fields)
    return values


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_hidden_layers", HUGE), ("mtp_num_hidden_layers", HUGE), ("mtp_num_hidden_layers", -1),
        ("mtp_num_hidden_layers", ""), ("full_attention_interval", HUGE), ("hidden_size", HUGE), ("vocab_size", HUGE),
        ("head_dim", 127), ("head_dim", HUGE), ("max_position_embeddings", 10**12), ("layer_types", [[LINEAR]] * 4),
        ("layer_types", [{"x": LINEAR}, None, LINEAR, 1]), ("layer_types", LINEAR), ("rms_norm_eps", math.nan),
        ("rms_norm_eps", math.inf), ("rms_norm_eps", -1e-6), ("rms_norm_eps", 0), ("rms_norm_eps", 1e-300),
        ("rms_norm_eps", 10**200), ("eos_token_id", -1), ("eos_token_id", 10**12), ("eos_token_id", True),
        ("eos_token_id", [0, [1]]), ("linear_conv_kernel_dim", HUGE),
        ("num_attention_heads", 4.0), ("tie_word_embeddings", 1), ("rope_scaling", "x"), ("rope_theta", "x"),
    ],
)  # fmt: skip
def test_a_text_field_out_of_bounds_is_named(field, value):
    with refused("config_field_invalid", f"'{field}'"):
        parse_config(edited("text_config", **{field: value}))


@pytest.mark.parametrize(
    "field, value",
    [
        ("rope_theta", 0), ("rope_theta", math.inf), ("rope_theta", math.nan), ("rope_theta", 0.5),
        ("partial_rotary_factor", math.nan), ("partial_rotary_factor", math.inf), ("partial_rotary_factor", 1.5),
        ("partial_rotary_factor", -0.25), ("mrope_section", [-6, 11, 11]), ("mrope_section", [10**12, 5, 5]),
        ("mrope_section", [True, 5, 5]), ("mrope_section", {"x": 1}),
    ],
)  # fmt: skip
def test_a_rotary_field_out_of_bounds_is_named(field, value):
    rope = geometry("tiny")["text_config"]["rope_parameters"] | {field: value}
    with refused("config_field_invalid", f"'{field}'"):
        parse_config(edited("text_config", rope_parameters=rope))


def test_no_dim_turns_is_refused():
    rope = geometry("tiny")["text_config"]["rope_parameters"] | {"partial_rotary_factor": 0, "mrope_section": [0, 0, 0]}
    with refused("config_field_invalid", "'mrope_section'"):
        parse_config(edited("text_config", rope_parameters=rope))


def test_the_dims_that_turn_are_cut_off_and_not_rounded_as_in_transformers():
    rope = geometry("tiny")["text_config"]["rope_parameters"]
    with refused("config_field_invalid", "31 of head_dim 128"):
        parse_config(edited("text_config", rope_parameters=rope | {"partial_rotary_factor": 0.2499}))


@pytest.mark.parametrize(
    "field, value, code",
    [
        ("depth", HUGE, "invalid"), ("patch_size", 10**6, "invalid"), ("spatial_merge_size", 0, "invalid"),
        ("spatial_merge_size", 10**6, "invalid"), ("num_position_embeddings", 10**12, "invalid"),
        ("num_heads", 5, "invalid"), ("num_heads", 96, "invalid"), ("temporal_patch_size", 3, "unsupported"),
        ("temporal_patch_size", 1, "unsupported"), ("in_channels", 4, "unsupported"),
    ],
)  # fmt: skip
def test_a_vision_field_out_of_bounds_is_named(field, value, code):
    with refused(f"config_field_{code}", f"'{field}'"):
        parse_config(edited("vision_config", **{field: value}))


@pytest.mark.parametrize("name", ["image", "video", "vision_start", "vision_end"])
@pytest.mark.parametrize("value", [-1, 10**12, True, "12"])
def test_a_token_id_that_is_none_is_named(name, value):
    with refused("config_field_invalid", f"'{name}_token_id'"):
        parse_config(edited(None, **{f"{name}_token_id": value}))


@pytest.mark.parametrize("field", ["quantization", "mlx_qwen35", "vision_config", "text_config"])
def test_a_list_in_the_place_of_an_object_is_named(field):
    with refused("config_field_invalid", f"'{field}'"):
        parse_config(edited(None, **{field: [1]}))


def test_a_text_only_config_with_a_vision_config_that_is_none_is_refused():
    with refused("config_field_invalid", "'vision_config'"):
        parse_config(geometry("tiny")["text_config"] | {"vision_config": 5})


@pytest.mark.parametrize("field, value", [("do_sample", "yes"), ("eos_token_id", -1), ("eos_token_id", [10**12])])
def test_a_field_of_generation_config_is_named_with_its_file(field, value):
    with refused("config_field_invalid", "generation_config.json", f"'{field}'"):
        parse_config(geometry("tiny"), {field: value})


def test_fields_of_generation_config_that_are_not_read_do_not_matter():
    parse_config(geometry("tiny"), {"temperature": math.nan, "top_p": "x", "top_k": -1})
