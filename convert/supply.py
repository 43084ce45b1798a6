"""Where the files of weights come from: a folder that has them, or a repository from which they come one by one.

From a repository a file is downloaded before the first chunk that needs it and removed after the last one: the disk
holds the result and one file. What was downloaded of a file stays where a conversion is broken off.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from mlx_qwen35.checkpoint.hub import failures, hub_error
from mlx_qwen35.checkpoint.hub_headers import Published, RemoteFile, called, complete, write_headers
from mlx_qwen35.convert.plan import ConversionPlan, Job
from mlx_qwen35.convert.progress import Bar, Course, Told, bytes_bar
from mlx_qwen35.convert.rows import Chunk, Files
from mlx_qwen35.errors import InputError

WAITS = (0, 1, 2, 4, 8, 16)  # seconds before a download that broke off goes on; none left, and it fails
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Stretch:
    """Chunks that are converted together, by number; the files they need; those of them that no later chunk needs."""

    chunks: Mapping[int, Chunk]
    files: frozenset[Path]
    last: frozenset[Path] = frozenset()


def files_of(job: Job) -> frozenset[Path]:
    return frozenset(part.file for part in job.source.parts)


class Supply:
    """The files of a folder, which has them all and keeps them.

    commit: of the repository, where they come from one. stays: whether they can be read a second time.
    """

    stays = True

    def __init__(self, commit: str = ""):
        self.commit = commit

    def most_bytes(self, plan: ConversionPlan) -> int:
        """The most that the files take at a time beside the result."""
        return 0

    def stretches(self, chunks: Sequence[Chunk], done: Collection[int]) -> list[Stretch]:
        """The chunks that are not done, in the order in which they are converted."""
        left = {number: chunk for number, chunk in enumerate(chunks) if number not in done}
        return [self.stretch(left)]

    def stretch(self, chunks: Mapping[int, Chunk]) -> Stretch:
        return Stretch(chunks, frozenset().union(*(files_of(chunk.job) for chunk in chunks.values())))

    @contextmanager
    def held(self, stretch: Stretch) -> Iterator[Files]:
        """Descriptors of the files of a stretch, which are there in the block."""
        with _opened({path: path for path in stretch.files}) as files:
            yield files

    def bar(self, what: str, nbytes: int) -> AbstractContextManager[Bar]:
        return bytes_bar(what, nbytes)


@contextmanager
def _opened(paths: Mapping[Path, Path]) -> Iterator[dict[Path, int]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(path.open("rb")).fileno() for name, path in paths.items()}


class Downloads(Supply):
    """The files of a repository, each there only while it is needed.

    place: a hidden folder that this process owns. tell: called with the bytes that are done, all bytes, and the seconds
    that are left, None where that is not known yet.
    """

    stays = False

    def __init__(self, source: Published, place: Path, tell: Told):
        super().__init__(source.commit)
        self._source, self._place, self._tell = source, place, tell
        self.folder, self._weights = place / source.commit, place / "weights"
        self._remote = {self.folder / file.path: file for file in source.files}

    def prepare(self, judge: Callable[[Path], object]) -> Path:
        """The repository's folder with the headers alone of its files of weights.

        judge: called with it before all else is downloaded; it raises InputError to prevent that.
        """
        if self.folder.is_dir():
            with called(self.folder, self._source.name):
                judge(self.folder)
            return self.folder
        for left in (path for path in self._place.iterdir() if path.is_dir()):  # of another commit, or cut off
            shutil.rmtree(left)
        made = self._place / "headers"
        made.mkdir()
        try:
            with self._asking(), called(made, self._source.name):
                write_headers(made, self._source.files)
                judge(made)
                complete(made, self._source.files)
            made.rename(self.folder)
        except BaseException:
            shutil.rmtree(made)
            raise
        return self.folder

    def most_bytes(self, plan: ConversionPlan) -> int:
        return most_bytes(map(self._needs, plan.jobs))

    def _needs(self, job: Job) -> frozenset[Path]:
        """The files of the repository that a job needs; an adapter's are elsewhere."""
        return frozenset(path for path in files_of(job) if path.is_relative_to(self._place))

    def stretches(self, chunks: Sequence[Chunk], done: Collection[int]) -> list[Stretch]:
        """The chunks of each file together: files in the order in which the first chunks need them."""
        left = [number for number in range(len(chunks)) if number not in done]
        turns = in_turn([self._needs(chunks[number].job) for number in left])
        stretches = [(self.stretch({left[i]: chunks[left[i]] for i in which}), last) for which, _, last in turns]
        needed = frozenset().union(*(files for _, files, _ in turns))
        every = frozenset().union(*(self._needs(chunk.job) for chunk in chunks))
        for path in every - needed:
            self._local(path).unlink(missing_ok=True)
        self._course = Course(
            sum(self._remote[path].nbytes for path in every), sum(chunk.nbytes for chunk in chunks), self._tell
        )
        self._course.there(
            sum(self._remote[path].nbytes if path not in needed else self._have(path) for path in every),
            sum(chunks[number].nbytes for number in done),
        )
        return [replace(stretch, last=last) for stretch, last in stretches]

    @contextmanager
    def held(self, stretch: Stretch) -> Iterator[Files]:
        self._course.begin()
        for path in sorted(stretch.files):
            if not self._local(path).is_file():
                self._download(self._remote[path], self._local(path))
        self._course.begin()
        with _opened({path: self._local(path) for path in stretch.files}) as files:
            yield files
        for path in stretch.last:
            self._local(path).unlink()

    def bar(self, what: str, nbytes: int) -> AbstractContextManager[Bar]:
        return nullcontext(self._course if what == "writing" else Bar())

    def _local(self, path: Path) -> Path:
        return self._weights / path.relative_to(self.folder) if path in self._remote else path

    def _have(self, path: Path) -> int:
        """How many bytes of a file are there."""
        whole = self._local(path)
        found = next((file for file in (whole, _part(whole)) if file.is_file()), None)
        return found.stat().st_size if found else 0

    def _download(self, file: RemoteFile, target: Path) -> None:
        """Download what is not there of a file. It takes its name once its length and its checksum are right."""
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _part(target)
        with part.open("a+b") as stream:
            found = _hashed(stream)
            for piece in self._pieces(file, stream.tell()):
                stream.write(piece)
                found.update(piece)
                self._course.downloaded(len(piece))
        if file.sha256 not in (None, found.hexdigest()):
            part.unlink()
            raise InputError(
                "hub_failed",
                f"{file.path} of {self._source.name} came with the SHA-256 {found.hexdigest()}, and the hub says "
                f"{file.sha256}: it was removed. Give the same command again, and it is downloaded anew",
            )
        part.rename(target)

    def _pieces(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The bytes of a file from `start` on, over as many connections as that takes."""
        tries = iter(WAITS)
        while start < file.nbytes:
            try:
                with self._asking(), closing(file.pieces(start, file.nbytes)) as pieces:
                    for piece in pieces:
                        yield piece
                        start += len(piece)
                        tries = iter(WAITS)
            except InputError as error:
                wait = next(tries, None)
                if wait is None or not _may_pass(error.__cause__):
                    raise
                time.sleep(wait)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """InputError where the hub fails. The disk's errors, which have numbers, are not the hub's."""
        try:
            yield
        except failures() as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise hub_error(self._source.name, None, error) from error


def most_bytes(needs: Iterable[frozenset[Path]]) -> int:
    """The most that files take at a time where they come one by one. needs: the files of each job."""
    held: set[Path] = set()
    most = 0
    for _, files, last in in_turn([*needs]):
        held |= files
        most = max(most, sum(file.stat().st_size for file in held))
        held -= last
    return most


def in_turn(needs: Sequence[frozenset[Path]]) -> list[tuple[list[int], frozenset[Path], frozenset[Path]]]:
    """Jobs by the files that they need: their positions, these files, and those of them that no later job needs."""
    place: dict[Path, int] = {}
    groups: dict[frozenset[Path], list[int]] = {}
    for i, files in enumerate(needs):
        for path in sorted(files):
            place.setdefault(path, len(place))
        groups.setdefault(files, []).append(i)
    order = sorted(groups, key=lambda files: sorted((place[path] for path in files), reverse=True))
    later = [frozenset().union(*order[i + 1 :]) for i in range(len(order))]
    return [(groups[files], files, files - after) for files, after in zip(order, later, strict=True)]


def _may_pass(error: BaseException | None) -> bool:
    """Whether a failure may be over soon: a connection that broke, a server that is overloaded or down."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status == 429 or status >= 500


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _hashed(stream: BinaryIO) -> "hashlib._Hash":
    """The SHA-256 so far of what a file holds; the file is read to its end."""
    found = hashlib.sha256()
    stream.seek(0)
    while block := stream.read(_BLOCK):
        found.update(block)
    return found
