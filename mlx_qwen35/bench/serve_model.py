"""The folder that all servers load: the same text weights in one dtype, and a tokenizer for random ones."""

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers.pre_tokenizers import ByteLevel

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.load import stored_dtype

_TEXT = ("tokenizer_config.json", "chat_template.jinja")


@contextmanager
def prepared(folder: Path, dtype: mx.Dtype) -> Iterator[Path]:
    """The folder; where its dtype is another, a temporary copy of it, since mlx-lm's server runs what it finds."""
    if stored_dtype(open_checkpoint(folder)) == dtype:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mlx_qwen35-bench-") as copy:
        yield in_dtype(folder, Path(copy), dtype)


def add_tokenizer(folder: Path) -> None:
    """nano's tokenizer and template for random weights: made-up words fill the ids up to the control tokens.

    A text of such words is encoded as the tokens that it was made of.
    """
    nano = resolve("nano")
    made: dict[str, Any] = json.loads((nano / "tokenizer.json").read_text())
    first = json.loads((folder / "config.json").read_text())["text_config"]["eos_token_id"]
    words, merges = made["model"]["vocab"], made["model"]["merges"]
    for pair in itertools.islice(_merges(), first - len(words)):
        words["".join(pair)] = len(words)
        merges.append(pair)
    for number, token in enumerate(made["added_tokens"], start=first):
        token["id"] = number
    (folder / "tokenizer.json").write_text(json.dumps(made))
    for name in _TEXT:
        shutil.copyfile(nano / name, folder / name)


def _merges() -> Iterator[tuple[str, ...]]:
    """Merges of byte-level BPE: two bytes become a letter that nano lacks, letters behind a blank become words."""
    as_bytes = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    letters = [as_bytes(chr(code))[0][0] for code in range(0x100, 0x180)]
    yield from map(tuple, letters)
    words = ["Ġ"]
    while True:
        yield from itertools.product(words, letters)
        words = ["".join(pair) for pair in itertools.product(words, letters)]


def in_dtype(folder: Path, target: Path, dtype: mx.Dtype) -> Path:
    """A copy of a folder with its floating-point weights in a dtype; float32 ones stay if the dtype is a 16-bit one."""
    halves = (mx.float16, mx.bfloat16)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)
            continue
        weights = mx.load(str(file))
        assert isinstance(weights, dict)
        for name, weight in weights.items():
            if weight.dtype in halves:
                weights[name] = weight.astype(dtype)
        mx.save_safetensors(str(target / file.name), weights, metadata={"format": "pt"})
    return target
