"""The places in a grammar. A state says what tokens may come, and what state follows each.

States are never changed, so going back is taking an earlier one. A state hands over to the next by a function that
makes it: what follows may hold a place of its own (guidance.py), and each answer needs one.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import Protocol, runtime_checkable

import numpy as np

from mlx_qwen35.engine.constraints.vocabulary import Vocabulary


class State(Protocol):
    """A place in a grammar."""

    def bits(self) -> np.ndarray | None:
        """(W,) uint32, the tokens that may come; None: all."""

    def allows(self, token: int) -> bool:
        """Whether this token may come."""

    def after(self, token: int) -> "State":
        """The state behind a token that may come."""


Next = Callable[[], State]


@runtime_checkable
class Spelled(State, Protocol):
    """A place in a text, which can be left by bytes too."""

    def behind(self, data: bytes) -> State | None:
        """The state behind these bytes; None if they must not come."""


class Chain:
    """A grammar's place in one answer, as a Constraint."""

    def __init__(self, start: State):
        self._states = [start]

    def mask(self) -> np.ndarray | None:
        return self._states[-1].bits()

    def accept(self, token: int) -> None:
        state = self._states[-1]
        assert state.allows(token), f"the grammar forbids token {token}"
        self._states.append(state.after(token))

    def rollback(self, count: int) -> None:
        assert 0 <= count < len(self._states), "no more tokens can be taken back than were accepted"
        del self._states[len(self._states) - count :]


class End:
    """The answer is over."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary

    def bits(self) -> np.ndarray:
        return self._vocabulary.stops

    def allows(self, token: int) -> bool:
        return token in self._vocabulary.stop_ids

    def after(self, token: int) -> State:
        return self


class Anything:
    """Text without a rule, which may end, until one of these tokens comes."""

    def __init__(self, until: Mapping[int, Next]):
        self._until = until

    def bits(self) -> None:
        return None

    def allows(self, token: int) -> bool:
        return True

    def after(self, token: int) -> State:
        return self._until[token]() if token in self._until else self


class Token:
    """One token."""

    def __init__(self, vocabulary: Vocabulary, token: int, then: Next):
        self._vocabulary, self._token, self._then = vocabulary, token, then

    def bits(self) -> np.ndarray:
        return self._vocabulary.bits([self._token])

    def allows(self, token: int) -> bool:
        return token == self._token

    def after(self, token: int) -> State:
        return self._then()


class Texts:
    """One of several texts, in any tokens that spell it.

    Where a text begins another one, what follows the first must begin with no token of the second. A token goes beyond
    a text only into text that follows (`Spelled`), if `onward`: a tokenizer may join their line ends.
    """

    def __init__(self, vocabulary: Vocabulary, texts: Mapping[bytes, Next], onward: bool = False):
        self._vocabulary, self._texts, self._onward = vocabulary, dict(texts), onward
        self._after: dict[int, State] = {}

    @cached_property
    def _tokens(self) -> frozenset[int]:
        most, ids = self._vocabulary.longest, self._vocabulary.ids
        starts = {text[:length] for text in self._texts for length in range(1, min(len(text), most) + 1)}
        return frozenset(ids[start] for start in starts if start in ids) | self._beyond.keys()

    @cached_property
    def _beyond(self) -> dict[int, Next]:
        """The tokens that go beyond a text, each with what makes the state behind it."""
        found: dict[int, Next] = {}
        for text, then in self._texts.items() if self._onward else ():
            for token in self._vocabulary.beginning_with(text):
                rest = self._vocabulary.bytes[token][len(text) :]
                if rest and _inside(then, rest):
                    found[token] = partial(_entered, then, rest)
        return found

    def bits(self) -> np.ndarray:
        return self._vocabulary.bits(self._tokens)

    def allows(self, token: int) -> bool:
        return token in self._tokens

    def after(self, token: int) -> State:
        if token in self._after:
            return self._after[token]
        if token in self._beyond:
            return self._beyond[token]()
        data = self._vocabulary.bytes[token]
        state = self.behind(data)
        assert state, "the token may come"
        if data not in self._texts:  # what follows a text is made anew each time
            self._after[token] = state
        return state

    def behind(self, data: bytes) -> State | None:
        """The state behind this part of a text."""
        rest = {text[len(data) :]: then for text, then in self._texts.items() if text.startswith(data)}
        then = rest.pop(b"", None)
        left = Texts(self._vocabulary, rest, self._onward) if rest else None
        if then is None:
            return left
        return Either([then(), left]) if left else then()


def _inside(then: Next, data: bytes) -> State | None:
    """The state behind these bytes of what follows, if that can be left by bytes."""
    state = then()
    return state.behind(data) if isinstance(state, Spelled) else None


def _entered(then: Next, data: bytes) -> State:
    state = _inside(then, data)
    assert state, "these bytes may come"
    return state


class Either:
    """Any of several states, for as long as the tokens leave more than one."""

    def __init__(self, states: Iterable[State]):
        self._states = list(states)

    def bits(self) -> np.ndarray | None:
        joined: np.ndarray | None = None
        for bits in (state.bits() for state in self._states):
            if bits is None:
                return None
            joined = bits if joined is None else joined | bits
        return joined

    def allows(self, token: int) -> bool:
        return any(state.allows(token) for state in self._states)

    def after(self, token: int) -> State:
        left = [state.after(token) for state in self._states if state.allows(token)]
        return left[0] if len(left) == 1 else Either(left)
