"""A folder that keeps what a library of prefixes stores, so that another process need not read it again.

A place of a prompt has two files: its DeltaNet states, and the keys and values behind the place before it, with their
tokens. They are named by a digest of the tokens, of what these show, of the model and of the adapter. So no column is
written twice, and a place that a prompt has left behind gives its states back.

Here prefixes name adapters by their fingerprints, which outlive the names that adapters are loaded under.
"""

import json
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlx_qwen35.cache.cache import Cache, Snapshot
from mlx_qwen35.cache.layer import CachePosition
from mlx_qwen35.cache.prefix import RANKS, Adapters, Entry, PrefixLibrary
from mlx_qwen35.cache.prefix_arrays import columns, restored, states
from mlx_qwen35.cache.prefix_folder import ASIDE, Damaged, Folder
from mlx_qwen35.cache.prefix_places import UNFIT, Place, Places
from mlx_qwen35.cache.prefix_tokens import Prefix
from mlx_qwen35.cache.session_file import Taken
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.process import LOCK

COLUMNS, STATES = ".columns.safetensors", ".states.safetensors"
Tells = Callable[[str, Mapping[str, str], os.stat_result], None]


class PrefixFiles:
    """Writes what a library stores, on a thread of its own, and reads what the library has less of.

    The folder belongs to this process until `close`. Any thread may call any method.

    Args:
        identity: what the model is, as fingerprint and dtype. A file of another one stays where it is, and is not read.
        memory: most bytes of the files, by default the library's. The oldest of the lowest kind go first.
        tell: called with a line that an operator should see.

    Raises InputError: session_busy where another process has the folder, output_unwritable.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        memory: int | None = None,
        tell: Callable[[str], None] = warnings.warn,
    ):
        self.folder, self.tell = folder, tell
        self.memory = memory
        self.library: PrefixLibrary | None = None
        self._adapters: Adapters | None = None  # of the library's model
        self.pending = 0  # bytes that wait to be written
        self._identity = dict(identity)
        self.places = Places(identity)
        self._guard = threading.Lock()  # of the places; nobody waits for a disk with it
        self._recalls = threading.Lock()  # one prompt at a time is read
        self._busy: frozenset[str] = frozenset()  # what is being read
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._files = Folder(folder)
        self._open()
        self._thread = threading.Thread(target=self._work, name="prefix files", daemon=True)
        self._thread.start()

    def attach(self, library: PrefixLibrary) -> None:
        """Be behind a library, and no other."""
        self.detach()
        self.library, library.behind, self._adapters = library, self, library.model.adapters
        if self.memory is None:
            self.memory = library.memory
            self._jobs.put(self._trim)

    def detach(self) -> None:
        """Write what the library has and the folder lacks, and let go of it."""
        library, self.library = self.library, None
        if library:
            for entry in sorted(library.entries(), key=lambda entry: entry.used):
                self.flush()
                with LOCK:
                    self._take(entry, float("inf"))
            library.behind = self._adapters = None

    @property
    def nbytes(self) -> int:
        """Bytes of the files, and of those that wait to be written."""
        with self._guard:
            return self.places.nbytes

    def lengths(self) -> list[int]:
        """Tokens of the prefixes that can be read, the shortest first."""
        with self._guard:
            return sorted(len(place.prefix) for place in self.places.values() if place.kind and place.written)

    def flush(self) -> None:
        """Wait until all that was taken is written."""
        done = threading.Event()
        self._jobs.put(done.set)
        done.wait()

    def close(self) -> None:
        """Write what the library has and the folder lacks, and give the folder up."""
        self.detach()
        self._jobs.put(None)
        self._thread.join()
        self._files.close()

    # --- what a library tells ---

    def take(self, entry: Entry) -> None:
        """An entry was stored: copy what the folder lacks of it, to be written; what is much, `detach` copies."""
        self._take(entry, (self.memory or 0) // 4)

    def _take(self, entry: Entry, most: float) -> None:
        self.touch(entry)
        prefix = self._stored(entry.prefix)
        with self._guard:
            path = self.places.path(prefix)
            key = self.places.key(prefix)
            known = self.places.get(key)
            if known and known.kind:
                known.kind = max(known.kind, entry.kind, key=RANKS.__getitem__)
                return
            parent = next((other for other in reversed(path) if other != key), "")
            start = len(self.places[parent].prefix) if parent else 0
        cache = entry.snapshot.cache()
        new, own = {} if known else columns(cache, start), states(cache)
        sizes = [sum(array.nbytes for array in arrays.values()) for arrays in (new, own)]
        if self.pending + sum(sizes) > most:
            return
        taken = [{name: Taken.of(array) for name, array in arrays.items()} for arrays in (new, own)]
        with self._guard:
            if (needed := key if known else parent) and needed not in self.places:
                return  # it was let go of meanwhile
            place = self.places.setdefault(key, Place(prefix, parent, sizes[0]))
            place.kind, place.states, place.written, place.used = entry.kind, sizes[1], False, time.time_ns()
            self.pending += sum(sizes)
        self._jobs.put(lambda: self._write(key, start, taken[0], taken[1], cache.next_positions[0]))

    def touch(self, entry: Entry) -> None:
        """A prompt began with an entry: it is let go of behind those that were not used since."""
        with self._guard:
            key = self.places.key(self._stored(entry.prefix))
            if place := self.places.get(key):
                place.used = time.time_ns()
                self._jobs.put(lambda: self._files.touch(key + STATES))

    def drop(self, entry: Entry) -> None:
        """An entry was let go, for its prompt has gone on: its states are of no more use."""
        with self._guard:
            key = self.places.key(self._stored(entry.prefix))
            if place := self.places.get(key):
                place.kind = None
                self._jobs.put(lambda: self._forsake(key))

    def recall(self, prefix: Prefix) -> None:
        """Read the most of a prompt that the folder has into the library, where that has less."""
        with self._recalls:
            if (library := self.library) is None:
                return
            known, stored = library.reusable(prefix), self._stored(prefix)
            with self._guard:
                path = [key for key in self.places.path(stored) if known < len(self.places[key].prefix) < len(prefix)]
            for key in reversed(path):
                if self._recall(library, key, prefix.adapter):
                    return

    def _stored(self, prefix: Prefix) -> Prefix:
        """A prefix of the library, as the folder has it."""
        return replace(prefix, adapter=self._adapters.fingerprint(prefix.adapter)) if self._adapters else prefix

    # --- reading ---

    def _recall(self, library: PrefixLibrary, key: str, adapter: str) -> bool:
        """Read a place into a library; whether that went well. adapter: the name that its adapter has there."""
        with self._guard:
            place = self.places.get(key)
            if not (place and place.kind and place.written):
                return False
            chain = self.places.chain(key)
            kind, size = place.kind, place.states + sum(self.places[other].columns for other in chain)
            if (room := library.memory - size) < 0:
                return False
            self._busy = frozenset(chain)
        try:
            library.trim(room)
            snapshot = self._read(chain, len(place.prefix), partial(library.model.make_cache, adapter=adapter))
            library.store(replace(place.prefix, adapter=adapter), snapshot, kind, compact=False)
        except Damaged as error:
            self._set_aside(error)
            return False
        except InputError as error:
            self.tell(f"a prefix could not be read: {error}")
            return False
        finally:
            self._busy = frozenset()
            for other in chain:  # what was let go meanwhile
                self._jobs.put(lambda key=other: self._forsake(key))  # type: ignore[misc]
        return True

    def _read(self, chain: Sequence[str], length: int, empty: Callable[[], Cache]) -> Snapshot:
        """The snapshot behind the last of these places, each of which goes on from the one before it. empty: see
        `restored`.
        """
        name = chain[-1] + STATES
        try:
            position = CachePosition((length,), (int(self._files.metadata(name)["next_position"]),))
            pieces = (self._files.arrays(file) for file in (*(key + COLUMNS for key in chain), name))
            return restored(empty, position, pieces)
        except InputError:  # which is a ValueError
            raise
        except (KeyError, ValueError) as error:
            raise Damaged(name, error) from error

    # --- writing, on its own thread ---

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _write(
        self, key: str, start: int, new: Mapping[str, Taken], own: Mapping[str, Taken], next_position: int
    ) -> None:
        place, size = self.places.get(key), sum(array.nbytes for array in (*new.values(), *own.values()))
        try:
            if place and new:
                prefix = place.prefix
                about = {"parent": place.parent, "start": start, "tokens": prefix.tokens[start:].tolist(),
                         "media": [shown for shown in prefix.media if shown.start >= start],
                         "adapter": prefix.adapter}  # fmt: skip
                place.columns = self._files.save(key + COLUMNS, self._described(about), new)
            if place and place.kind:
                about = {"kind": place.kind, "next_position": next_position}
                place.states = self._files.save(key + STATES, self._described(about), own)
                place.written = True
        except (InputError, OSError) as error:
            self.tell(f"a prefix could not be written: {error}")
            self._forget(key)
        finally:
            self.pending -= size
        self._trim()

    def _forsake(self, key: str) -> None:
        """No prompt goes on from a place any more, unless it was stored again meanwhile."""
        with self._guard:
            place = self.places.get(key)
            if not place or place.kind or key in self._busy:
                return
            place.states = 0
            gone = self.places.prune(key, self._busy)
        self._files.remove(key + STATES, *(other + COLUMNS for other in gone))

    def _trim(self) -> None:
        """Let go of places until the files take no more than they may."""
        while True:
            with self._guard:
                most = self.places.nbytes if self.memory is None else self.memory
                key = self.places.oldest(self._busy) if self.places.nbytes > most else None
                if key is None:
                    return
                self.places[key].kind = None
            self._forsake(key)

    def _forget(self, key: str) -> None:
        """A place cannot be had, and nothing that goes on from it."""
        with self._guard:
            gone = self.places.cut(key)
        self._files.remove(*(other + ending for other in gone for ending in (COLUMNS, STATES)))

    def _set_aside(self, error: Damaged) -> None:
        self._files.set_aside(error.name)
        self.tell(f"{error}. It is set aside as {error.name + ASIDE}; its prompt is read again")
        self._forget(_key(error.name))

    def _described(self, about: Mapping[str, object]) -> dict[str, str]:
        return self._identity | {field: json.dumps(value) for field, value in about.items()}

    # --- the start ---

    def _open(self) -> None:
        """Read the headers of what another process has left."""
        headers = list(self._files.headers(COLUMNS, self._set_aside))
        own = [(name, header) for name, header in headers if self._identity.items() <= header.items()]
        if others := len(headers) - len(own):
            self.tell(f"{self.folder}: {others} prefixes are of another model or other settings, and are not used")
        for name, header in sorted(own, key=lambda pair: (len(pair[1].get("start", "")), pair[1].get("start", ""))):
            self._tell(self.places.add, name, header)
        for name, header in self._files.headers(STATES, self._set_aside):
            self._tell(self.places.mark, name, header)
        for name, _ in own:
            gone = self.places.prune(_key(name), ()) if _key(name) in self.places else [_key(name)]
            self._files.remove(*(key + ending for key in gone for ending in (COLUMNS, STATES)))
        self._trim()

    def _tell(self, of: Tells, name: str, header: dict[str, str]) -> None:
        """Tell the places of a file."""
        try:
            of(_key(name), header, self._files.stat(name))
        except UNFIT as error:
            self._set_aside(Damaged(name, error))


def _key(name: str) -> str:
    """Of the place that a file is of."""
    return name.partition(".")[0]
