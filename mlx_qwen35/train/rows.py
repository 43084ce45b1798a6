"""Rows of training data, as inference will see them: tokens, and which of them are targets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Placed

SPLITS = ("train", "valid", "test")  # train.jsonl and so on; train must be there


@dataclass(frozen=True)
class Row:
    """One training row.

    tokens: ids, placeholders of images repeated. targets: for each token whether it is learnt, from those before it;
    the first never is. media: what the placeholders show. line: of the file, from 1. cut: tokens that were left off.
    """

    tokens: tuple[int, ...]
    targets: tuple[bool, ...]
    media: tuple[Placed, ...] = ()
    line: int = 0
    cut: int = 0


class RowFile:
    """The rows of one split, rendered when they are asked for; made by `open_rows`.

    len() counts rows, [i] renders one. A conversation whose earlier turns lose their reasoning gives several rows.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Row:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))


def open_rows(
    folder: Path, split: str, processor: Processor, max_length: int, *, mask_prompt: bool = True
) -> RowFile | None:
    """The rows of a split; None where the folder has no such file.

    Raises InputError data_missing, data_invalid (with file and line) for whatever can be wrong, before the first step.
    """
    raise NotImplementedError


Batch = Sequence[Row]  # rows that go through the model together
