"""What a chat is at any moment, and how it goes on."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mlx_qwen35.commands.chat.clipboard import Clipboard
from mlx_qwen35.commands.chat.reader import Reader
from mlx_qwen35.commands.chat.screen import Screen, statistics
from mlx_qwen35.console.interrupt import uninterrupted
from mlx_qwen35.engine.conversation import Conversation, Turn
from mlx_qwen35.engine.result import Result
from mlx_qwen35.engine.session import Session
from mlx_qwen35.errors import InputError
from mlx_qwen35.media.preprocess import Media, Page

Part = dict[str, Any]


def media_of(parts: Sequence[Part]) -> list[Media]:
    """The images and videos among the parts of a message; the pages of a document are images."""
    return [part[part["type"]] for part in parts if part["type"] != "text"]


class Talk:
    """A conversation, and what goes with its next message.

    media: parts (images, videos, the pages of documents) that go with the next message. session: the file of the
    conversation, if one is open. name: of the model. text: what the next read begins with: a message that is edited,
    or that had no answer. calls: those of the last answer whose results are asked for. last, figures: the last answer,
    and what it took. ended: whether /exit was typed.
    """

    def __init__(
        self,
        conversation: Conversation,
        reader: Reader,
        screen: Screen,
        session: Session | None = None,
        name: str = "",
        clipboard: Clipboard | None = None,
    ):
        self.conversation, self.reader, self.screen, self.session = conversation, reader, screen, session
        self.name, self.clipboard = name, clipboard or Clipboard()
        self.media: list[Part] = []
        self.calls: list[dict[str, Any]] = []
        self.last: Result | None = None
        self.text, self.figures, self.ended = "", "", False
        self._unsaved = False  # at an end that was tried
        self._before: list[Part] | None = None  # the media before the edit that is going on
        self._results: dict[str, Any] = {}  # call id -> content, of the first calls

    def take(self, text: str) -> None:
        """Go on with what the user typed: a message, or the result of a call. If no answer comes of it, it is in the
        input again.
        """
        self.text = text
        content: Any = [*self.media, {"type": "text", "text": text}] if self.media else text
        if self.calls:
            self._take_result(content)
            return
        conversation = self.conversation
        begin = conversation.send if self._before is None else conversation.edit
        if self.show(begin(content)):
            self.media, self._before = [], None

    @property
    def attached(self) -> str:
        """What goes with the next message, in words."""
        counts = Counter("page" if isinstance(item, Page) else item.kind for item in media_of(self.media))
        return ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items())

    def show(self, turn: Turn) -> bool:
        """Answer: run a turn to its end; False where it has no token. Calls in the answer are asked about."""
        if not self.screen.answer(self.conversation, turn) or turn.result is None:
            return False
        self.text, self.last, self.figures = "", turn.result, statistics(turn, turn.result)
        self.ask()
        return True

    # --- tools ---

    def ask(self) -> None:
        """Ask for the results of the calls in the last message, one after another."""
        messages = self.conversation.messages
        if any(message.get("tool_calls") for message in messages) and not self.conversation.options.get("tools"):
            self.screen.note("a session does not keep the functions that were called: /tools FILE gives them again")
        self.calls, self._results = list(messages[-1].get("tool_calls", ())) if messages else [], {}
        self._ask_next()

    def _ask_next(self) -> None:
        if len(self._results) < len(self.calls):
            function = self.calls[len(self._results)]["function"]
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            self.screen.say(f"result of {function['name']}({arguments})? An empty line leaves it open.")

    def _take_result(self, content: Any) -> None:
        call = self.calls[len(self._results)]["id"]
        results = {**self._results, call: content}
        if len(results) == len(self.calls) and not self.show(self.conversation.send_results(results)):
            return
        if len(results) < len(self.calls):
            self._results, self.text = results, ""
            self._ask_next()
        self.media = []

    # --- a message that is edited ---

    def edit(self, text: str, media: list[Part]) -> None:
        """Put a message into the input, its media with those that wait. The next message takes its place."""
        self.text, self._before = text, self.media
        self.media = [*media, *self.media]

    def abandon(self) -> None:
        """Leave an edit, the results of calls, or a message that had no answer. The conversation is as before."""
        if self._before is not None:
            self.media, self._before = self._before, None
            self.screen.say("the message stays as it was")
        if self.calls:
            self.calls = []
            self.screen.say("the calls stay without results")
        self.text = ""

    # --- its file ---

    def write(self, session: Session) -> str:
        """Save a session; a confirmation."""
        with self.screen.step(f"writing {session.path}"):
            nbytes = session.save()
        self._unsaved = False
        return f"saved {session.path}, {nbytes / 1e6:,.1f} MB"

    def open(self, session: Session) -> None:
        """Go on in another session. The one before is let go of as it was saved. Of another conversation no answer is
        known.
        """
        if self.session:
            self.session.close()
        if session.conversation is not self.conversation:
            self.last, self.figures = None, ""
        self.session, self.conversation = session, session.conversation

    def leave(self) -> None:
        """End the chat, what is new in the session saved. Where that fails it goes on, for /save FILE or a further try;
        the second call ends it.
        """
        failed, self._unsaved = self._unsaved, True
        if self.session and self.session.changed and not failed:
            try:
                self.screen.note(self.write(self.session))
            except InputError as error:
                told = f"{error}. The conversation is not saved: /save FILE keeps it elsewhere, a second /exit leaves"
                raise InputError(error.code, told) from error
        self.ended = True

    def release(self) -> None:
        """Save what is new in the session, and let go of it. Where it cannot be saved it stays."""
        if self.session:
            if self.session.changed:
                self.screen.note(self.write(self.session))
            self.session.close()
            self.session = None

    def close(self) -> None:
        """End: save what is new in the session, and let go of it. No signal and no Ctrl-C ends that earlier."""
        with uninterrupted():
            self.conversation.cancel()
            try:
                self.release()
            finally:
                if self.session:
                    self.session.close()
