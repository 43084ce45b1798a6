"""The option --session of generate and chat: what was loaded and saved is told on standard error."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_qwen35.cache.session_file import SessionFile
from mlx_qwen35.console.interrupt import uninterrupted, unwound_when_ended
from mlx_qwen35.console.notices import tell
from mlx_qwen35.console.progress import Step
from mlx_qwen35.engine.conversation import Conversation, Turn
from mlx_qwen35.engine.session import Session
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Processor

NO_SESSION = "what was read is on several machines, and what is saved would be the part of one"


def check_session(path: Path) -> None:
    """Refuse a file that is no session, or in use, before the model is loaded."""
    file = SessionFile(path)
    try:
        if file.there:
            file.header()
    finally:
        file.close()


def open_session(path: Path, model: Model, processor: Processor, options: Mapping[str, Any]) -> Session:
    """The session in this file, or a new one."""
    with Step(f"reading {path}"):
        session = Session.load(path, model, processor, **options)
    if session.tokens:
        tell(f"{session.tokens:,} tokens from {path} in {session.seconds:.2f} s")
    return session


@contextmanager
def opened(path: Path, model: Model, processor: Processor, options: Mapping[str, Any]) -> Iterator[Session]:
    """The same. However the block ends, what is new in it is saved, and the file let go of."""
    with open_session(path, model, processor, options) as session, unwound_when_ended():
        try:
            yield session
        finally:
            with uninterrupted():
                session.conversation.cancel()
                if session.changed:
                    save(session)


def save(session: Session) -> None:
    with Step(f"writing {session.path}"):
        nbytes = session.save()
    tell(f"saved {session.path}, {nbytes / 1e6:,.1f} MB")


def tell_interrupted(conversation: Conversation, turn: Turn) -> None:
    """Say what is kept of a turn that was interrupted."""
    told = ""
    if turn.result is not None and turn.result.tokens:
        told = "the answer is kept as far as it came"
    elif turn.result is not None:
        kept = max((len(entry.prefix) for entry in conversation.entries), default=0)
        told = f"{kept:,} of {turn.total:,} prompt tokens are read and kept: the same message goes on from there"
    tell(f"interrupted; {told}" if told else "interrupted")
