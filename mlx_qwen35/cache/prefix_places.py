"""What a folder has of prefixes: a tree of places, each of which goes on from the one before. It touches no file."""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mlx_qwen35.cache.prefix import RANKS
from mlx_qwen35.cache.prefix_tokens import Prefix, Shown

UNFIT = (AttributeError, LookupError, ValueError, TypeError, OverflowError, RecursionError)  # what a header may raise


@dataclass
class Place:
    """What the folder has of a prefix, or will have once that is written.

    parent: key of the place before it, "" for none. columns, states: bytes of the files. kind: None where no prompt is
    expected to go on from here, and no states are kept. written: whether all is there. used: when it was, in
    nanoseconds.
    """

    prefix: Prefix
    parent: str
    columns: int
    states: int = 0
    kind: str | None = None
    written: bool = True
    used: int = 0


class Places(dict[str, Place]):
    """Places by key: a digest of the tokens, of what these show, of the model and of the adapter.

    identity: what the model is.
    """

    def __init__(self, identity: Mapping[str, str]):
        super().__init__()
        self._identity = json.dumps(identity, sort_keys=True).encode()

    def add(self, key: str, header: Mapping[str, str], file: os.stat_result) -> None:
        """A file of columns is there, with this header. It is passed over where what it goes on from is not.

        Raises one of UNFIT for a header that is not as it was written.
        """
        parent, tokens, media = (json.loads(header[field]) for field in ("parent", "tokens", "media"))
        if parent and parent not in self:
            return
        empty = Prefix(np.zeros(0, np.int32), adapter=json.loads(header.get("adapter", '""')))  # older files lack it
        before = self[parent].prefix if parent else empty
        shown = tuple(Shown(digest, tuple(map(tuple, places))) for digest, places in media)
        joined = np.concatenate([before.tokens, np.array(tokens, np.int32)])
        prefix = replace(before, tokens=joined, media=before.media + shown)
        if self.key(prefix) != key:
            raise ValueError(f"the tokens in {key} must be those that it was written with")
        self[key] = Place(prefix, parent, file.st_size)

    def mark(self, key: str, header: Mapping[str, str], file: os.stat_result) -> None:
        """A file of states is there, with this header. Raises as `add`."""
        kind = json.loads(header["kind"])
        if kind not in RANKS:
            raise ValueError(f"the kind of {key} must be one of {list(RANKS)}")
        if place := self.get(key):
            place.kind, place.states, place.used = kind, file.st_size, file.st_mtime_ns

    def key(self, prefix: Prefix) -> str:
        return next(self._keys(prefix, [len(prefix)]))

    def path(self, prefix: Prefix) -> list[str]:
        """The keys of all that begins a prefix, the shortest first."""
        lengths = {len(place.prefix) for place in self.values() if len(place.prefix) <= len(prefix)}
        return [key for key in self._keys(prefix, lengths) if key in self]

    def _keys(self, prefix: Prefix, lengths: Iterable[int]) -> Iterator[str]:
        digest, done = hashlib.sha256(self._identity + prefix.adapter.encode()), 0
        for length in sorted(lengths):
            digest.update(prefix.tokens[done:length].astype("<i4").tobytes())
            done, whole = length, digest.copy()
            whole.update(json.dumps(prefix.upto(length).media).encode())
            yield whole.hexdigest()[:32]

    def chain(self, key: str) -> list[str]:
        """The keys of a place and of those that it goes on from, the first one first."""
        found: list[str] = []
        while key:
            found.insert(0, key)
            key = self[key].parent
        return found

    @property
    def nbytes(self) -> int:
        return sum(place.columns + place.states for place in self.values())

    def oldest(self, busy: Collection[str]) -> str | None:
        """The key of what is let go first: the oldest of the lowest kind, and nothing that is busy."""
        idle = [key for key, place in self.items() if place.kind and place.written and key not in busy]
        return min(idle, key=lambda key: (RANKS[self[key].kind or ""], self[key].used), default=None)

    def prune(self, key: str, busy: Collection[str]) -> list[str]:
        """Remove a place, and those that it goes on from, as far as nothing needs them; their keys."""
        gone: list[str] = []
        while (place := self.get(key)) and not (place.kind or key in busy or self._children(key)):
            gone.append(key)
            del self[key]
            key = place.parent
        return gone

    def cut(self, key: str) -> list[str]:
        """Remove a place and all that goes on from it; their keys."""
        gone, left = [], [key]
        while left:
            key = left.pop()
            gone += [key] if self.pop(key, None) else []
            left += self._children(key)
        return gone

    def _children(self, key: str) -> list[str]:
        return [other for other, place in self.items() if place.parent == key]
