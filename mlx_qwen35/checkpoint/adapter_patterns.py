"""The regular expressions of an adapter's configuration, which fit names of modules, matched in bounded time.

They come from strangers, and Python's re needs exponential time for some, as (a+)+b. So an expression with choices is
followed here from all places of the name at which it may stand at once.
"""

import re
from collections.abc import Callable

CHARACTERS, DEPTH, STEPS = 1000, 20, 2_000_000  # of an expression; of groups in it; of all expressions and names
_CHOICES = set("*+?{|(")
_ONE = re.compile(r"\\[dDsSwW]|\\[^A-Za-z0-9]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\]", re.DOTALL)  # character of a name
_REPEATED = re.compile(r"(?:([*+?])|\{(?=[\d,])(\d*)(,?)(\d*)\})(\+?)\??")

_Places = frozenset[int]
_Way = Callable[[str, _Places], _Places]  # from where a part of an expression begins to where it may end


class Patterns:
    """Makes expressions, and counts the steps of all of them. Both raise ValueError for what is not followed."""

    def __init__(self) -> None:
        self._left = STEPS

    def compiled(self, key: str) -> Callable[[str], bool]:
        """Whether a name fits, of which `key` has to fit the end: (.*\\.)?(key)$, as peft has it."""
        if len(key) > CHARACTERS:
            raise ValueError(f"it has more than {CHARACTERS} characters")
        re.compile(key)  # by itself: a)(b is none
        plain = re.compile(rf"(.*\.)?({key})$")
        way = _Parsed(key, self._step).way() if _CHOICES & set(key) else None

        def fits(name: str) -> bool:
            self._step()
            if way is None:
                return bool(plain.match(name))
            behind_dots = (i + 1 for i, character in enumerate(name) if character == ".")
            return len(name) in way(name, frozenset((0, *behind_dots)))

        return fits

    def _step(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"the expressions need more than {STEPS:,} steps")


class _Parsed:
    """The parts of an expression that re takes, read from the left."""

    def __init__(self, text: str, step: Callable[[], None]):
        self._text, self._step, self._at, self._depth = text, step, 0, 0

    def way(self) -> _Way:
        """Up to the end of the expression, or of a group."""
        ways = [self._sequence()]
        while self._take("|"):
            ways.append(self._sequence())
        return ways[0] if len(ways) == 1 else lambda name, at: frozenset().union(*(way(name, at) for way in ways))

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _sequence(self) -> _Way:
        parts: list[_Way] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._part()))

        def way(name: str, at: _Places) -> _Places:
            for part in parts:
                if not at:
                    break
                at = part(name, at)
            return at

        return way

    def _part(self) -> _Way:
        if self._take("("):
            return self._group()
        if self._take("^"):
            return lambda name, at: at & {0}
        if self._take("$"):
            return lambda name, at: at & {len(name)}
        found = _ONE.match(self._text, self._at)
        if not found:
            raise ValueError(f"{self._text[self._at :][:20]!r} is not followed here")
        self._at = found.end()
        fits = re.compile(found[0]).match

        def way(name: str, at: _Places) -> _Places:
            self._step()
            return frozenset(i + 1 for i in at if i < len(name) and fits(name[i]))

        return way

    def _group(self) -> _Way:
        if not self._take("?:") and self._take("?"):
            raise ValueError(f"a group that begins with (?{self._text[self._at :][:1]} is not followed here")
        self._depth += 1
        if self._depth > DEPTH:
            raise ValueError(f"it nests groups deeper than {DEPTH}")
        way = self.way()
        self._at, self._depth = self._at + 1, self._depth - 1
        return way

    def _repeated(self, way: _Way) -> _Way:
        found = _REPEATED.match(self._text, self._at)
        if not found:
            return way
        self._at, (sign, low, comma, high, possessive) = found.end(), found.groups()
        if possessive:
            raise ValueError(f"{found[0]} is not followed here")
        least = int(low or 0) if not sign else int(sign == "+")
        most = {"*": None, "+": None, "?": 1}[sign] if sign else int(high) if high else None if comma else least

        def repeated(name: str, at: _Places) -> _Places:
            enough = len(name) + 1  # one of so many is empty, and may stand any number of times
            for _ in range(min(least, enough)):
                self._step()
                before, at = at, way(name, at)
                if at == before:
                    break
            found = at
            for _ in range(enough if most is None else min(most - least, enough)):
                self._step()
                at = way(name, at) - found
                if not at:
                    break
                found |= at
            return found

        return repeated
