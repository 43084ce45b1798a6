"""The task kl: how far a model's predictions are from those of another form of it, as `convert --eval` measures it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.cache.kv_format import UNQUANTIZED, KVFormat
from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.hub import NANO, resolve
from mlx_qwen35.console.streams import read_file
from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.local import nano_questions
from mlx_qwen35.evaluate.run import chosen
from mlx_qwen35.measure.divergence import Bar, divergence
from mlx_qwen35.measure.layerwise import Layerwise
from mlx_qwen35.measure.text import MOST, WINDOW, windows
from mlx_qwen35.options import spelled
from mlx_qwen35.prompt.processor import Processor

KL = "kl"


@dataclass(frozen=True)
class Sequences:
    """What is read. tokens: ids. first: of each, the index of the first token whose prediction counts."""

    name: str
    tokens: Sequence[Sequence[int]]
    first: Sequence[int] | None = None

    @property
    def version(self) -> str:
        """Changes with the tokens."""
        digest = hashlib.sha256(json.dumps([self.tokens, self.first]).encode()).hexdigest()[:12]
        return f"{len(self.tokens)} sequences of {self.name}, {digest}"

    @property
    def count(self) -> int:
        """Of all tokens."""
        return sum(map(len, self.tokens))


def sequences(checkpoint: Checkpoint, text: str | None, items: int | None) -> Sequences:
    """What kl is measured on: windows of a text file; for nano, where none is given, the answers of bundled items.

    items: windows; None: as many as `convert --eval` reads. Raises InputError option_missing where there is no text.
    """
    if text is not None:
        read = read_file(spelled("text"), Path(text))
        return Sequences(Path(text).name, windows(checkpoint, read, most=MOST if items is None else items * WINDOW))
    if checkpoint.config.text != open_checkpoint(resolve(NANO)).config.text:
        raise InputError(
            "option_missing",
            f"{spelled('text')} must be given for kl: a text file like what the model is used for; only nano has "
            "bundled items",
        )
    return _bundled(checkpoint, items)


def _bundled(checkpoint: Checkpoint, items: int | None) -> Sequences:
    """nano's questions with the completions that it should write, whose tokens count."""
    processor = Processor.from_folder(checkpoint.folder, checkpoint.config, has_vision_encoder=False)
    tokens, first = [], []
    for line in chosen(nano_questions(), items):
        prompt = processor.encode_messages(line["messages"], **line["options"]).tokens
        answer = [f"{line['completion']}<|im_end|>", "\n"]  # each tokenized on its own, as in the training
        tokens.append([*prompt, *(token for part in answer for token in processor.tokenizer.encode(part))])
        first.append(len(prompt))
    return Sequences("nano's bundled items", tokens, first)


def measure(
    checkpoint: Checkpoint,
    against: Checkpoint,
    read: Sequences,
    dtypes: tuple[mx.Dtype, mx.Dtype],
    adapter: Adapter | None = None,
    kv: KVFormat = UNQUANTIZED,
    bar: Bar | None = None,
) -> Mapping[str, Any]:
    """The figures of `divergence` by name: "kl" in nats, "top1" as a share, with their standard errors.

    dtypes: of the arithmetic of the model and of the other. adapter, kv: of the model.
    """
    ours = Layerwise(checkpoint, dtypes[0], adapter=adapter, kv=kv)
    theirs = Layerwise(against, dtypes[1])
    bars: dict[str, Bar] = {} if bar is None else {"bar": bar}
    return asdict(divergence(theirs, ours, read.tokens, read.first, **bars))


def check_tokenizers(read: Sequences, against: Checkpoint, text: str | None, items: int | None) -> None:
    """InputError models_differ where another model reads other tokens of the same text."""
    if read != sequences(against, text, items):
        raise InputError(
            "models_differ",
            f"two forms of one model must have one tokenizer; that of {against.folder} gives other tokens of the same "
            "text",
        )
