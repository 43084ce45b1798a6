"""Text of an answer -> content and calls, piece by piece, whatever the pieces that the text comes in.

The form is that of the chat template:

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Deviations that models make are read too: a missing envelope, missing or misspelt closing tags, several functions in one
envelope, JSON in the envelope. A tag that opens nothing is content, and so is a call inside a code fence.
"""

import json
import re
from collections.abc import Callable
from typing import Any, Literal

from mlx_qwen35.prompt.argument import (
    CLOSE,
    FUNCTION,
    FUNCTION_END,
    MOST_BLANKS,
    MOST_NAME,
    OPEN,
    PARAMETER,
    TAGS,
    WAIT,
    Argument,
    Wait,
)
from mlx_qwen35.prompt.piece import ARGUMENTS, CALL, CALL_END, CONTENT, Piece
from mlx_qwen35.prompt.tool_calls import Cut, ToolCall, Tools, holdable

_IN_TEXT = re.compile(r"<tool_call>|<function=|`{3,}|~{3,}")
_TAIL = re.compile(r"<[a-z_]{0,9}=?$|[`~]{1,2}$")  # what may become one of those
_NAME = re.compile(r"[^>\n]*")
_JSON_MARK = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
_JSON = re.compile(r"\{\s*[\"}]")

Placed = list[tuple[Piece, int]]  # pieces, each with the characters of the whole text up to its end
State = Callable[[bool], bool]  # whether the text is the last -> whether it went on; False: more text is needed
Name = tuple[str, int]  # a name, and where the text goes on


