"""What token a sequence may go on with, decided in one place: thinking and its end, then what the answer may be."""

from collections import deque
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from mlx_qwen35.engine.constraints.bits import all_but, only, packed
from mlx_qwen35.engine.constraints.constraint import Constraint
from mlx_qwen35.engine.constraints.loop import NOTHING, Recent

UNDO = 64  # accepted tokens that can be taken back; a pass has at most 4
FAR = 1 << 30
REOPENED = 8  # tokens that thinking has at least where an answer opens it again


class ToolTags(NamedTuple):
    """Calls inside thinking, by their tokens."""

    begin: int  # <tool_call>
    end: int  # </tool_call>
    decode: Callable[[list[int]], str]


class Thinking(NamedTuple):
    """How thinking goes on and ends.

    start, end: the tokens <think> and </think>. budget: most tokens; None: any number. most: most tokens where a call
    is under way, which no budget cuts. closing: the tokens that close
    it. nothing: those that close it before its first token. blank: tokens that come behind </think> before an answer
    that is restricted. guard: whether a loop closes it. tools: None where the answer may call no tools.
    """

    start: int
    end: int
    budget: int | None
    most: int
    closing: tuple[int, ...]
    nothing: tuple[int, ...]
    blank: tuple[int, ...]
    guard: bool
    tools: ToolTags | None


class _Place(NamedTuple):
    """Where a sequence is. A value."""

    thinking: bool
    used: int = 0  # tokens of thinking, without those that close it
    forced: tuple[int, ...] = ()  # tokens that come next
    call: tuple[int, ...] | None = None  # inside thinking: the first tokens of a call that is not whole
    whole: bool = False  # inside thinking: a whole call is the last that came
    answered: int = 0  # tokens that the answer's constraint has accepted
    recent: Recent = NOTHING


class Door:
    """What one sequence may go on with.

    Args:
        vocabulary: the tokenizer's size.
        stops: the tokens that end a sequence; they end no thinking that an answer must follow.
        thinking: None where nothing restricts it.
        inside: whether the sequence begins inside thinking.
        answer: what the answer may be, from its first token on; None: anything.
        everywhere: the caller's own constraint, of every token.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        stops: Collection[int] = (),
        thinking: Thinking | None = None,
        inside: bool = False,
        answer: Constraint | None = None,
        everywhere: Constraint | None = None,
    ):
        self._vocabulary, self._thinking, self._answer, self._everywhere = vocabulary, thinking, answer, everywhere
        self._unfinished = all_but(stops, vocabulary) if answer and inside else None
        self._place = self._closed(_Place(inside))
        self._undo: deque[_Place] = deque(maxlen=UNDO)

    # --- what may come ---

    @property
    def free(self) -> int:
        """So many next tokens may be any, whatever they are."""
        place, rules = self._place, self._thinking
        if self._everywhere or self._answer or place.forced or (rules and rules.guard):
            return 0
        if rules is None or rules.budget is None:
            return FAR
        return max(0, rules.budget - place.used) if place.thinking else REOPENED

    def bits(self) -> np.ndarray | None:
        """(W,) uint32: the tokens that may come next; None: any."""
        place = self._place
        if self._everywhere:
            return self._packed(self._everywhere)
        if place.forced:
            return only(place.forced[:1], self._vocabulary)
        if place.thinking:
            return self._unfinished
        return self._packed(self._answer) if self._answer else None

    def _packed(self, constraint: Constraint) -> np.ndarray | None:
        mask = constraint.mask()
        return None if mask is None else packed(mask, self._vocabulary)

    # --- what came ---

    def accept(self, token: int) -> None:
        """The sequence goes on with this token."""
        if self._everywhere:
            self._everywhere.accept(token)
            return
        place = self._place
        after = self._closed(self._after(place, token))
        if after.answered > place.answered:
            assert self._answer is not None
            self._answer.accept(token)
        self._undo.append(place)
        self._place = after

    def rollback(self, count: int) -> None:
        """Undo the last `count` accepted tokens."""
        if self._everywhere:
            self._everywhere.rollback(count)
            return
        before = self._place
        for _ in range(count):
            self._place = self._undo.pop()
        if self._answer and before.answered > self._place.answered:
            self._answer.rollback(before.answered - self._place.answered)

    def _after(self, place: _Place, token: int) -> _Place:
        rules = self._thinking
        if rules and rules.guard:
            place = place._replace(recent=place.recent.after(token))
        forced = place.forced[1:]
        if not place.thinking:
            if rules and token == rules.start:
                used = place.used if rules.budget is None else min(place.used, rules.budget - REOPENED)
                return place._replace(thinking=True, used=used, forced=())
            return place._replace(forced=forced, answered=place.answered + bool(self._answer and not place.forced))
        if rules and token == rules.end:
            blank = rules.blank if self._answer and not forced else forced
            return place._replace(thinking=False, forced=blank, call=None, whole=False)
        if place.forced:
            return place._replace(forced=forced)
        return self._with_call(place, token)._replace(used=place.used + 1)

    def _with_call(self, place: _Place, token: int) -> _Place:
        """What a token of thinking means for a call inside it."""
        tools = self._thinking.tools if self._thinking else None
        if tools is None:
            return place
        if token == tools.begin:
            return place._replace(call=(), whole=False)
        if token == tools.end:
            return place._replace(call=None, whole=place.call is not None)
        if place.call is None:
            return place._replace(whole=place.whole and not tools.decode([token]).strip())
        if len(place.call) >= _HEAD:
            return place
        call = (*place.call, token)
        return place._replace(call=call if _may_be_call(tools.decode(list(call))) else None)

    def _closed(self, place: _Place) -> _Place:
        """The place with the tokens that close thinking ahead, if it must end here."""
        rules = self._thinking
        if rules is None or not place.thinking or place.forced or place.whole:
            return place
        budget = rules.budget if place.call is None or rules.budget is None else max(rules.budget, rules.most)
        spent = budget is not None and place.used >= budget
        if spent or (rules.guard and place.recent.loop):
            return place._replace(forced=rules.closing if place.used else rules.nothing)
        return place


_HEAD = 8  # tokens behind <tool_call> that tell whether it begins a call


def _may_be_call(text: str) -> bool:
    """Whether the text behind <tool_call> begins a call, as far as it is there."""
    text = text.lstrip()
    return any(form.startswith(text) or text.startswith(form) for form in ("<function=", "{"))
