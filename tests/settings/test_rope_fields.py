"""The rotary embedding's settings in the fields of before transformers 5, alone or beside rope_parameters."""

import json

import pytest
from geometries import changed
from refusing import refused

from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import StorageOptions

ROPE = geometry("tiny")["text_config"]["rope_parameters"]
SECTIONS = {name: ROPE[name] for name in ("mrope_section", "mrope_interleaved")}
OLDER = {name: ROPE[name] for name in ("rope_theta", "partial_rotary_factor")} | {"rope_scaling": SECTIONS}


def config(**fields):
    """A config.json with these text fields; one that is None is absent."""
    values = changed(geometry("tiny"), **fields)
    values["text_config"] = {name: value for name, value in values["text_config"].items() if value is not None}
    return values


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": None, **OLDER},
        {"rope_parameters": None, **OLDER, "rope_scaling": SECTIONS | {"type": "default"}},
        {"rope_parameters": None, **OLDER, "rope_scaling": SECTIONS | {"rope_type": "default"}},
        {"rope_parameters": None, "rope_scaling": ROPE},
        {"rope_parameters": {"rope_type": "default"} | SECTIONS, "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        {"rope_scaling": ROPE},
        {"rope_scaling": ROPE, "rope_theta": 10_000_000.0},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {}, "partial_rotary_factor": 0.25},
    ],
)
def test_older_fields_are_read_alone_and_beside_those_of_today(fields):
    assert parse_config(config(**fields)).text == parse_config(geometry("tiny")).text


@pytest.mark.parametrize("kind", ["dynamic", "linear", "longrope", "llama3", "mrope", ["default"]])
@pytest.mark.parametrize("name", ["type", "rope_type"])
@pytest.mark.parametrize("beside", [ROPE, None])
def test_a_scaling_other_than_yarn_is_refused(name, kind, beside):
    with pytest.raises(ValueError) as caught:
        parse_config(config(rope_parameters=beside, **OLDER | {"rope_scaling": SECTIONS | {name: kind, "factor": 4.0}}))
    assert caught.value.code == ("config_field_unsupported" if isinstance(kind, str) else "config_field_invalid")
    assert "rope_scaling" in str(caught.value) and str(kind) in str(caught.value)


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"rope_theta": 5e6}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": SECTIONS | {"mrope_section": [5, 6, 5]}}, "mrope_section"),
    ],
)
def test_fields_that_contradict_each_other_are_named(fields, name):
    with refused("config_field_invalid", f"'{name}'"):
        parse_config(config(**fields))


@pytest.mark.parametrize("absent", ["rope_theta", "partial_rotary_factor", "rope_scaling"])
def test_an_absent_older_field_is_named(absent):
    with refused("config_field_missing", "mrope_section" if absent == "rope_scaling" else absent):
        parse_config(config(rope_parameters=None, **OLDER | {absent: None}))


def test_a_conversion_writes_them_where_mlx_lm_reads_them(checkpoint_copy):
    source = checkpoint_copy(vision=False, mtp=False)
    (source / "config.json").write_text(json.dumps(config(rope_parameters=None, **OLDER)))
    text = make_plan(source, StorageOptions("bf16")).config["text_config"]
    assert text["rope_parameters"] == ROPE and not set(OLDER) & set(text)
