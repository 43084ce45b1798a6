"""Rows of training data, as inference will see them: tokens, and which of them are targets.

`open_rows` reads a whole file once: it checks every line, counts tokens and targets, and keeps some 50 bytes of each
row. A row is read and rendered again whenever it is asked for, so that a file may be larger than memory.
"""

import hashlib
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.budget.encoding import at_once
from mlx_qwen35.errors import InputError
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Placed
from mlx_qwen35.train.forms import read_form
from mlx_qwen35.train.lines import Given, LineFile, Source
from mlx_qwen35.train.render import Rendered, Renderer
from mlx_qwen35.values import choice, whole

SPLITS = ("train", "valid", "test")  # train.jsonl and so on; train must be there
Progress = Callable[[int, int], None]  # bytes or rows that were read, and all


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


@dataclass
class Report:
    """What a file holds.

    lines: that are not empty. rows: that are trained. tokens, targets: of all rows, after cutting.
    cut, skipped: rows that were cut, and rows left out since no target was left of them.
    answers, thinking: answers and texts that are learnt, and those of them with reasoning.
    images, visual: images and videos in the rows, and their tokens. patches: the most that are encoded at a time.
    longest: tokens of the longest row before it was cut. unread: names of columns that nothing reads.
    """

    lines: int = 0
    rows: int = 0
    tokens: int = 0
    targets: int = 0
    cut: int = 0
    skipped: int = 0
    answers: int = 0
    thinking: int = 0
    images: int = 0
    visual: int = 0
    patches: int = 0
    longest: int = 0
    unread: tuple[str, ...] = ()


class RowFile:
    """The rows of one split, rendered when they are asked for; made by `open_rows` and `rows_of`.

    len() counts rows, [i] renders one. A conversation whose earlier turns lose their reasoning gives several rows.

    report: counts. lengths: (rows,) int32, tokens of each row. targets: (rows,) int32, its targets. fingerprint:
    SHA-256 of all tokens, targets and pixels, in hexadecimal: equal for files that teach the same.
    """

    def __init__(
        self, source: Source, folder: Path, renderer: Renderer, max_length: int, mask_prompt: bool, urls: bool
    ):
        self._source, self._folder, self._renderer = source, folder, renderer
        self._max_length, self._mask_prompt, self._urls = max_length, mask_prompt, urls
        self._places, self._lines = array("q"), array("l")
        self._answers = array("i"), array("i")  # of each row, first and last + 1
        self._lengths, self._targets, self._shows = array("i"), array("i"), array("b")
        self._sums = array("I")
        self.report, self.fingerprint = Report(), ""

    def read(self, progress: Progress) -> "RowFile":
        """Read and check all rows. progress: called after each line."""
        report, unread, digest = self.report, set[str](), hashlib.sha256()
        for place, number, values, done in self._source:
            report.lines += 1
            for rendered, names in self._rendered(number, values):
                unread |= names
                report.longest = max(report.longest, len(rendered.tokens))
                row = self._row(rendered, number)
                if row is None:
                    report.skipped += 1
                else:
                    self._add(place, rendered, row)
                    digest.update(_taught(row))
            progress(done, self._source.total)
        report.unread, self.fingerprint = tuple(sorted(unread)), digest.hexdigest()
        self.lengths, self.targets = (np.array(own, np.int32) for own in (self._lengths, self._targets))
        return self

    def _add(self, place: int, rendered: Rendered, row: Row) -> None:
        report, targets = self.report, sum(row.targets)
        columns = (self._places, self._lines, *self._answers, self._lengths, self._targets, self._shows, self._sums)
        values = (place, row.line, *rendered.answers, len(row.tokens), targets, bool(row.media), _sum(row))
        for column, value in zip(columns, values, strict=True):
            column.append(value)
        report.rows += 1
        report.tokens += len(row.tokens)
        report.targets += targets
        report.cut += row.cut > 0
        learnt = [run for run in rendered.learnt if run.start < len(row.tokens)]
        report.answers += len(learnt)
        report.thinking += sum(run.thinking for run in learnt)
        report.images += len(row.media)
        report.visual += sum(placed.media.tokens for placed in row.media)
        report.patches = max(report.patches, *(at_once(placed.media.grid) for placed in row.media), 0)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        number, answers = self._lines[index], (self._answers[0][index], self._answers[1][index])
        values = self._source.read(self._places[index], number)
        row = next((self._row(rendered, number) for rendered, _ in self._rendered(number, values, answers)), None)
        if row is None or _sum(row) != self._sums[index]:
            raise InputError("data_invalid", f"{self._source.name(number)}: the row has changed since it was checked")
        return row

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def shown(self) -> list[int]:
        """The indices of the rows that show an image or a video."""
        return [i for i, shows in enumerate(self._shows) if shows]

    def _rendered(
        self, number: int, values: Mapping[str, Any], answers: tuple[int, int] | None = None
    ) -> Iterator[tuple[Rendered, set[str]]]:
        """The rows of a line in their whole length, and the names of its columns that nothing reads."""
        try:
            said, unread = read_form(values, self._folder, self._urls)
            for rendered in self._renderer.rows(said, answers):
                yield rendered, unread
        except InputError as error:
            raise InputError("data_invalid", f"{self._source.name(number)}: {error}") from error

    def _row(self, rendered: Rendered, number: int) -> Row | None:
        """A row within the most tokens, up to its last target; None where no target is left.

        It is never cut inside an image or a video: what the cut would go through is left off whole.
        """
        tokens, pads = rendered.tokens, self._renderer.processor.placeholder_ids
        learnt = [(run.start, run.stop) for run in rendered.learnt] if self._mask_prompt else [(1, len(tokens))]
        learnt = [(start, min(end, self._max_length)) for start, end in learnt]
        places = [i for start, end in learnt for i in range(start, end) if tokens[i] not in pads]
        for placed in reversed(rendered.media):  # the placeholders of a video have text between them
            if places and placed.placeholders[0].start < places[-1] < placed.placeholders[-1].stop:
                places = [i for i in places if i < placed.placeholders[0].start]
        if not places:
            return None
        stop = places[-1] + 1
        targets = [False] * stop
        for i in places:
            targets[i] = True
        media = tuple(placed for placed in rendered.media if placed.placeholders[-1].stop <= stop)
        return Row(tokens[:stop], tuple(targets), media, number, len(tokens) - stop)


