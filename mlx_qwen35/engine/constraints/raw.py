"""Raw text inside a tool call: the value of a parameter that is a string, up to the line that closes it.

Nothing is escaped in a call, so a value ends where the parser of answers says so: at a `</parameter>` that closes no
`<parameter=` of the text itself, with more of the call behind it. Here a value ends at the first one that begins a
line. One within a line is text, and what could be taken for more of the call must not follow it. Tags that are opened
in the text must be closed there, in order. So what was generated is parsed as it was meant.

No grammar runs inside: the mask is the same at nearly every place.
"""

from dataclasses import dataclass, replace

import numpy as np

from mlx_qwen35.engine.constraints.states import Next, State, Texts
from mlx_qwen35.engine.constraints.vocabulary import Vocabulary

_OPENERS = {b"<parameter=": "p", b"<function=": "f", b"<tool_call>": "t"}
_CLOSERS = {b"</parameter>": "p", b"</function>": "f", b"</tool_call>": "t"}
_CLOSER = b"</parameter"  # from here on the end of a value is certain
_END = b">\n"  # what is left of it
TAGS = (*_OPENERS, *_CLOSERS, _CLOSER)
_STARTS = frozenset(tag[:length] for tag in TAGS for length in range(1, len(tag) + 1))


@dataclass(frozen=True)
class Scan:
    """What of the text so far matters for the text to come.

    tail: the start of a tag that is not whole. line_start: whether the tail, or the next byte, begins a line. closed:
    whether nothing but blanks came since a closing tag that leaves no tag open. opened: the tags that are open, a
    letter each. ended: how many bytes of _END are there; None inside the value.
    """

    tail: bytes = b""
    line_start: bool = True
    closed: bool = False
    opened: str = ""
    ended: int | None = None


def scan(state: Scan, data: bytes) -> Scan | None:
    """The state behind these bytes; None where they must not come."""
    if not state.tail and b"<" not in data and state.ended is None:
        return replace(state, line_start=data.endswith(b"\n"), closed=state.closed and data.isspace())
    found: Scan | None = state
    for place in range(len(data)):
        found = found and _step(found, data[place : place + 1])
    return found


def _step(state: Scan, byte: bytes) -> Scan | None:
    if state.ended is not None:
        return replace(state, ended=state.ended + 1) if _END[state.ended : state.ended + 1] == byte else None
    tail = state.tail + byte
    if tail in _STARTS:
        return _tag(replace(state, tail=tail))
    if state.tail:  # it was no tag
        return _step(replace(state, tail=b"", line_start=False, closed=False), byte)
    return replace(state, line_start=byte == b"\n", closed=state.closed and byte.isspace())


def _tag(state: Scan) -> Scan | None:
    """A state whose tail may have become a whole tag."""
    if state.tail == _CLOSER and state.line_start and not state.opened:
        return Scan(ended=0)
    if kind := _OPENERS.get(state.tail):
        return None if state.closed else Scan(line_start=False, opened=state.opened + kind)
    if kind := _CLOSERS.get(state.tail):
        return _closed(state, kind)
    return state


def _closed(state: Scan, kind: str) -> Scan | None:
    if state.opened:
        left = state.opened[:-1]
        return Scan(line_start=False, closed=not left, opened=left) if state.opened[-1] == kind else None
    if state.closed and kind != "p":
        return None
    return Scan(line_start=False, closed=True)


class RawTexts:
    """The masks of raw text, for one vocabulary."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        long = [data for data in vocabulary.ids if b"<" in data and len(data) >= min(map(len, TAGS))]
        self._whole = [vocabulary.ids[data] for data in long if any(tag in data for tag in TAGS)]
        self._deepest = 2 + vocabulary.longest // min(map(len, _CLOSERS))  # tags that one token could close
        self._masks: dict[Scan, np.ndarray] = {}
        vocabulary.ordinary.flags.writeable = False

    def mask(self, state: Scan) -> np.ndarray:
        """(W,) uint32: all ordinary tokens but those that would break a rule."""
        key = replace(state, opened=state.opened[-self._deepest :])
        if key not in self._masks:
            bad = [token for token in self._suspects(key.tail) if scan(key, self.vocabulary.bytes[token]) is None]
            bits = self.vocabulary.ordinary & ~self.vocabulary.bits(bad) if bad else self.vocabulary.ordinary
            bits.flags.writeable = False
            self._masks[key] = bits
        return self._masks[key]

    def _suspects(self, tail: bytes) -> list[int]:
        """The tokens that complete a tag behind this tail, or hold a whole one."""
        rests = {tag[len(tail) :] for tag in TAGS if tail and tag.startswith(tail)} - {b""}
        found = [token for rest in rests for token in self.vocabulary.beginning_with(rest)]
        return found + self._whole


class Raw:
    """A place in a raw text. `then` follows its closing line."""

    def __init__(self, texts: RawTexts, then: Next, place: Scan = Scan()):
        self._texts, self._then, self._place = texts, then, place

    def bits(self) -> np.ndarray:
        return self._texts.mask(self._place)

    def allows(self, token: int) -> bool:
        data = self._texts.vocabulary.bytes[token]
        return bool(data) and scan(self._place, data) is not None

    def after(self, token: int) -> State:
        state = self.behind(self._texts.vocabulary.bytes[token])
        assert state, "the token may come"
        return state

    def behind(self, data: bytes) -> State | None:
        """The state behind these bytes; None if they must not come."""
        place = scan(self._place, data)
        if place is None:
            return None
        if place.ended is None:
            return Raw(self._texts, self._then, place)
        rest = _END[place.ended :]
        return Texts(self._texts.vocabulary, {rest: self._then}) if rest else self._then()
