"""The task kl: how far a model's predictions are from those of another form of it, as `convert --eval` measures it.

A text is measured a piece at a time, and a line for each of its sequences kept, so that a run goes on behind the last
whole piece. Pieces are the same however often a run was ended.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.hub import NANO, resolve
from mlx_qwen35.console.streams import read_file
from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.items import ItemLog, Line
from mlx_qwen35.evaluate.local import nano_questions
from mlx_qwen35.evaluate.run import chosen
from mlx_qwen35.measure.divergence import Positions, divergences, summary
from mlx_qwen35.measure.layerwise import Layerwise, Progress
from mlx_qwen35.measure.text import MOST, WINDOW, windows
from mlx_qwen35.options import spelled
from mlx_qwen35.prompt.processor import Processor

KL = "kl"
PIECE = 8192  # tokens that are measured together; of a 4B on an M1 about a minute
MEANS = ("source_loss", "loss", "kl")  # of a sequence's line: nats, means over its positions


@dataclass(frozen=True)
class Sequences:
    """What is read. version: changes with the text. keys: of the sequences. tokens: their ids. first: of each, the
    index of the first token whose prediction counts.
    """

    name: str
    version: str
    keys: Sequence[str]
    tokens: Sequence[Sequence[int]]
    first: Sequence[int]

    @property
    def count(self) -> int:
        """Of all tokens."""
        return sum(map(len, self.tokens))

    @property
    def pieces(self) -> list[range]:
        """The places of neighbours that are measured together."""
        found, start, size = [], 0, 0
        for place, tokens in enumerate(self.tokens):
            if size and size + len(tokens) > PIECE:
                found.append(range(start, place))
                start, size = place, 0
            size += len(tokens)
        return [*found, range(start, len(self.tokens))]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def sequences(checkpoint: Checkpoint, text: str | None, items: int | None) -> Sequences:
    """What kl is measured on: windows of a text file; for nano, where none is given, the answers of bundled items.

    items: windows; None: as many as `convert --eval` reads. Raises InputError option_missing where there is no text.
    """
    if text is not None:
        read, name = read_file(spelled("text"), Path(text)), Path(text).name
        tokens = windows(checkpoint, read, most=MOST if items is None else items * WINDOW)
        keys = [str(number) for number in range(1, len(tokens) + 1)]
        return Sequences(name, f"windows of {name}, {_digest(read)}", keys, tokens, [1] * len(tokens))
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
    tokens, first, questions = [], [], nano_questions()
    some = chosen(questions, items)
    for line in some:
        prompt = processor.encode_messages(line["messages"], **line["options"]).tokens
        answer = [f"{line['completion']}<|im_end|>", "\n"]  # each tokenized on its own, as in the training
        tokens.append([*prompt, *(token for part in answer for token in processor.tokenizer.encode(part))])
        first.append(len(prompt))
    name, keys = "nano's bundled items", [str(line["key"]) for line in some]
    return Sequences(name, f"{name}, {_digest(questions)}", keys, tokens, first)


def measure(
    model: Layerwise, against: Layerwise, read: Sequences, log: ItemLog, watch: Callable[[int, int], object]
) -> list[Line]:
    """The lines of all sequences, of which those are measured that the log does not have.

    key; positions: that count; source_loss, loss, kl: see `MEANS`; top1: the share of positions where both models have
    the same most likely token. watch: called with the work done and all of it, in parts without a unit.
    """
    done = 0
    for piece in read.pieces:
        tokens, first = read.tokens[piece.start : piece.stop], read.first[piece.start : piece.stop]
        size = sum(map(len, tokens))
        if left := [place for place in piece if read.keys[place] not in log]:
            since = time.monotonic()
            found, _ = divergences(against, model, tokens, first, _bar(watch, done, size, read.count))
            lines = _lines(found, read.keys[piece.start : piece.stop])
            seconds = (time.monotonic() - since) / len(left)
            for place in left:
                log.append(lines[place - piece.start], seconds)
        done += size
    return log.arrange(read.keys)


def _lines(found: Positions, keys: Sequence[str]) -> list[Line]:
    counts = np.bincount(found.sequences, minlength=len(keys))
    values = {name: getattr(found, name) for name in MEANS} | {"top1": found.same}
    means = {name: np.bincount(found.sequences, value, len(keys)) / counts for name, value in values.items()}
    return [
        {"key": key, "positions": int(counts[place]), **{name: float(own[place]) for name, own in means.items()}}
        for place, key in enumerate(keys)
    ]


def figures(lines: Sequence[Line]) -> dict[str, Any]:
    """Of all sequences: "kl" in nats, "top1" as a share, with standard errors over sequences, and perplexities."""
    counts = [line["positions"] for line in lines]
    means = {name: np.repeat([line[name] for line in lines], counts) for name in (*MEANS, "top1")}
    found = summary(Positions(np.repeat(np.arange(len(lines)), counts), same=means.pop("top1"), **means))
    return {name: value for name, value in asdict(found).items() if name not in ("kl_99", "layers")}  # of positions


def _bar(watch: Callable[[int, int], object], done: int, size: int, count: int) -> Any:
    """Progress of a piece of so many of all tokens, with so many done before it."""

    @contextmanager
    def bar(total: int) -> Iterator[Progress]:
        worked = 0

        def progress(work: int) -> None:
            nonlocal worked
            worked += work
            watch(done * total + size * worked, count * total)

        yield progress

    return bar


def check_tokenizers(read: Sequences, against: Checkpoint, text: str | None, items: int | None) -> None:
    """InputError models_differ where another model reads other tokens of the same text."""
    if read != sequences(against, text, items):
        raise InputError(
            "models_differ",
            f"two forms of one model must have one tokenizer; that of {against.folder} gives other tokens of the same "
            "text",
        )
