"""Messages typed on a terminal: several lines, history, completion. prompt_toolkit is imported here alone."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import AnyFormattedText
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import TabsProcessor
from prompt_toolkit.output import create_output

from mlx_qwen35.commands.chat.orders import Order
from mlx_qwen35.commands.chat.reader import block_open, unblocked

HINT, LEAVING = "Send a message (/help for commands)", "Ctrl-D or /exit leaves"


class TerminalReader:
    """The prompt >>>. Enter sends, Alt-Enter begins a new line, and a paste is one message, however many lines it has.

    Ctrl-C clears what is typed, Ctrl-D on an empty line ends. The arrows go through the history, Ctrl-R searches it.
    """

    def __init__(self, orders: Sequence[Order], output: TextIO):
        """orders: what is completed. output: the terminal, standard output or standard error."""
        self._history = _History()
        self._hint, self._told, self._given = HINT, False, False  # given: whether a text was there from the start
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation="... ",
            history=self._history,
            completer=_Commands(orders),
            complete_in_thread=True,
            complete_while_typing=Condition(lambda: self._session.default_buffer.text.startswith("/")),
            placeholder=self._placeholder,
            input_processors=[TabsProcessor(char1=" ", char2=" ")],
            key_bindings=self._keys(),
            enable_suspend=True,
            output=create_output(output),
        )

    def read(self, text: str = "", attached: str = "") -> str | None:
        above = [("dim", f"with {attached}\n")] if attached else []
        self._hint, self._given = HINT, bool(text)
        if self._history.failure and not self._told:
            self._told = True
            print(f"the history is not kept: {self._history.failure}", file=sys.stderr, flush=True)
        try:
            return unblocked(self._session.prompt([*above, ("bold", ">>> ")], default=text).strip())
        except EOFError:
            return None

    def _placeholder(self) -> AnyFormattedText:
        app = self._session.app
        return [] if app.is_done or app.layout.is_searching else [("dim", self._hint)]

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        typing = has_focus(DEFAULT_BUFFER)

        @keys.add("enter", filter=typing)
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.complete_state and buffer.complete_state.current_completion:
                buffer.complete_state = None
            elif block_open(buffer.text):
                buffer.newline(copy_margin=False)
            else:
                buffer.validate_and_handle()  # an empty line too: it leaves an edit

        @keys.add("escape", "enter", filter=typing)
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.newline(copy_margin=False)

        @keys.add("c-c", filter=typing)
        @keys.add("<sigint>")
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if not buffer.text:
                self._hint = LEAVING
            buffer.save_to_undo_stack()
            buffer.text = ""
            if self._given:
                buffer.validate_and_handle()

        return keys


class _Commands(Completer):
    """Completes commands, and file names behind those that take one."""

    def __init__(self, orders: Sequence[Order]):
        self._orders, self._paths = orders, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, blank, argument = text[1:].partition(" ")
        for order in self._orders:
            if not blank and order.name.startswith(name):
                word = f"{order.name} " if order.argument else order.name
                yield Completion(word, -len(name), display=f"/{order.name}", display_meta=order.help)
            elif blank and order.name == name:
                before, _, word = argument.rpartition(" ")
                yield from (Completion(own, -len(word)) for own in order.choices(before) if own.startswith(word))
                if order.path:
                    yield from self._paths.get_completions(Document(argument), complete_event)


class _History(FileHistory):
    """The messages of this and earlier sessions, in a file that its owner alone may read.

    failure: why the file cannot be used, if so; then the history is that of this session.
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None
        super().__init__("")
        self._try(lambda: ())

    def load_history_strings(self) -> Iterable[str]:
        return self._try(super().load_history_strings)

    def store_string(self, string: str) -> None:
        store = super().store_string
        self._try(lambda: store(string) or ())

    def _try(self, use: Callable[[], Iterable[str]]) -> Iterable[str]:
        """Use the file, which is made where it is absent; nothing, where that fails."""
        try:
            state = Path(os.environ.get("XDG_STATE_HOME", ""))
            folder = (state if state.is_absolute() else Path("~/.local/state").expanduser()) / "mlx_qwen35"
            folder.mkdir(parents=True, exist_ok=True)
            self.filename = str(folder / "chat_history")
            os.close(os.open(self.filename, os.O_RDWR | os.O_CREAT, 0o600))
            return use()
        except (OSError, RuntimeError) as error:  # what cannot be written, a home that is none
            self.failure = error
            return ()
