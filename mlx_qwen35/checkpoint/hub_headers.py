"""A folder of headers: a repository on the hub as far as it can be checked before gigabytes are downloaded.

A file of weights has its header and its length; the rest is a hole that takes no room on the disk. Code that reads no
weights works as with the snapshot. The folder is temporary, and never in the hub's cache.
"""

import fnmatch
import hashlib
import struct
import warnings
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from mlx_qwen35.checkpoint import draft_head
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.tensors import HEADER_BYTES
from mlx_qwen35.errors import InputError

SMALL = 1 << 20  # bytes of a JSON file that is fetched whole: config.json, an index; no tokenizer's vocabulary
_MOST_PADDING = 1 << 27
_AT_A_TIME = 8  # requests, as huggingface_hub has it
_TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its path there, its address, its bytes, and their SHA-256 where the hub tells it."""

    path: str
    url: str
    nbytes: int
    sha256: str | None = None

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start <= i < stop. Raises like `pieces`."""
        return b"".join(self.pieces(start, stop))

    def pieces(self, start: int, stop: int) -> Generator[bytes]:
        """Bytes start <= i < stop as they come. OSError where the server does not send them, or not all of them."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        position = start
        with get_session().stream("GET", self.url, headers=headers, timeout=_TIMEOUT) as response:
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            if start and response.status_code != 206:
                raise OSError(f"the server sends no parts of files, asked for a part of {self.path}")
            for piece in response.iter_bytes():
                yield piece[: stop - position]
                position += len(piece)
                if position >= stop:  # a server that sends everything is left here
                    break
        if position < stop:
            raise OSError(f"{self.path} ended after {position} of {self.nbytes} bytes")


@dataclass(frozen=True)
class Published:
    """What the hub lists of a repository at a commit: the files that belong to a checkpoint."""

    name: str
    commit: str
    files: list[RemoteFile]


def list_files(repository: str, revision: str | None, patterns: tuple[str, ...]) -> tuple[str, list[RemoteFile]]:
    """The commit of a revision, and its files whose paths match one of the patterns.

    Raises exceptions of huggingface_hub.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    files = []
    for item in info.siblings or ():
        path = PurePosixPath(item.rfilename)
        inside = not (path.is_absolute() or ".." in path.parts or "\0" in item.rfilename)
        if inside and any(fnmatch.fnmatch(str(path), pattern) for pattern in patterns):
            url = hf_hub_url(repository, str(path), revision=info.sha)
            nbytes = get_hf_file_metadata(url).size if item.size is None else item.size
            if nbytes is None:
                raise OSError(f"the server does not tell the size of {path}")
            files.append(RemoteFile(str(path), url, nbytes, item.lfs.sha256 if item.lfs else None))
    return info.sha or "", files


def in_cache(repository: str, commit: str, files: list[RemoteFile]) -> bool:
    """Whether all of the files are in huggingface_hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, file.path, revision=commit) for file in files)
    return all(isinstance(path, str) and Path(path).is_file() for path in found)


@contextmanager
def folder_of_headers(repository: str, files: list[RemoteFile]) -> Iterator[Path]:
    """A folder with the headers of the files, until the block ends. Messages call it by the repository's name.

    Raises InputError where a header is damaged, and exceptions of the HTTP library.
    """
    with TemporaryDirectory(prefix="mlx_qwen35-headers-") as place:
        folder = Path(place).resolve()
        with called(folder, repository):
            write_headers(folder, files)
            yield folder


@contextmanager
def called(folder: Path, repository: str) -> Iterator[None]:
    """Errors and warnings of the block call a folder by the repository's name."""
    with warnings.catch_warnings(record=True) as told:
        try:
            yield
        except InputError as error:
            raise InputError(error.code, *(part.replace(str(folder), repository) for part in error.args[1:])) from error
    for warning in told:
        warnings.warn(str(warning.message).replace(str(folder), repository), warning.category, stacklevel=5)


def write_headers(folder: Path, files: list[RemoteFile]) -> None:
    """Write the headers of the files into a folder. Raises like `folder_of_headers`."""
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        list(pool.map(lambda file: _write(file, folder / file.path), files))
    _write_norms(folder, files)


def complete(folder: Path, files: list[RemoteFile]) -> None:
    """Write into a folder of headers what is no file of weights and was left out. Raises like `folder_of_headers`."""
    for file in files:
        path = folder / file.path
        if path.suffix != ".safetensors" and not (path.suffix == ".json" and file.nbytes <= SMALL):
            data = file.read(0, file.nbytes) if file.nbytes else b""
            if file.sha256 not in (None, hashlib.sha256(data).hexdigest()):
                raise OSError(f"{file.path} has another SHA-256 than the hub says")
            path.write_bytes(data)


def _write(file: RemoteFile, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    json = target.suffix == ".json"
    if json and file.nbytes <= SMALL:
        target.write_bytes(file.read(0, file.nbytes) if file.nbytes else b"")
    elif json and file.nbytes <= _MOST_PADDING:  # its length counts in what a conversion writes; it is read as empty
        target.write_bytes(b"{}".ljust(file.nbytes))
    elif target.suffix == ".safetensors":
        _write_header(file, target)
    else:
        _hole(target, b"", file.nbytes)


def _write_header(file: RemoteFile, target: Path) -> None:
    length = struct.unpack("<Q", file.read(0, 8))[0] if file.nbytes >= 8 else 0
    if not 0 < length <= min(file.nbytes - 8, HEADER_BYTES):
        _hole(target, struct.pack("<Q", length), file.nbytes)  # as damaged as it is there
        return
    _hole(target, file.read(0, 8 + length), file.nbytes)


def _write_norms(folder: Path, files: list[RemoteFile]) -> None:
    """Fetch the norms by which the form of the MTP head's norms is recognized."""
    checkpoint = open_checkpoint(folder, fp8=True, rope_scaling="none")  # any scaling does for the norms
    if checkpoint.raw:
        return
    remote = {folder / file.path: file for file in files}
    for entry in (entry for name, entry in checkpoint.entries.items() if draft_head.tells(name)):
        with entry.file.open("r+b") as stream:
            stream.seek(entry.start)
            stream.write(remote[entry.file].read(entry.start, entry.start + entry.nbytes))


def _hole(target: Path, begin: bytes, nbytes: int) -> None:
    with target.open("wb") as stream:
        stream.write(begin[:nbytes])
        stream.truncate(nbytes)
