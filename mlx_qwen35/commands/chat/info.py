"""The command /info: what the chat holds and takes at this moment."""

import mlx.core as mx

from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.commands.chat.settings import changed
from mlx_qwen35.commands.chat.talk import Talk, media_of
from mlx_qwen35.commands.output import media_lines, spread_text


def info(talk: Talk, _: str) -> None:
    conversation = talk.conversation
    model, library = conversation.model, conversation.library
    used = len(conversation.encode(conversation.messages).tokens) if _asked(talk) else 0
    window, snapshots = model.config.max_position_embeddings, library.entries()
    taken = library.nbytes + library.apart(())
    rows = [
        ("model", f"{talk.name}, {dtype_name(model.dtype)}"),
        *(("adapter", f"{conversation.adapter or 'none'}, of {', '.join(model.adapters.names)}")
          for _ in model.adapters.names[:1]),
        *(("machines", spread_text(model).removeprefix("Split: ")) for _ in [model.spread] if model.spread),
        ("context", f"{used:,} of {window:,} tokens, {100 * used / window:.1f} %"),
        ("snapshots", f"{len(snapshots)}, {_megabytes(taken)}"),
        ("memory", f"{_gigabytes(mx.get_active_memory())}, at most so far {_gigabytes(mx.get_peak_memory())}, "
         f"limit {_gigabytes(model.memory_limit)}"),
        ("session", str(talk.session.path) + ", not saved yet" * talk.session.changed if talk.session else "none"),
        *(("attached", line) for line in media_lines(media_of(talk.media))),
        *(("option", f"{name}: {value}") for name, value in changed(talk).items()),
        *(("last answer", part) for part in talk.figures.split("; ") if part),
    ]  # fmt: skip
    width, names = max(len(name) for name, _ in rows), ["", *(name for name, _ in rows)]
    shown = [(name if name != before else "", value) for before, (name, value) in zip(names, rows, strict=False)]
    talk.screen.say("\n".join(f"{name:{width}}  {value}" for name, value in shown))


def _asked(talk: Talk) -> bool:
    """Whether there is a message that makes a prompt."""
    return any(message["role"] == "user" for message in talk.conversation.messages)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
