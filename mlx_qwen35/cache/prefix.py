"""A library of prefixes: what was read once is not read again.

A DeltaNet state cannot be trimmed, so a prompt can go on only where a snapshot was taken. The library holds snapshots
of the beginnings of prompts, where prompts part: behind system and tools, behind a query, before the newest answer.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_qwen35.cache.cache import Cache, Snapshot
from mlx_qwen35.cache.prefix_counts import Counts
from mlx_qwen35.cache.prefix_tokens import Prefix
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.process import LOCK

SYSTEM, QUERY, TURN, READING = "system", "query", "turn", "reading"
RANKS = {READING: 0, TURN: 0, QUERY: 1, SYSTEM: 2}  # what is let go first, the oldest of a rank before the others
STEP = 4096  # tokens of a long prompt between two readings


def library_bytes(limit: int) -> int:
    """Bytes of a library beside a model that may take `limit` in all."""
    return int(limit * (0.1 if limit <= 6e9 else 0.25))


class Adapters(Protocol):
    """What tells a model's adapters apart where their names do not last."""

    def fingerprint(self, name: str) -> str: ...


class Model(Protocol):
    """What a library needs of the model that it is of."""

    @property
    def adapters(self) -> Adapters: ...
    def make_cache(self, batch: int = 1, adapter: str | None = None) -> Cache: ...


class Behind(Protocol):
    """What keeps the entries of a library beyond its memory, see `PrefixFiles`."""

    def take(self, entry: "Entry") -> None: ...
    def touch(self, entry: "Entry") -> None: ...
    def drop(self, entry: "Entry") -> None: ...
    def recall(self, prefix: Prefix) -> None: ...


@dataclass(eq=False, repr=False)
class Entry:
    """A snapshot behind a prefix. kind: system, query, turn or reading. used: the library's clock at its last use."""

    prefix: Prefix
    kind: str
    snapshot: Snapshot
    used: int = 0