class CallScanner:
    """Splits text into content and calls, whose ids are "0", "1" and so on.

    Args:
        tools: the functions that may be called.
    """

    def __init__(self, tools: Tools):
        self._tools = tools
        self._state: State = self._content
        self._buffer = ""
        self._fed = self._begun = 0  # characters; calls
        self._line = ""  # of the content: the line under way, of a long one the end
        self._fence = ""  # the code fence that is open
        self._envelope = False  # the call under way stands in <tool_call>
        self._json_seen: tuple[int, int, bool] | None = None  # of JSON in an envelope: place, depth, inside a string
        self._call: tuple[str, str] | None = None  # id and name of the call under way
        self._arguments: dict[str, Any] = {}
        self._keys, self._given_key = 0, False  # of them that were given out; that of the argument under way was
        self._argument: Argument | None = None  # under way
        self._cut_short = False  # the limit of tokens ended the text
        self._out: Placed = []
        self.calls: list[ToolCall] = []
        self._cut: Cut | None = None

    def feed(self, text: str) -> Placed:
        """The pieces that this text completes."""
        self._buffer += text
        self._fed += len(text)
        return self._run(final=False)

    def finish(self, cut: bool) -> Placed:
        """The rest, at the end of the text. cut: the limit of tokens ended it."""
        self._cut_short = cut
        return self._run(final=True)

    @property
    def cut(self) -> Cut | None:
        """A call that has begun and is not whole."""
        if self._cut or self._call is None:
            return self._cut
        argument = self._argument
        return Cut(self._call[1], dict(self._arguments), {argument.name: argument.text} if argument else {})

    def _run(self, final: bool) -> Placed:
        while self._state(final):
            pass
        out, self._out = self._out, []
        return out

    def _emit(self, piece: Piece) -> None:
        self._out.append((piece, self._fed - len(self._buffer)))

    # --- content -----------------------------------------------------------------------------------------------------

    def _content(self, final: bool) -> bool:
        position = 0
        while match := _IN_TEXT.search(self._buffer, position):
            start, tag = match.start(), match.group()
            line = (self._line + self._buffer[:start]).rpartition("\n")[2]
            first = not line.strip()  # of its line
            if tag[0] in "`~":
                if not self._note_fence(match, first and len(line) <= 3, final):
                    return self._say(start)
            elif not self._fence and not line.endswith("`"):
                if tag == OPEN:
                    return self._enter(start, len(OPEN), self._in_envelope)
                declared = self._bare(match.end(), final) if first else False
                if declared is WAIT:
                    return self._say(start)
                if declared:
                    return self._enter(start, 0, self._in_call)
            position = match.end()
        tail = _TAIL.search(self._buffer, position)
        if not final and tail and any(form.startswith(tail.group()) for form in (OPEN, FUNCTION, "```", "~~~")):
            return self._say(tail.start())
        return self._say(len(self._buffer))

    def _say(self, stop: int) -> bool:
        """Give out the content before a place; the rest waits."""
        text, self._buffer = self._buffer[:stop], self._buffer[stop:]
        if text:
            self._line = (self._line + text).rpartition("\n")[2][-MOST_NAME:]
            self._emit(Piece(text, CONTENT))
        return False

    def _note_fence(self, match: re.Match[str], first: bool, final: bool) -> bool:
        """Take note of a code fence that opens or closes. False: its line must be known first."""
        if match.end() == len(self._buffer) and not final:
            return False
        if not first:
            return True
        mark, line_end = match.group(), self._buffer.find("\n", match.end())
        if line_end < 0 and not final:
            return False
        rest = self._buffer[match.end() : line_end if line_end >= 0 else None]
        if not self._fence:
            self._fence = "" if mark[0] == "`" and "`" in rest else mark
        elif mark[0] == self._fence[0] and len(mark) >= len(self._fence) and not rest.strip():
            self._fence = ""
        return True

    def _enter(self, start: int, width: int, state: State) -> bool:
        """A call may begin at a place, behind a tag of so many characters."""
        self._say(start)
        self._buffer, self._state, self._envelope = self._buffer[width:], state, bool(width)
        return True

    def _bare(self, start: int, final: bool) -> bool | Literal[Wait.WAIT]:
        """Whether a function without envelope, whose name begins at a place, is one of the tools."""
        name = self._name(start, final)
        return WAIT if name is WAIT else name is not None and name[0] in self._tools

    def _name(self, start: int, final: bool) -> Name | Literal[Wait.WAIT] | None:
        """A name in a tag, up to > or the end of the line; None: there is none."""
        match = _NAME.match(self._buffer, start)
        assert match is not None
        if match.end() == len(self._buffer):
            return None if final or match.end() - start > MOST_NAME else WAIT
        name = match.group().strip().strip("\"'")
        return (name, match.end() + (self._buffer[match.end()] == ">")) if 0 < len(name) <= MOST_NAME else None

    # --- a call ------------------------------------------------------------------------------------------------------

    def _in_envelope(self, final: bool) -> bool:
        """Behind <tool_call>: a function, JSON, or it opened nothing."""
        bare = self._buffer.lstrip()
        start = len(self._buffer) - len(bare)
        if bare.startswith(FUNCTION):
            name = self._name(start + len(FUNCTION), final)
            if name is WAIT:
                return False
            if name or final:
                self._state = self._in_call
                return True
        elif bare.startswith("{"):
            return self._in_json(start, final)
        elif FUNCTION.startswith(bare):
            if not final:
                return False
            if self._cut_short:
                return self._end_cut()
        return self._was_content()

    def _was_content(self) -> bool:
        """<tool_call> opened nothing."""
        self._state, self._envelope, self._json_seen = self._content, False, None
        self._line = (self._line + OPEN)[-MOST_NAME:]
        self._emit(Piece(OPEN, CONTENT))
        return True

    def _in_json(self, start: int, final: bool) -> bool:
        """A call in JSON, as older models write it."""
        if self._json_seen is None and not _JSON.match(self._buffer, start):
            wait = not final and len(self._buffer) < MOST_BLANKS and not self._buffer[start + 1 :].strip()
            return False if wait else self._was_content()
        stop = self._json_end(start)
        if stop is None:
            return False if not final else self._end_cut() if self._cut_short else self._was_content()
        called = _called(self._buffer[start:stop])
        if called is None or called[0] not in self._tools:
            return self._was_content()
        self._buffer = self._buffer[stop:]
        self._begin(called[0])
        for key, value in called[1].items():
            self._give(key, [json.dumps(value, ensure_ascii=False)])
            self._arguments[key] = value
        return self._end_call()

    def _json_end(self, start: int) -> int | None:
        """Where the JSON object ends that begins at a place; None: not yet. Each character is looked at once."""
        position, depth, quoted = self._json_seen or (start, 0, False)
        for match in _JSON_MARK.finditer(self._buffer, position):
            mark, position = match.group(), match.end()
            if mark == '"':
                quoted = not quoted
            elif not quoted and len(mark) == 1:
                depth += 1 if mark in "{[" else -1
                if depth == 0:
                    self._json_seen = None
                    return position
        half = self._buffer.endswith("\\") and position < len(self._buffer)  # of an escaped character
        self._json_seen = (len(self._buffer) - half, depth, quoted)
        return None

    def _in_call(self, final: bool) -> bool:
        """At <function=, or inside a function between its arguments."""
        self._buffer = self._buffer.lstrip()
        if self._call is None:
            name = self._name(len(FUNCTION), final)
            if name is None or name is WAIT:
                return final and self._end_cut()
            self._buffer = self._buffer[name[1] :]
            return self._begin(name[0])
        if self._buffer.startswith(PARAMETER):
            return self._begin_argument(final)
        if self._buffer.startswith(FUNCTION_END):
            self._buffer = self._buffer[len(FUNCTION_END) :]
            return self._end_call()
        if self._buffer.startswith((CLOSE, OPEN, FUNCTION)):
            return self._end_call()
        if final:
            return self._end_cut()
        return not any(tag.startswith(self._buffer) for tag in TAGS) and self._skip()

    def _skip(self) -> bool:
        """What stands between arguments belongs to nothing."""
        following = self._buffer.find("<", 1)
        self._buffer = self._buffer[following:] if following >= 0 else ""
        return True

    def _begin_argument(self, final: bool) -> bool:
        assert self._call is not None
        name = self._name(len(PARAMETER), final)
        if name is WAIT:
            return False
        if name is None:
            return self._end_cut() if final else self._skip()
        self._buffer = self._buffer[name[1] :]
        self._argument = Argument(name[0], self._tools.kind(self._call[1], name[0]), self._envelope)
        self._state = self._in_argument
        return True

    def _in_argument(self, final: bool) -> bool:
        argument, text = self._argument, self._buffer
        assert argument is not None
        self._buffer = ""
        self._give(argument.name, argument.feed(text, final))
        if argument.rest is None:
            return final and self._end_cut()
        self._arguments[argument.name] = argument.value
        self._buffer, self._argument, self._given_key, self._state = argument.rest, None, False, self._in_call
        return True

    def _behind(self, final: bool) -> bool:
        """Behind a whole call: the end of the envelope, another function in it, or content."""
        bare = self._buffer.lstrip()
        if not final and (CLOSE.startswith(bare) or FUNCTION.startswith(bare)):
            return False
        if bare.startswith(FUNCTION) and self._envelope:
            name = self._name(len(self._buffer) - len(bare) + len(FUNCTION), final)
            if name is WAIT:
                return False
            if name or final:
                self._state = self._in_call
                return True
        elif bare and (bare.startswith(CLOSE) or CLOSE.startswith(bare)):
            self._buffer = bare[len(CLOSE) :]
        self._state, self._envelope, self._line = self._content, False, ""
        return True

    # --- what a call gives out ---------------------------------------------------------------------------------------

    def _begin(self, name: str) -> bool:
        self._call, self._arguments, self._keys, self._given_key = (str(self._begun), name), {}, 0, False
        self._begun += 1
        self._emit(Piece("", CALL, *self._call))
        return True

    def _give(self, key: str, pieces: list[str]) -> None:
        """Pieces of the JSON of an argument, behind its key."""
        assert self._call is not None
        if not pieces:
            return
        if not self._given_key:
            before = f"{', ' if self._keys else '{'}{json.dumps(key, ensure_ascii=False)}: "
            self._emit(Piece(before, ARGUMENTS, *self._call))
            self._keys, self._given_key = self._keys + 1, self._argument is not None
        for piece in filter(None, pieces):
            self._emit(Piece(piece, ARGUMENTS, *self._call))

    def _end_call(self) -> bool:
        assert self._call is not None
        self._emit(Piece("}" if self._keys else "{}", ARGUMENTS, *self._call))
        self._emit(Piece("", CALL_END, *self._call))
        self.calls.append(ToolCall(*self._call, self._arguments))
        self._call, self._state = None, self._behind
        return True

    def _end_cut(self) -> bool:
        """The text ends inside a call."""
        self._cut = self.cut or Cut(None, {}, {})
        self._buffer, self._call, self._argument, self._state = "", None, None, self._content
        return False


def _called(text: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a call in JSON; None: it is none."""
    found = _loaded(text)
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _loaded(arguments or "{}")
    return (found["name"], arguments) if isinstance(arguments, dict) else None


def _loaded(text: str) -> Any:
    try:
        return holdable(json.loads(text, strict=False))
    except (ValueError, RecursionError):
        return None
