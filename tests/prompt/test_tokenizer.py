"""Ids and texts of 5,000 strings in 44 scripts, whole and streamed: those of transformers.

On nano's tokenizer, on one of 6,000 entries that is trained here, and on the published one where --real-model gives it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from many_scripts import SCRIPTS, STRINGS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.prompt.stream import TextStream
from mlx_qwen35.prompt.tokenizer import load_tokenizer

NANO = resolve("nano")


def train(folder: Path) -> None:
    """Files of nano's with a tokenizer of 6,000 entries, trained on the strings."""
    small = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = small.normalizer, small.pre_tokenizer
    tokenizer.decoder = small.decoder
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=6000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(STRINGS, trainer)
    tokenizer.add_tokens([token for _, token in sorted(small.get_added_tokens_decoder().items())])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(NANO / name, folder)


@pytest.fixture(scope="module", params=["nano", "trained", "published"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "trained":
        folder = tmp_path_factory.mktemp("trained")
        train(folder)
        return folder
    return NANO if request.param == "nano" else request.getfixturevalue("real_model")


@pytest.fixture(scope="module")
def theirs(folder: Path, read_theirs: Callable[[Path], Any]) -> Any:
    return read_theirs(folder)


def unlike(found: list, expected: list) -> list:
    """The first strings, with what was found and expected of them, where the two differ."""
    assert len(found) == len(expected) == len(STRINGS)
    return [case for case in zip(STRINGS, found, expected, strict=True) if case[1] != case[2]][:3]


def test_there_are_5000_strings_of_40_scripts():
    assert len(SCRIPTS) >= 40 and len(set(STRINGS)) >= 5000


def test_ids_and_decoded_texts_are_those_of_transformers(folder: Path, theirs: Any):
    tokenizer = load_tokenizer(folder)
    tokens = [tokenizer.encode(text) for text in STRINGS]
    assert unlike(tokens, theirs(STRINGS).input_ids) == []
    assert unlike(list(map(tokenizer.decode, tokens)), theirs.batch_decode(tokens)) == []
    assert tokenizer.get_vocab() == theirs.get_vocab()


def test_the_streamed_pieces_add_up_to_the_decoded_text(folder: Path, theirs: Any):
    tokenizer = load_tokenizer(folder)
    tokens = [tokenizer.encode(text) for text in STRINGS]

    def streamed(ids: list[int]) -> str:
        stream = TextStream(tokenizer.text_bytes, (None, None), False)
        return "".join(str(piece) for token in ids for piece in stream.add(token))

    assert unlike(list(map(streamed, tokens)), theirs.batch_decode(tokens, skip_special_tokens=True)) == []
