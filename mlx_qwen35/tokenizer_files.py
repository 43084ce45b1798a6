"""A checkpoint's tokenizer, read by transformers once its files are seen to be whole. No code of the folder is run."""

import codecs
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import JSON_BYTES, read_json

TOKENIZER_BYTES = 128 << 20  # of tokenizer.json; the published one has 13 MB
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATE = "chat_template.jinja"


def load_tokenizer(folder: Path):
    """mlx-lm's wrapper around the tokenizer of a checkpoint folder. InputError for files that cannot be read."""
    files = _check_files(folder)
    from mlx_lm.tokenizer_utils import load  # brings transformers, which takes its time

    with _without_marks(folder, files) as whole:
        try:
            return load(whole, {"trust_remote_code": False})
        except BaseException as error:
            if not _is_of_files(error):
                raise
            raise InputError(
                "tokenizer_invalid",
                f"the tokenizer files of {folder} could not be read ({type(error).__name__}: {str(error)[:200]}). "
                "Download them again",
            ) from error


def _is_of_files(error: BaseException) -> bool:
    """Whether the loader could not read what it found. tokenizers raises Exception itself, and what Rust calls a panic
    is not even one."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _check_files(folder: Path) -> list[Path]:
    """The tokenizer's files, each read once. InputError names the one that is absent, empty, too large or not text."""
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            "tokenizer_missing",
            f"a checkpoint folder must hold tokenizer.json; {folder} does not. Download it again, whole",
        )
    files = [folder / name for name in ("tokenizer.json", *_SETTINGS) if (folder / name).is_file()]
    for file in files:
        if not read_json(file, TOKENIZER_BYTES) and file.name not in _SETTINGS[1:]:
            raise InputError("tokenizer_invalid", f"{file} must describe a tokenizer; it is empty. Download it again")
    template = folder / _TEMPLATE
    if template.is_file():
        _check_text(template)
        files.append(template)
    return files


def _check_text(file: Path) -> None:
    with file.open("rb") as stream:
        data = stream.read(JSON_BYTES + 1)
    if len(data) > JSON_BYTES:
        raise InputError("tokenizer_invalid", f"{file} must have at most {JSON_BYTES:,} bytes; it has more")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise InputError("tokenizer_invalid", f"{file} must be UTF-8: {error}. Download it again") from error


@contextmanager
def _without_marks(folder: Path, files: list[Path]) -> Iterator[Path]:
    """The folder, or where one of the files begins with a byte order mark, copies of them without: it is no text."""
    contents = {file.name: file.read_bytes() for file in files if _is_marked(file)}
    if not contents:
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        for file in files:
            content = contents.get(file.name) or file.read_bytes()
            (Path(name) / file.name).write_bytes(content.removeprefix(codecs.BOM_UTF8))
        yield Path(name)


def _is_marked(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
