"""The text of one argument of a call: where it ends, and its JSON as it comes.

Nothing in it is escaped, so its end can only be told by what follows. `</parameter>` ends it where no tag that was
opened inside it is still open, and where a parameter or the end of the function follows. Closing tags that are missing
or misspelt are read too.
"""

import json
import re
from enum import Enum
from typing import Any, Literal

from mlx_qwen35.prompt.tool_calls import Kind

OPEN, CLOSE, FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END = (
    "<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>"
)  # fmt: skip
TAGS = (OPEN, CLOSE, FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END)
MOST_BLANKS = 4096  # between two tags
MOST_NAME = 256  # characters of a name, and of the line before a tag that are looked at
_TAG = re.compile(r"</parameter[^<>\n]{0,16}>|<parameter=|<function=|</function>|</?tool_call>")
_ESCAPE = re.compile(r"\\$")
_UNFINISHED = re.compile(r"</?[a-z_]*$|</parameter[^<>\n]{0,16}$")  # what may become a tag
_TAG_OR_QUOTE = re.compile(rf'{_TAG.pattern}|"|\\\\.', re.DOTALL)
_LINE_END = re.compile(r"\r?\n")
_NESTED = 64  # tags open inside an argument


class Wait(Enum):
    """More text is needed to decide."""

    WAIT = "wait"


WAIT = Wait.WAIT
Verdict = bool | Literal[Wait.WAIT]
End = tuple[int, int]  # where an argument ends, and where the text goes on


