"""One turn of a conversation: the user's message, or results of calls, and the answer."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.result import Result
from mlx_qwen35.engine.sequence import Sequence as Request
from mlx_qwen35.engine.tool_turns import Message
from mlx_qwen35.machine.process import LOCK
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.piece import Piece


class Begun(NamedTuple):
    """A turn that has started."""

    request: Request
    messages: list[Message]  # of its prompt


class Holder(Protocol):
    """The conversation of a turn."""

    model: Model

    def begin(self, turn: "Turn") -> Begun:
        """Prepare the answer to a turn's messages, behind the turns so far."""

    def end(self, turn: "Turn", begun: Begun) -> None:
        """Take in what has come of a turn."""


class Turn:
    """A message, or results of calls, and the answer, from `Conversation.send` and `send_results`.

    Nothing happens before the first piece, the text or the end is asked for: then the turn starts, and takes its place
    behind the turns that started before. A turn that never starts leaves no trace. The start of a turn ends another
    one that runs. A turn that is left early, cancelled or ended so keeps the answer as far as it came; if that has no
    token, the conversation is as before. After an error it is as before, too, or has the answer up to the error.

    progress, media_progress: called as those of `Options` are.

    Any thread may go on with a turn.
    """

    def __init__(
        self,
        conversation: Holder,
        messages: list[Message],
        progress: Callable[[int, int], None],
        replaces: str = "",
        seed: int | None = None,
    ):
        """replaces: "user" or "assistant", whose last message these take the place of, and of what came behind it; "":
        they go behind the others. seed: None: the options'.
        """
        self.messages, self.replaces, self.seed = messages, replaces, seed
        self._conversation, self.progress = conversation, progress
        self.media_progress: Callable[[int, int], object] = lambda done, total: None
        self._engine = Engine(conversation.model)
        self._begun: Begun | None = None
        self._ended = False
        self._prefilled = 0
        self._waiting: deque[Piece] = deque()
        self.pieces: list[Piece] = []  # that were given out

    def __iter__(self) -> Iterator[Piece]:
        """The pieces of the answer that are still to come. Leaving the iteration early cancels the turn."""
        try:
            while (piece := self._next()) is not None:
                yield piece
        finally:
            self.cancel()

    def __next__(self) -> Piece:
        piece = self._next()
        if piece is None:
            raise StopIteration
        return piece

    @property
    def text(self) -> str:
        """The answer, generated to its end first. Of a turn that was cancelled, left early or ended by the start of
        another it is what had come by then: `result.finish_reason` tells.
        """
        for _ in self:
            pass
        return self.result.text if self.result is not None else ""

    @property
    def result(self) -> Result | None:
        """What it has come to, at any time; None before it starts."""
        return self._begun.request.result() if self._begun else None

    @property
    def reused(self) -> int:
        """Tokens of its prompt that were in the library already; 0 before it starts."""
        return self._begun.request.cached if self._begun else 0

    @property
    def total(self) -> int:
        """Tokens of its prompt; 0 before it starts."""
        return len(self._begun.request.prompt.tokens) if self._begun else 0

    @property
    def limit(self) -> int:
        """Most tokens of its answer; 0 before it starts."""
        return self._begun.request.limit if self._begun else 0

    @property
    def prefill_seconds(self) -> float:
        """Seconds to the first token; 0 before it."""
        clock = self._begun.request.clock if self._begun else None
        return clock.vision + clock.first - clock.began if clock and clock.first else 0.0

    def cancel(self) -> None:
        """End it with the answer as far as it came. A turn that has not started never will."""
        with LOCK:
            if self._ended:
                return
            self._ended = True
            if self._begun:
                self._engine.cancel(self._begun.request)
                self._conversation.end(self, self._begun)

    def count(self, tokens: int) -> None:
        """So many more tokens of its prompt are prefilled."""
        self._prefilled += tokens
        self.progress(self._prefilled, self.total - self.reused)

    def _next(self) -> Piece | None:
        """The next piece; None behind the last."""
        with LOCK:
            return self._step()

    def _step(self) -> Piece | None:
        while not self._waiting:
            if self._ended:
                return None
            if self._begun is None:
                begun = self._conversation.begin(self)
                self._engine.add(begun.request)
                self._begun = begun
            request = self._begun.request
            try:
                self._engine.step()
            except BaseException:
                self.cancel()
                raise
            self._waiting.extend(request.pieces())
            if request.finished:
                self.cancel()
                if request.error:
                    raise request.error
        self.pieces.append(self._waiting.popleft())
        return self.pieces[-1]
