"""The files of a tokenizer: what is no text in them, and what the loader or the model could not take."""

import codecs
import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
from refusing import refused

from mlx_qwen35.checkpoint.config import read_config
from mlx_qwen35.convert.files import generation_config
from mlx_qwen35.prompt.processor import Processor

NANO = Path(str(resources.files("mlx_qwen35") / "nano"))
MESSAGES = [{"role": "user", "content": "What is 34 + 58?"}]


@pytest.fixture
def folder(tmp_path):
    """nano's files beside its weights, to break."""
    for file in NANO.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def edit(file: Path, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def processor(folder: Path) -> Processor:
    return Processor.from_folder(folder, read_config(folder))


@pytest.mark.parametrize(
    "names",
    [
        ["tokenizer.json"], ["chat_template.jinja"], ["config.json"],
        ["tokenizer.json", "tokenizer_config.json", "config.json"],
    ],
)
def test_a_byte_order_mark_in_a_file_is_no_text(names, folder):
    expected = processor(folder).encode_messages(MESSAGES)
    for name in names:
        (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())
    assert processor(folder).encode_messages(MESSAGES) == expected


@pytest.mark.parametrize("fields", [{"quantization_config": "x"}, {"initializer_range": "x"}, {"architectures": 5}])
def test_what_config_json_says_of_other_things_is_no_matter_of_the_tokenizer(fields, folder):
    expected = processor(folder).encode_messages(MESSAGES)
    edit(folder / "config.json", **fields)
    assert processor(folder).encode_messages(MESSAGES) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"added_tokens_decoder": [1]}, {"added_tokens_decoder": {"10": {"content": 5}}}, {"eos_token": {"x": 1}},
        {"extra_special_tokens": 5}, {"add_prefix_space": "x"}, {"chat_template": [5]},
    ],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_what_the_loader_cannot_take_is_one_sentence(fields, folder):
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", **fields)
    with refused("tokenizer_invalid") as caught:
        processor(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"chat_template_type": "x"}, {"tool_parser_type": 5}, {"model_max_length": "x"}])
def test_what_tokenizer_config_says_to_other_programs_is_no_matter(fields, folder):
    expected = processor(folder).encode_messages(MESSAGES)
    edit(folder / "tokenizer_config.json", **fields)
    assert processor(folder).encode_messages(MESSAGES) == expected


@pytest.mark.parametrize(
    "fields", [{"model": None}, {"model": {"type": "x"}}, {"added_tokens": 5}, {"decoder": {"type": "x"}}]
)
def test_a_tokenizer_that_is_none_is_refused(fields, folder):
    edit(folder / "tokenizer.json", **fields)
    with refused("tokenizer_invalid"):
        processor(folder)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * (9 << 20)], ids=["not UTF-8", "9 MB"])
def test_a_template_that_is_no_text_of_a_sane_size_is_refused(content, folder):
    (folder / "chat_template.jinja").write_bytes(content)
    with refused("tokenizer_invalid", "chat_template.jinja"):
        processor(folder)


def test_a_token_that_the_model_has_no_row_for_is_refused(folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    edit(folder / "tokenizer.json", model=model | {"vocab": model["vocab"] | {"xyz": 5000}})
    with refused("tokenizer_invalid", "5000", "1023"):
        processor(folder)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_placeholder_that_has_another_id_in_the_tokenizer_is_refused(kind, folder):
    edit(folder / "config.json", **{f"{kind}_token_id": 5})
    with refused("config_field_invalid", f"'{kind}_token_id'", f"<|{kind}_pad|>", 5):
        processor(folder)


@pytest.mark.parametrize(
    "name, fields",
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<|im_end|>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1024": {"content": "<|im_end|>"}}}),
        ("tokenizer.json", {"added_tokens": [{"content": "<|im_end|>"}]}),
        ("tokenizer.json", {"added_tokens": [5, {"content": "<|im_end|>", "id": True}]}),
    ],
)
def test_a_conversion_takes_no_end_of_turn_that_is_no_token(name, fields, folder):
    edit(folder / name, **fields)
    with refused("tokenizer_invalid", "<|im_end|>"):
        generation_config(folder, read_config(folder))


@pytest.mark.parametrize(
    "name, fields", [("tokenizer_config.json", {"added_tokens_decoder": [1]}), ("tokenizer.json", {"added_tokens": 5})]
)
def test_a_conversion_names_a_list_of_tokens_that_is_none(name, fields, folder):
    edit(folder / name, **fields)
    with refused("config_field_invalid", name, next(iter(fields))):
        generation_config(folder, read_config(folder))
