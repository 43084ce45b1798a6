"""What a JSON file of a checkpoint must be, whatever its fields are."""

import codecs
import json

import pytest
from refusing import refused

from mlx_qwen35.fields import JSON_BYTES, Fields, read_json


@pytest.fixture
def file(tmp_path):
    return tmp_path / "config.json"


def test_a_byte_order_mark_is_no_text(file):
    file.write_bytes(codecs.BOM_UTF8 + b'{"x": 1}')
    assert read_json(file) == {"x": 1}


@pytest.mark.parametrize(
    "content, fact",
    [
        (b'{"x": ' + b"[" * 100_000, "deeper than 64"),
        (b"[" * 1_000_000, "deeper than 64"),
        (b'{"x": ' + b"[" * 70 + b"]" * 70 + b"}", "deeper than 64"),
        (b'{"x": ' + b"9" * 5000 + b"}", "5,000 digits"),
        (b'{"x": 1, "y": {"z": 1, "z": 1}}', "'z' twice"),
        (b'{"x": "\xff"}', "utf-8"),
        ('{"x": 1}'.encode("utf-16"), "utf-8"),
        (b"5", "int"),
    ],
    ids=["open", "brackets", "nested", "digits", "twice", "not UTF-8", "UTF-16", "no object"],
)
def test_a_file_that_is_no_json_object_of_sane_form_is_refused(content, fact, file):
    file.write_bytes(content)
    with refused("json_invalid", file, fact):
        read_json(file)


def test_a_file_of_more_bytes_than_such_a_file_may_have_is_refused(file):
    file.write_bytes(b'{"x": "' + b"x" * JSON_BYTES + b'"}')
    with refused("json_invalid", file, f"{JSON_BYTES:,}"):
        read_json(file)


def test_64_levels_are_read(file):
    values = json.loads('{"x": ' + "[" * 63 + "]" * 63 + "}")
    file.write_text(json.dumps(values))
    assert read_json(file) == values


def test_not_a_number_is_let_through_where_nobody_reads_it_and_refused_where_it_is_read(file):
    file.write_text('{"x": NaN, "y": 1e400}')
    fields = Fields(read_json(file), "config.json")
    with refused("config_field_invalid", "'x'", "nan"):
        fields.number("x", 0, 1)
    with refused("config_field_invalid", "'y'", "inf"):
        fields.number("y", 0, 1)


def test_a_long_value_is_shortened_in_the_message():
    with refused("config_field_invalid", "'x'") as caught:
        Fields({"x": ["y" * 5000] * 5000}, "config.json").get("x", str)
    assert len(str(caught.value)) < 1000