def _taught(row: Row) -> bytes:
    """Tokens, targets and pixels of a row."""
    shown = "".join(placed.media.digest for placed in row.media)
    return np.array(row.tokens, np.int32).tobytes() + bytes(row.targets) + shown.encode()


def _sum(row: Row) -> int:
    """A checksum, which tells a row that has changed."""
    return zlib.crc32(_taught(row))


def open_rows(
    folder: Path,
    split: str,
    processor: Processor,
    max_length: int,
    *,
    mask_prompt: bool = True,
    vision: VisionOptions = VisionOptions(),  # noqa: B008 (frozen)
    urls: bool = False,
    progress: Progress = lambda done, total: None,
) -> RowFile | None:
    """The rows of a split, read and checked once; None where the folder has no such file.

    Args:
        folder: with train.jsonl, valid.jsonl, test.jsonl. Paths of images and videos begin there.
        max_length: most tokens of a row; what is longer is cut at its end, and counted.
        mask_prompt: whether answers alone are targets; False: all tokens are.
        vision: how images and videos are read.
        urls: whether images and videos may be fetched from the network.

    Raises InputError data_missing, data_invalid (with file and line) for whatever can be wrong, before the first step.
    """
    folder, path = Path(folder), Path(folder) / f"{choice('split', split, SPLITS)}.jsonl"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(
            "data_missing",
            f"training data must be a folder with train.jsonl; {folder} {what}. Save a data set of Hugging Face there "
            "first: its to_json() writes such a file",
        )
    if not path.is_file():
        if split != "train":
            return None
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise InputError("data_missing", f"{folder} must hold train.jsonl, a JSON object a line; it holds {there}")
    return _read(LineFile(path), str(path), folder, processor, max_length, mask_prompt, vision, urls, progress)


def rows_of(
    rows: Sequence[Mapping[str, Any]],
    processor: Processor,
    max_length: int,
    *,
    folder: Path = Path(),
    mask_prompt: bool = True,
    vision: VisionOptions = VisionOptions(),  # noqa: B008 (frozen)
    urls: bool = False,
) -> RowFile:
    """Rows that a program gives, each a mapping like a line of a file; see `open_rows`."""
    source = Given(rows)
    return _read(source, "rows", folder, processor, max_length, mask_prompt, vision, urls, lambda done, total: None)


def _read(
    source: Source, name: str, folder: Path, processor: Processor, max_length: int, mask_prompt: bool,
    vision: VisionOptions, urls: bool, progress: Progress,
) -> RowFile:  # fmt: skip
    limit = whole("max_length", max_length, 2)
    found = RowFile(source, folder, Renderer(processor, vision), limit, mask_prompt, urls).read(progress)
    if not found:
        why = f"none of its {found.report.skipped} has a target within {limit} tokens" if found.report.lines else "none"
        raise InputError("data_missing", f"{name} must have rows to train on, got {why}")
    return found


Batch = Sequence[Row]  # rows that go through the model together
