"""Commands on the file of a conversation: /save and /load."""

from pathlib import Path
from typing import Any

from mlx_qwen35.cache.session_file import SessionFile
from mlx_qwen35.commands.chat.attach import one_name
from mlx_qwen35.commands.chat.talk import Talk
from mlx_qwen35.commands.chat.turns import shortened, text_and_media
from mlx_qwen35.engine.session import Session
from mlx_qwen35.errors import InputError


def save(talk: Talk, argument: str) -> None:
    """Write the session that is open; with a name, begin a file that is the session from then on."""
    path = Path(one_name(argument)).expanduser() if argument else None
    if path is None and talk.session is None:
        raise InputError("option_missing", "/save must name a file: no session is open")
    if talk.session and (path is None or path.resolve() == talk.session.path):
        talk.screen.say(talk.write(talk.session))
        return
    assert path is not None
    file = SessionFile(path)
    try:
        if file.there:
            file.header()  # refuses a file that is no session
            raise InputError("output_unwritable", f"{path} is a session already: /load opens it, or name another file")
        session = Session(file, talk.conversation)
        talk.screen.say(talk.write(session))
    except BaseException:
        file.close()
        raise
    if talk.session:
        talk.screen.say(f"{talk.session.path} stays as it was saved last")
    talk.open(session)


def load(talk: Talk, argument: str) -> None:
    """Go on with the conversation in a file. The present one is saved before, or stays where it is in no file."""
    if not argument:
        raise InputError("option_missing", "/load must name the file of a session")
    path = Path(one_name(argument)).expanduser()
    if _is_open(talk, path):
        raise InputError("option_conflict", f"{path} is the session that is open")
    if not path.exists():
        raise InputError("session_invalid", f"/load must name the file of a session; there is no file {path}")
    conversation = talk.conversation
    if talk.session is None and any(message["role"] == "user" for message in conversation.messages):
        raise InputError("option_conflict", "this conversation is in no file: /save FILE keeps it, /reset forgets it")
    if talk.session and talk.session.changed:
        talk.screen.note(talk.write(talk.session))
    options: dict[str, Any] = {"library": conversation.library, **conversation.options}
    options.pop("system_prompt", None)  # a session has its own
    with talk.screen.step(f"reading {path}"):
        session = Session.load(path, conversation.model, conversation.processor, **options)
    talk.abandon()
    talk.open(session)
    asked = [message for message in session.conversation.messages if message["role"] == "user"]
    last = f", the last {shortened(text_and_media(asked[-1])[0])}" if asked else ""
    talk.screen.say(
        f"{path}: {len(asked)} question{'s' * (len(asked) != 1)}{last}; {session.tokens:,} tokens in "
        f"{session.seconds:.2f} s"
    )
    talk.ask()


def _is_open(talk: Talk, path: Path) -> bool:
    return talk.session is not None and path.resolve() == talk.session.path
