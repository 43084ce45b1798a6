"""A checkpoint's tokenizer, read by transformers after its files are checked. No code of the folder is run."""

import codecs
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import JSON_BYTES, read_json

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

TOKENIZER_BYTES = 128 << 20  # of tokenizer.json; the published one has 13 MB
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATE = "chat_template.jinja"
_READ = ("tokenizer.json", *_SETTINGS, _TEMPLATE, "chat_template.json", "vocab.json", "merges.txt")  # by the loader


def load_tokenizer(folder: Path) -> "TokenizerWrapper":
    """mlx-lm's wrapper around the tokenizer of a checkpoint folder. InputError for files that cannot be read."""
    _check_files(folder)
    from mlx_lm.tokenizer_utils import load  # brings transformers, which takes its time

    with _alone(folder) as whole:
        try:
            tokenizer = load(whole, {"trust_remote_code": False})
            tokenizer.name_or_path = str(folder)  # where it is to be found again
            return tokenizer
        except BaseException as error:  # tokenizers raises Exception itself, and a panic of Rust, which is none
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InputError(
                "tokenizer_invalid",
                f"the tokenizer files of {folder} could not be read ({type(error).__name__}: {str(error)[:200]}). "
                "Download them again",
            ) from error


def _check_files(folder: Path) -> None:
    """Read each of the tokenizer's files. InputError names one that is absent, empty, too large or not text."""
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
def _alone(folder: Path) -> Iterator[Path]:
    """A folder of the tokenizer's files alone: links, and copies without their byte order mark of files that have one.

    config.json is not among them, so that the loader reads nothing in it.
    """
    with tempfile.TemporaryDirectory() as place:
        for file in (folder / name for name in _READ if (folder / name).is_file()):
            target = Path(place) / file.name
            if _is_marked(file):
                target.write_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))
            else:
                target.symlink_to(file.resolve())
        (Path(place) / "config.json").write_text('{"model_type": "qwen3_5"}')
        yield Path(place)


def _is_marked(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
