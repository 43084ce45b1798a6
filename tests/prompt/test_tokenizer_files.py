"""What the tokenizer's files mean: what they mean to transformers, whatever form their writers gave them."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from many_scripts import STRINGS
from refusing import refused
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

from mlx_qwen35 import Processor
from mlx_qwen35.checkpoint.config import read_config
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.prompt.tokenizer import load_tokenizer

NANO = resolve("nano")
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
NEW = [{**TOKEN, "content": "<new>"}, {**TOKEN, "content": "Hello", "lstrip": True, "special": False}]
SAMPLES = [
    "Hello, <new> world</new>  <old>x<bos> <|im_start|>user\nnaïve<|im_end|><|endoftext|>",
    "  HELLO<think>\n1 Hello <unk>", *STRINGS[:40],
]  # fmt: skip

# What is changed in tokenizer_config.json, and the older files beside it.
FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as they are": ({}, {}),
    "the names of the class": ({"eos_token": ..., "unk_token": ..., "pad_token": ...}, {}),
    "no names": ({"eos_token": None, "unk_token": None, "pad_token": None}, {}),
    "a class of its own": ({"tokenizer_class": "Qwen3_5Tokenizer"}, {}),
    "the class of Qwen2": ({"tokenizer_class": "Qwen2TokenizerFast"}, {}),
    "no class": ({"tokenizer_class": ...}, {}),
    "a new token by name": ({"bos_token": "<bos>", "mask_token": {"__type": "AddedToken", **NEW[0]}}, {}),
    "a name for a word": ({"sep_token": "s", "my_token": "<|vision_start|>", "add_bos_token": True}, {}),
    "a name for a token that is not special": ({"think_token": "<think>"}, {}),
    "extra tokens in a list": ({"extra_special_tokens": ["<old>", "<|im_start|>", "<think>"]}, {}),
    "extra tokens by name": ({"extra_special_tokens": {"image_token": "<|image_pad|>", "call_token": "<new>"}}, {}),
    "additional tokens": ({"additional_special_tokens": ["<|im_start|>", "<new>"]}, {}),
    "added_tokens_decoder": ({"added_tokens_decoder": {"992": NEW[1], "991": NEW[0]}}, {}),
    "added_tokens_decoder before the older files": (
        {"added_tokens_decoder": {"991": NEW[0]}},
        {"special_tokens_map": {"eos_token": "<old>"}, "added_tokens": {"<old>": 992}},
    ),
    "special_tokens_map.json": (
        {}, {"special_tokens_map": {"eos_token": NEW[0], "additional_special_tokens": ["<old>"]}},
    ),
    "added_tokens.json": (
        {"pad_token": "<new>"}, {"added_tokens": {"<old>": 1025, "<new>": 1024, "<|im_end|>": 993}},
    ),
    "a space in front": ({"add_prefix_space": True}, {}),
    "special tokens split": ({"split_special_tokens": True}, {}),
    "blanks cleaned up": ({"clean_up_tokenization_spaces": True}, {}),
    "a short context": ({"model_max_length": 5, "truncation_side": "left", "padding_side": "left"}, {}),
    "code that is not run": ({"auto_map": {"AutoTokenizer": ["x.X", None]}, "tokenizer_class": "Qwen3_5Tokenizer"}, {}),
}  # fmt: skip


def described(tokenizer: Any, templates: Any, names: Any) -> dict[str, Any]:
    """All that a tokenizer's files decide."""
    tokens = [tokenizer.encode(text) for text in SAMPLES]
    return {
        "tokens": tokens,
        "bare": [tokenizer.encode(text, add_special_tokens=False) for text in SAMPLES],
        "texts": [tokenizer.decode(ids) for ids in tokens],
        "without special": [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens],
        "names": names,
        "templates": templates,
        "vocabulary": tokenizer.get_vocab(),
    }


def same(folder: Path, read_theirs: Callable[[Path], Any]) -> Any:
    """Our tokenizer of a folder, which transformers reads in the same way."""
    found, theirs = load_tokenizer(folder), read_theirs(folder)
    assert described(found, found.chat_template, found.special_tokens) == described(
        theirs, theirs.chat_template, theirs.special_tokens_map
    )
    assert found.eos_token_ids == {theirs.eos_token_id} - {None}
    return found


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(NANO / name, tmp_path)
    return tmp_path


def edit(file: Path, **fields: Any) -> None:
    """Sets fields of a JSON file; one that is ... is taken out."""
    values = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


@pytest.mark.parametrize("name", FILES)
def test_the_files_mean_what_they_mean_to_transformers(name: str, copy: Path, read_theirs):
    settings, older = FILES[name]
    edit(copy / "tokenizer_config.json", **settings)
    for file, values in older.items():
        (copy / f"{file}.json").write_text(json.dumps(values))
    same(copy, read_theirs)


def test_a_folder_without_tokenizer_config_is_read(copy: Path, read_theirs):
    (copy / "tokenizer_config.json").unlink()
    assert same(copy, read_theirs).special_tokens["eos_token"] == "<|endoftext|>"