class PrefixLibrary:
    """Snapshots of the beginnings of prompts of one model. Made by `model.make_library()`.

    Prefixes are compared token by token, images by the digests of their pixels, and adapters by their names. Any thread
    may call any method.

    A snapshot that is in use is never let go: the newest of each kind that a running prompt began with or stored.
    The others take at most `memory` bytes.
    """

    def __init__(self, model: Model, memory: int):
        self.model, self.memory = model, memory
        self.counts = Counts()
        self.behind: Behind | None = None
        self._entries: list[Entry] = []
        self._uses: weakref.WeakSet[Use] = weakref.WeakSet()
        self._clock = 0

    def begin(self, prefix: Prefix) -> tuple[Cache, "Use"]:
        """Begin a prompt, with a cache that holds the most of it that is stored, and leaves a token to read."""
        with LOCK:
            entry = self._longest(prefix)
            use = self.keep(prefix, len(entry.prefix) if entry else 0)
            if entry and self.behind:
                self.behind.touch(entry)
            if entry and entry.kind == QUERY:
                self.drop_loops(entry, prefix)
            cache = entry.snapshot.cache() if entry else self.model.make_cache(adapter=prefix.adapter)
            cache.reserve(len(prefix) - use.reused)
            if entry:
                entry.snapshot = cache.snapshot()  # in new memory too, where the columns had to be copied
            self.counts.reused += use.reused
            self.trim()
            return cache, use

    def keep(self, prefix: Prefix, reused: int = 0) -> "Use":
        """Keep what is stored of a prompt, `reused` tokens of which need not be read."""
        with LOCK:
            path = self._path(prefix)
            use = Use(self, prefix, reused, path)
            self._uses.add(use)
            for known in path.values():
                self._touch(known)
            return use

    def store(self, prefix: Prefix, snapshot: Snapshot, kind: str, compact: bool = True) -> Entry | None:
        """Store a snapshot behind a prefix. None where it is not stored: `counts.skipped` tells why.

        compact: whether it gives up the columns behind those in use.

        Raises InputError for a snapshot of a cache of another form or adapter, and of another number of tokens.
        """
        with LOCK:
            self.model.make_cache(adapter=prefix.adapter).restore(snapshot)  # refuses another form
            if snapshot.row_lengths != [len(prefix)]:
                raise InputError(
                    "snapshot_foreign",
                    f"a snapshot must be of the prefix that it is stored behind, of {len(prefix)} tokens; it has "
                    f"{snapshot.row_lengths[0]}",
                )
            if not prefix.whole(len(prefix)):
                self.counts.skipped["inside an image"] += 1
                return None
            if compact:
                snapshot.compact()
            entry = next((entry for entry in self._entries if entry.prefix.same(prefix)), None)
            if entry:  # the same object, which others may have in use
                entry.kind, entry.snapshot = max(kind, entry.kind, key=RANKS.__getitem__), snapshot
            else:
                entry = Entry(prefix, kind, snapshot)
                self._entries.append(entry)
                self.counts.stored += 1
            self._touch(entry)
            if self.behind:
                self.behind.take(entry)
            return entry

    def recall(self, prefix: Prefix) -> None:
        """Have in memory what is kept of a prompt elsewhere. It may wait for a disk."""
        if self.behind:
            self.behind.recall(prefix)

    def reusable(self, prefix: Prefix) -> int:
        """How many tokens of a prompt need not be read."""
        entry = self._longest(prefix)
        return len(entry.prefix) if entry else 0

    def entries(self, prefix: Prefix | None = None) -> list[Entry]:
        """What is stored, the shortest first; of a prefix: what begins it. It waits for no step of a model."""
        found = [entry for entry in tuple(self._entries) if prefix is None or entry.prefix.begins(prefix)]
        return sorted(found, key=lambda entry: len(entry.prefix))

    def clear(self) -> None:
        """Let go of all that is not in use."""
        self.trim(0)

    @property
    def nbytes(self) -> int:
        """Bytes of what is not in use. Memory that several snapshots share counts once."""
        with LOCK:
            used = {id(array) for entry in self._in_use() for array in entry.snapshot.held()}
            own = {id(a): a.nbytes for entry in self._entries for a in entry.snapshot.held() if id(a) not in used}
            return sum(own.values())

    def apart(self, others: Iterable[mx.array]) -> int:
        """Bytes of what is in use, without those of these arrays."""
        with LOCK:
            used = {id(a): a.nbytes for entry in self._in_use() for a in entry.snapshot.held()}
            for array in others:
                used.pop(id(array), None)
            return sum(used.values())

    # --- room ---

    def ready(self, prefixes: Iterable[Prefix]) -> list[int]:
        """The tokens of each prompt that are in memory already, where it can go on without a copy of them.

        Of the prompts that begin with one snapshot the first can: it takes the columns behind.
        """
        with LOCK:
            found, taken = [], set()
            for entry in map(self._longest, prefixes):
                goes_on = entry and entry not in taken and entry.snapshot.ends_its_arrays
                found.append(len(entry.prefix) if entry and goes_on else 0)
                taken.add(entry)
            return found

    def make_room(self, prefixes: Iterable[Prefix]) -> None:
        """Let go of all that is not in use, except what each of these prompts will keep when it begins."""
        with LOCK:
            kept = {entry for prefix in prefixes for entry in self._path(prefix).values()}
            for entry in self._idle():
                if entry not in kept:
                    self._drop(entry)
            self._compact()

    def trim(self, most: int | None = None) -> None:
        """Let go of what is not in use until that takes at most so many bytes, `memory` by default."""
        most = self.memory if most is None else most
        with LOCK:
            self._compact()
            idle = self._idle()
            while idle and (over := self.nbytes - most) > 0:
                while idle and over > 0:  # no more than it takes: a snapshot frees at most its bytes
                    over -= idle[0].snapshot.nbytes
                    self._drop(idle.pop(0))
                self._compact()

    def _path(self, prefix: Prefix) -> dict[str, Entry]:
        """By kind, the longest beginning of a prompt that is stored."""
        return {entry.kind: entry for entry in self.entries(prefix)}

    def _longest(self, prefix: Prefix) -> Entry | None:
        found = [entry for entry in self.entries(prefix) if len(entry.prefix) < len(prefix)]
        return found[-1] if found else None

    def _touch(self, entry: Entry) -> None:
        self._clock += 1
        entry.used = self._clock

    def _in_use(self) -> list[Entry]:
        held = {id(entry) for use in self._uses for entry in use.kept.values()}
        return [entry for entry in self._entries if id(entry) in held]

    def _idle(self) -> list[Entry]:
        """What is not in use, in the order in which it is let go."""
        held = set(map(id, self._in_use()))
        idle = [entry for entry in self._entries if id(entry) not in held]
        return sorted(idle, key=lambda entry: (RANKS[entry.kind], entry.used))

    def _drop(self, entry: Entry) -> None:
        self._entries.remove(entry)
        self.counts.evicted += 1

    def _let_go(self, entry: Entry) -> None:
        """Of an entry that no prompt is expected to go on from."""
        self._drop(entry)
        if self.behind:
            self.behind.drop(entry)

    def _compact(self) -> None:
        for entry in self._entries:
            entry.snapshot.trim()

    def drop_loops(self, query: Entry, prefix: Prefix) -> None:
        """Let go of the newest places of tool loops behind a query that a prompt does not go on with."""
        for entry in self._idle():
            behind = entry.kind == TURN and query.prefix.begins(entry.prefix)
            if behind and not entry.prefix.begins(prefix):
                self._let_go(entry)

    def replace(self, entry: Entry, before: Entry | None) -> None:
        """A place of a prompt is stored: let go of the turn before it, and thin the readings."""
        idle = self._idle()
        if before and before in idle and before.kind == entry.kind == TURN:
            self._let_go(before)
        for reading in idle if entry.kind == READING else ():
            if reading.kind == READING and reading.prefix.begins(entry.prefix) and not _stays(reading, entry):
                self._let_go(reading)


def _stays(reading: Entry, newest: Entry) -> bool:
    """Whether a reading stays beside the newest of its prompt: one at each double distance, in steps of STEP."""
    at, left = divmod(len(reading.prefix), STEP)
    distance = len(newest.prefix) // STEP - at
    return not left and (distance == 0 or at % (1 << (distance.bit_length() - 1)) == 0)


class Use:
    """A prompt that begins from a library, and stores there what it reads. While it lives, `kept` is never let go.

    reused: tokens that need not be read. kept: by kind, the newest snapshot that it began with or stored.
    """

    def __init__(self, library: PrefixLibrary, prefix: Prefix, reused: int, kept: dict[str, Entry]):
        self.library, self.prefix, self.reused, self.kept = library, prefix, reused, kept

    def read(self, cache: Cache, tokens: int, kind: str | None) -> None:
        """So many more tokens of the prompt were read into a cache. kind: of a place to store; None: it is none."""
        self.library.counts.read += tokens
        if kind:
            self.store(cache, kind)

    def store(self, cache: Cache, kind: str) -> None:
        """Store what a cache holds, which is the beginning of the prompt."""
        with LOCK:
            entry = self.library.store(self.prefix.upto(cache.length), cache.snapshot(), kind)
            if entry:
                before = self.kept.get(entry.kind)
                self.kept[entry.kind] = entry
                self.library.replace(entry, before)
            self.library.trim()

    def close(self) -> None:
        """What it kept may be let go from now on."""
        self.kept = {}
        self.library.trim()
