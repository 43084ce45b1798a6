"""Rows of a set of image questions that the user has on disk: Parquet as on Hugging Face, JSON lines, or JSON.

A folder is read as it was downloaded. Nothing is fetched.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.hub import failures
from mlx_qwen35.console.streams import read_file
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import spelled
from mlx_qwen35.values import shown

BATCH = 32  # rows of a Parquet file that are read at a time; pictures stand in them


@dataclass(frozen=True)
class Picture:
    """An image of a question. Its bytes are read when the question is asked.

    file: the image itself; or a Parquet file, whose `row` has it in `column`. digest: of the bytes.
    """

    file: Path
    digest: str
    row: int = 0
    column: str = ""

    def source(self) -> str | bytes:
        """A path, or the bytes of an image file."""
        return _bytes(self.file, self.column, self.row) if self.column else str(self.file)


@dataclass(frozen=True)
class Row:
    """A question as its set has it. where: file and number, for messages. values: column -> value."""

    where: str
    folder: Path
    values: Mapping[str, Any]

    def text(self, column: str) -> str:
        """InputError task_invalid where the column has none."""
        value = self.values.get(column)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"it must have text in the column {column}, got {shown(value)}")
        return value

    def texts(self, column: str) -> list[str]:
        """Of a column that may be absent or empty."""
        value = self.values.get(column) or []
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.wrong(f"the column {column} must have a list of texts, got {shown(value)}")
        return value

    def pictures(self, columns: Sequence[str], least: int = 1) -> list[Picture]:
        """Those of the columns that have one, the first `least` of which must. InputError media_not_found."""
        found = [self._picture(column) for column in columns]
        for column, picture in zip(columns[:least], found, strict=False):
            if picture is None:
                raise InputError("media_not_found", f"{self.where}: {column} must have an image; it is empty")
        return [picture for picture in found if picture]

    def _picture(self, column: str) -> Picture | None:
        value = self.values.get(column)
        if value is None or isinstance(value, Picture):
            return value
        path = value.get("path") if isinstance(value, dict) else value  # as Hugging Face has them without bytes
        if not isinstance(path, str) or not path:
            raise self.wrong(f"the column {column} must have the path of an image, got {shown(value)}")
        return self.file(path)

    def file(self, path: str) -> Picture:
        """An image of the folder. InputError media_not_found."""
        file = self.folder / path
        if not file.is_file():
            raise InputError("media_not_found", f"{self.where}: each image must be a file; there is no {file}")
        return Picture(file, _digest(file.read_bytes()))

    def wrong(self, why: str) -> InputError:
        return _invalid(self.where, why)


def find_folder(name: str, given: str | None, repository: str) -> Path:
    """The folder of a set: the given one, else where huggingface_hub keeps what was downloaded of the repository.

    Raises InputError task_unknown, which says how to get the set; nothing is downloaded.
    """
    get = f"hf download {repository} --repo-type dataset --local-dir FOLDER, then {spelled('tasks', f'{name}=FOLDER')}"
    if given is not None:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise InputError("task_unknown", f"{name}= must name a folder with the set; {given} is none. Get it: {get}")
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type="dataset", local_files_only=True))
    except failures() as error:
        raise InputError(
            "task_unknown", f"the set of {name} is not on this machine, and is not fetched: its licence is yours to "
            f"read. Get it: {get}",
        ) from error  # fmt: skip


def read_rows(folder: Path, split: str) -> list[Row]:
    """All rows of a split, in the order of their files' names.

    They stand in SPLIT*.parquet anywhere in the folder, else in SPLIT*.jsonl in the folder itself, an object a line,
    else in SPLIT*.json, a list of objects. Paths of images begin at the folder.

    Raises InputError: task_invalid where there are none, or a file is damaged; package_missing for Parquet.
    """
    kinds = {f"**/{split}*.parquet": _parquet, f"{split}*.jsonl": _lines, f"{split}*.json": _list}
    for pattern, read in kinds.items():
        if files := sorted(path for path in folder.glob(pattern) if path.is_file()):
            rows = [
                Row(f"{file}, row {number}", folder, values)
                for file in files
                for number, values in enumerate(read(file), start=1)
            ]
            if rows:
                return rows
            raise _invalid(files[0], "it must hold questions, and is empty")
    raise _invalid(folder, f"it must hold questions in {', '.join(kinds)}, as the set is published; there are none")


def _parquet(file: Path) -> Iterator[Mapping[str, Any]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            "package_missing",
            f"{file} is Parquet, which needs pyarrow: pip install 'mlx-qwen35[eval]' brings it. Without it the set can "
            "be JSON lines beside a folder of images",
        )
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        for batch in ParquetFile(file).iter_batches(BATCH):
            for values in batch.to_pylist():
                yield {name: _embedded(value, file, number, name) for name, value in values.items()}
                number += 1
    except (ArrowException, OSError) as error:
        raise _invalid(file, f"it must be a whole Parquet file: {error}. Fetch it again") from error


def _embedded(value: Any, file: Path, row: int, column: str) -> Any:
    """The picture of a column that has its bytes; another value as it is."""
    content = value.get("bytes") if isinstance(value, dict) else None
    return Picture(file, _digest(content), row, column) if content else value


@lru_cache(1)
def _group(file: Path, group: int) -> dict[str, Any]:
    """The columns of a group of rows that were read; one group is in memory at a time."""
    return {}


def _bytes(file: Path, column: str, row: int) -> bytes:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file)
    sizes, group = table.metadata, 0
    while row >= sizes.row_group(group).num_rows:
        row -= sizes.row_group(group).num_rows
        group += 1
    columns = _group(file, group)
    if column not in columns:
        columns[column] = table.read_row_group(group, [column])[column]
    return bytes(columns[column][row].as_py()["bytes"])


def _lines(file: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(read_file("a set", file).split("\n"), start=1):
        if line.strip():
            yield _object(f"{file}, line {number}", _json(f"{file}, line {number}", line))


def _list(file: Path) -> Iterator[Mapping[str, Any]]:
    found = _json(file, read_file("a set", file))
    if not isinstance(found, list):
        raise _invalid(file, f"it must be a list of objects, got {shown(found)}")
    for number, value in enumerate(found, start=1):
        yield _object(f"{file}, object {number}", value)


def _json(where: object, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _invalid(where, f"it must be JSON: {error}") from error


def _object(where: object, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _invalid(where, f"it must be a JSON object, got {shown(value)}")
    return value


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _invalid(where: object, why: str) -> InputError:
    return InputError("task_invalid", f"{where}: {why}")