def test_normalizer_pre_tokenizer_and_decoder_are_the_family_s_whatever_tokenizer_json_has(copy: Path, read_theirs):
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(copy / "tokenizer.json"))
    edit(copy / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    assert same(copy, read_theirs).encode("HeLLo का") == load_tokenizer(NANO).encode("HeLLo का")


def test_options_of_the_model_that_the_family_does_not_have_are_left_out(copy: Path, read_theirs):
    model = json.loads((copy / "tokenizer.json").read_text())["model"]
    options = {"dropout": 0.5, "unk_token": "a", "fuse_unk": True, "byte_fallback": True, "ignore_merges": True}
    edit(copy / "tokenizer.json", model=model | options | {"merges": [" ".join(pair) for pair in model["merges"]]})
    same(copy, read_theirs)


def test_a_post_processor_adds_its_tokens_unless_it_is_not_to(copy: Path, read_theirs):
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    start = ("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[start])
    tokenizer.save(str(copy / "tokenizer.json"))
    found = same(copy, read_theirs)
    assert found.encode("a") == [start[1], *found.encode("a", add_special_tokens=False)]


@pytest.mark.parametrize("kind", ["truncation", "padding"])
def test_truncation_and_padding_of_tokenizer_json_change_no_prompt(kind: str, copy: Path, read_theirs):
    text = "one two three four five six"
    expected = load_tokenizer(copy).encode(text)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.enable_truncation(3) if kind == "truncation" else tokenizer.enable_padding(length=99, pad_token="a")
    tokenizer.save(str(copy / "tokenizer.json"))
    assert same(copy, read_theirs).encode(text) == expected
    processor = Processor.from_folder(copy, read_config(copy))
    assert list(processor.encode_text(text).tokens) == expected


def test_a_model_that_is_no_bpe_is_refused(copy: Path):
    edit(copy / "tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})
    with refused("tokenizer_invalid", "BPE", "WordLevel"):
        load_tokenizer(copy)


def test_nothing_in_the_folder_is_run_or_imported(copy: Path):
    (copy / "x.py").write_text("raise AssertionError('code of the folder was run')")
    edit(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.X", "x.X"]}, tool_parser_type="x")
    (copy / "config.json").unlink()  # and of the model's configuration nothing is read
    known = set(sys.modules)
    assert load_tokenizer(copy).encode("Hello") == load_tokenizer(NANO).encode("Hello")
    assert not {"x", "transformers_modules"} & (set(sys.modules) - known)


# --- chat templates --------------------------------------------------------------------------------------------------

NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
EXTRA = "additional_chat_templates/tool_use.jinja"
# Files with templates, and the chat_template of tokenizer_config.json.
TEMPLATES: dict[str, tuple[dict[str, str], Any]] = {
    "none": ({}, ...),
    "a file": ({"chat_template.jinja": "F\r\n{{ 1 }}é"}, ...),
    "settings": ({}, "S"),
    "a file before the settings": ({"chat_template.jinja": "F"}, "S"),
    "a list in the settings": ({}, NAMED),
    "a file before the list": ({"chat_template.jinja": "F"}, NAMED),
    "a file and another": ({"chat_template.jinja": "F", EXTRA: "X"}, "S"),
    "only another": ({EXTRA: "X"}, NAMED),
    "another of the first's name": ({"chat_template.jinja": "F", "additional_chat_templates/default.jinja": "X"}, ...),
}


@pytest.fixture
def with_templates(copy: Path) -> Callable[[dict[str, str], Any], Path]:
    def folder(files: dict[str, str], settings: Any) -> Path:
        (copy / "chat_template.jinja").unlink()
        (copy / "additional_chat_templates").mkdir()
        for name, text in files.items():
            (copy / name).write_text(text, newline="")
        edit(copy / "tokenizer_config.json", chat_template=settings)
        return copy

    return folder


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_are_those_that_transformers_finds(name: str, with_templates, read_theirs):
    folder = with_templates(*TEMPLATES[name])
    assert load_tokenizer(folder).chat_template == read_theirs(folder).chat_template


def test_chat_template_json_is_for_folders_without_another(with_templates):
    folder = with_templates({"chat_template.json": '{"chat_template": "J"}'}, ...)
    assert load_tokenizer(folder).chat_template == "J"
    edit(folder / "tokenizer_config.json", chat_template="S")
    assert load_tokenizer(folder).chat_template == "S"


@pytest.mark.parametrize("templates", [["x"], [{"name": "default"}], [{"name": [], "template": "x"}]])
def test_a_list_of_templates_that_is_none_is_refused(templates: list, with_templates):
    with refused("tokenizer_invalid", "template"):
        load_tokenizer(with_templates({}, templates))


@pytest.mark.parametrize("name", ["chat_template.jinja", EXTRA])
def test_a_template_that_is_no_text_is_refused(name: str, with_templates):
    folder = with_templates({}, ...)
    (folder / name).write_bytes(b"\xff\xfe")
    with refused("tokenizer_invalid", Path(name).name, "UTF-8"):
        load_tokenizer(folder)
