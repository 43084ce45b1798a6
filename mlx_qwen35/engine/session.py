"""A conversation in a file: what was read stays read when the process ends."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from mlx_qwen35.cache.session_file import SessionFile
from mlx_qwen35.engine.conversation import Conversation
from mlx_qwen35.engine.generation import adapters_of
from mlx_qwen35.engine.options import Options, check_options
from mlx_qwen35.engine.session_record import read_record, to_record
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.process import LOCK
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import spelled
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.values import shown


class Session:
    """A conversation that a file holds: its messages, the pixels of its images and videos, and what was read of it.

    The file belongs to this process until `close`, or the end of a with block.

    conversation: to be used as any other. tokens: those that were read from the file, 0 for a new one. seconds: that
    took.
    """

    def __init__(self, file: SessionFile, conversation: Conversation):
        self.conversation, self.tokens, self.seconds = conversation, 0, 0.0
        self._file, self._saved = file, _state(conversation)

    @classmethod
    def load(cls, path: str | Path, model: Model, processor: Processor, **options: Unpack[Options]) -> "Session":
        """The session in a file, or a new one where there is none.

        options: of the conversation. The file has none of them but the system prompt; one that is given must be its
        own.

        Raises InputError: session_invalid for a file that is no session or is damaged; session_foreign where model,
        dtype, format of keys and values, rotary embedding, tokenizer or adapter are others; session_busy where another
        process has it; option_conflict for another system prompt. The file stays as it is.
        """
        began, given = time.perf_counter(), check_options(options)
        file = SessionFile(path)
        try:
            (adapter,) = adapters_of(given, model, 1)
            record = read_record(file, model, processor, adapter) if file.there else None
            if record:
                given |= _system(record.system, given)
            conversation = Conversation(model, processor, **given)
            if record:
                conversation.resume(record.messages, record.places)
            session = cls(file, conversation)
        except BaseException:
            file.close()
            raise
        if record:
            session.tokens, session.seconds = record.tokens, time.perf_counter() - began
        return session

    def save(self) -> int:
        """Write the conversation as it is, whole or not at all; the bytes of the file. Images and videos that messages
        name and no turn has read are read now.

        Raises InputError: turn_running while a turn runs; disk_full and output_unwritable; those of an image or video
        that cannot be read. Then the old file stays.
        """
        with LOCK:  # no turn starts meanwhile
            if self.conversation.running:
                raise InputError("turn_running", "save() needs the turn to end first; conversation.cancel() ends it")
            nbytes = self._file.write(*to_record(self.conversation))
            self._saved = _state(self.conversation)
        return nbytes

    @property
    def changed(self) -> bool:
        """Whether there is more than was loaded or saved."""
        return self._saved != _state(self.conversation)

    @property
    def path(self) -> Path:
        return self._file.path

    def close(self) -> None:
        """Let go of the file. What was not saved is not in it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _state(conversation: Conversation) -> tuple[Any, ...]:
    return _copy(conversation.messages), conversation.entries, conversation.adapter


def _copy(value: Any) -> Any:
    """The value with lists and mappings of its own, so that a change in place is seen."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _system(own: str | None, given: Options) -> Options:
    """The system prompt of a session, as an option. InputError where another one is given."""
    wanted = given.get("system_prompt", own)
    if (wanted or None) != own:
        raise InputError(
            "option_conflict",
            f"{spelled('system_prompt')} must be the session's own, {shown(own)}, got {shown(wanted)}. Leave it out "
            "or begin another file",
        )
    return {"system_prompt": own} if own else {}