class Argument:
    """One argument under way.

    Args:
        name: of the parameter.
        kind: how its text is typed.
        envelope: whether the call stands in <tool_call>.
    """

    def __init__(self, name: str, kind: Kind, envelope: bool):
        self.name, self._kind, self._envelope = name, kind, envelope
        self.waiting = ""  # text that may be no part of it
        self.rest: str | None = None  # the text behind it, once it has ended
        self._text: list[str] = []  # that certainly belongs to it
        self._line = ""  # of that text: the line under way, as far as it matters
        self._begun = False  # the line end at its beginning is taken off
        self._streaming = False  # its JSON is given out as it comes
        self._json: list[str] = []
        self._scanned = 0  # characters of `waiting` without tags that must still be looked at
        self._opened: list[str] = []  # tags inside it that are open
        self._sibling: int | None = None  # where `waiting` has a parameter that may be the next one
        self._candidate: End | None = None  # where it ends if nothing else tells
        self._tags = _TAG  # what is looked for
        self._quoted = False  # inside a string of JSON, where tags are text

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def value(self) -> Any:
        """Its value, once it has ended."""
        return self.text if self._streaming else self._kind.value(self.text)

    def feed(self, text: str, final: bool) -> list[str]:
        """Go on with more text, `final`: the last. Returns pieces of the JSON of the value."""
        self.waiting += text
        self._advance(final)
        json_pieces, self._json = self._json, []
        return json_pieces

    def _advance(self, final: bool) -> None:
        if not self._begun:
            if self.waiting in ("", "\r") and not final:
                return
            match = _LINE_END.match(self.waiting)
            self.waiting, self._begun = self.waiting[match.end() if match else 0 :], True
        if self._kind.json and not self._text and self.waiting.lstrip()[:1] in ("{", "["):
            self._tags = _TAG_OR_QUOTE
        while match := self._tags.search(self.waiting, self._scanned):
            if match.group()[0] in "\"\\":
                self._quoted ^= match.group() == '"'
                self._scanned = match.end()
                continue
            verdict = self._tag(match, final)
            if verdict is WAIT:
                self._scanned = match.start()
                return self._give(match.start())
            if verdict is not None:
                return self._end(verdict)
            self._scanned = match.end()
        tail = _UNFINISHED.search(self.waiting, self._scanned)
        if tail is None and self._tags is _TAG_OR_QUOTE and self.waiting.endswith("\\"):
            tail = _ESCAPE.search(self.waiting, self._scanned)
        self._scanned = max(self._scanned, tail.start() if tail else len(self.waiting))
        if not final:
            return self._give(self._scanned)
        return self._end_of_text(tail.start() if tail else len(self.waiting))

    # --- tags inside it ----------------------------------------------------------------------------------------------

    def _tag(self, match: re.Match[str], final: bool) -> End | Literal[Wait.WAIT] | None:
        """What a tag means: the end, nothing (None), or WAIT."""
        tag, start, stop = match.group(), match.start(), match.end()
        line = (self._line + self.waiting[:start]).rpartition("\n")[2]
        first = not line.strip()  # of its line
        if self._quoted and tag != PARAMETER_END:
            return None
        if tag in (OPEN, FUNCTION, PARAMETER):
            return self._open(tag, start) if first or line.endswith(">") else None
        if tag == FUNCTION_END:
            return self._end_without_closer(self._closes(FUNCTION), start, self._ends(stop, final, strict=True), first)
        if tag == CLOSE:
            return self._end_without_closer(self._closes(OPEN), start, self._call_ends(stop, final), first)
        if tag != PARAMETER_END and not first:
            return None
        if not self._quoted and self._closes(PARAMETER):
            return None
        follows = self._follows(stop, final)
        if follows is True and (self._opened or self._quoted):
            self._candidate = self._candidate or (start, stop)
            return None
        return WAIT if follows is WAIT else (start, stop) if follows else None

    def _open(self, tag: str, start: int) -> End | None:
        """A tag opens. A parameter may be the next one instead, where the closing tag is missing."""
        if tag == PARAMETER and not self._opened and self._sibling is None:
            self._sibling = start
        self._opened.append(tag)
        if len(self._opened) > _NESTED and self._sibling is not None:
            return self._sibling, self._sibling
        return None

    def _closes(self, tag: str) -> bool:
        """Whether a closing tag belongs to one that was opened inside; those behind that are closed too."""
        if tag not in self._opened:
            return False
        del self._opened[len(self._opened) - 1 - self._opened[::-1].index(tag) :]
        return True

    def _end_without_closer(
        self, own: bool, start: int, ends: Verdict, first: bool
    ) -> End | Literal[Wait.WAIT] | None:
        """</function> or </tool_call>: of one that was opened inside (`own`), or the end of the call."""
        if own or ends is False:
            return None
        if ends is WAIT:
            return WAIT
        if self._sibling is not None:
            return self._sibling, self._sibling
        return (start, start) if first else None

    def _follows(self, start: int, final: bool) -> Verdict:
        """Whether what follows is what may come behind a whole parameter."""
        place = _behind_blanks(self.waiting, start)
        if place - start > MOST_BLANKS:
            return False
        if self.waiting.startswith((PARAMETER, CLOSE), place):
            return True
        if self.waiting.startswith(FUNCTION_END, place):
            return self._ends(place + len(FUNCTION_END), final, strict=False)
        return (final or WAIT) if self._unfinished(place, PARAMETER, FUNCTION_END, CLOSE) else False

    def _ends(self, start: int, final: bool, strict: bool) -> Verdict:
        """Whether an end stands behind </function>. strict: the end of the call, not only a tag of it."""
        place = _behind_blanks(self.waiting, start)
        if self.waiting.startswith(CLOSE, place):
            return not strict or self._call_ends(place + len(CLOSE), final)
        if self.waiting.startswith((FUNCTION, OPEN), place):
            return True
        if self._unfinished(place, CLOSE, FUNCTION, OPEN):
            return final or WAIT
        return not self._envelope and "\n" in self.waiting[start:place]

    def _call_ends(self, start: int, final: bool) -> Verdict:
        """Whether nothing but another call stands behind </tool_call>."""
        place = _behind_blanks(self.waiting, start)
        if self._unfinished(place, OPEN):
            return place == len(self.waiting) if final else WAIT
        return self.waiting.startswith(OPEN, place)

    def _unfinished(self, start: int, *tags: str) -> bool:
        """Whether the rest of the text may become one of these tags."""
        rest = self.waiting[start : start + len(CLOSE)]
        return len(self.waiting) - start == len(rest) and any(tag.startswith(rest) and tag != rest for tag in tags)

    # --- its text ----------------------------------------------------------------------------------------------------

    def _give(self, stop: int) -> None:
        """Take what waits before a place, but for a line end that may be lost and text that may be another's."""
        places = [stop, *([] if self._sibling is None else [self._sibling])]
        places += [self._candidate[0]] if self._candidate else []
        self._take(without_line_end(self.waiting, min(places)))

    def _take(self, stop: int) -> None:
        text, self.waiting = self.waiting[:stop], self.waiting[stop:]
        if not text:
            return
        self._text.append(text)
        self._line = (self._line + text).rpartition("\n")[2][-MOST_NAME:]
        self._scanned -= stop
        self._sibling = None if self._sibling is None else self._sibling - stop
        self._candidate = self._candidate and (self._candidate[0] - stop, self._candidate[1] - stop)
        if self._streaming:
            self._json.append(_escaped(text))
        elif self._kind.plain or (self._kind.text_or_null and not self._kind.may_be_null(self.text)):
            self._streaming = True
            self._json += ['"', _escaped(self.text)]

    def _end(self, end: End) -> None:
        rest = self.waiting[end[1] :]
        self._take(without_line_end(self.waiting, end[0]))
        self.waiting, self.rest = "", rest
        self._json.append('"' if self._streaming else json.dumps(self.value, ensure_ascii=False))

    def _end_of_text(self, unfinished: int) -> None:
        """The text ends here. unfinished: where a tag may have begun."""
        if self._candidate:
            return self._end(self._candidate)
        if self._sibling is not None:
            return self._end((self._sibling, self._sibling))
        if not any(tag.startswith(self.waiting[unfinished:]) for tag in TAGS):
            unfinished = len(self.waiting)
            return self._take(unfinished)
        return self._take(without_line_end(self.waiting, unfinished))


def without_line_end(text: str, stop: int) -> int:
    """The place without the line end before it."""
    match = re.search(r"\r\n$|[\r\n]$", text[max(0, stop - 2) : stop])
    return stop - len(match.group()) if match else stop


def _behind_blanks(text: str, start: int) -> int:
    match = _BLANKS.match(text, start)
    assert match is not None
    return match.end()


_BLANKS = re.compile(r"\s*")


def _escaped(text: str) -> str:
    """Text inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
