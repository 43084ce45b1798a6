"""A conversation -> the metadata and the arrays of its file, and back."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.cache import Snapshot
from mlx_qwen35.cache.layer import CachePosition
from mlx_qwen35.cache.prefix_tokens import Prefix, Shown
from mlx_qwen35.cache.session_arrays import misfits, read_places, session_arrays
from mlx_qwen35.cache.session_file import Bytes, SessionFile, Stored
from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.engine.conversation import Conversation
from mlx_qwen35.engine.tool_turns import Message
from mlx_qwen35.errors import InputError
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.model.lora import BASE
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import spelled
from mlx_qwen35.prompt.parts import replace_media
from mlx_qwen35.prompt.positions import Placeholder, positions
from mlx_qwen35.prompt.processor import Processor

SETTINGS = {"dtype": "dtype", "kv_format": "kv_bits", "rope": "rope_scaling"}  # the options of load behind a field
VALUES = ("places", "next_positions", "runs", "system", "messages", "media")  # that are JSON
_SHORT = 60  # characters of a value in an error


def identity(model: Model, processor: Processor) -> dict[str, str]:
    """What a session must have been made with, to be of use."""
    return {
        "fingerprint": model.fingerprint(),
        "dtype": dtype_name(model.dtype),
        "kv_format": model.kv.name,
        "rope": json.dumps(asdict(model.config.rope), sort_keys=True),
        "tokenizer": _sha256(processor.tokenizer.backend.to_str()),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def template_digest(processor: Processor) -> str:
    return _sha256(json.dumps(processor.tokenizer.chat_template))


def check_identity(
    path: object, metadata: Mapping[str, str], model: Model, processor: Processor, adapter: str
) -> None:
    """InputError session_foreign unless a session was made with this model and adapter. A warning tells of another
    template.
    """
    _check_adapter(path, metadata, model, adapter)
    for name, own in identity(model, processor).items():
        if (found := metadata.get(name)) != own:
            mine, its = _apart(own, str(found))
            how = f"Load the model as it was ({spelled(SETTINGS[name])})" if name in SETTINGS else "Take its own model"
            raise InputError(
                "session_foreign",
                f"{path}: {name!r} must be {mine}, as of this model, got {its}. {how}, or begin another file",
            )
    if metadata.get("template") != template_digest(processor):
        warnings.warn(
            f"{path}: 'template' is of another chat template. What this one renders otherwise is read again",
            RuntimeWarning, stacklevel=2,
        )  # fmt: skip


def _check_adapter(path: object, metadata: Mapping[str, str], model: Model, adapter: str) -> None:
    """adapter: that of the conversation, which the session must be of."""
    found = metadata.get("adapter", "")  # which a file of before there were adapters does not have
    if found == model.adapters.fingerprint(adapter):
        return
    known = next((name for name in model.adapters.names if model.adapters.fingerprint(name) == found), "")
    if not found:
        reader, way = "no adapter", f"Go on without one (adapter {BASE})"
    elif known:
        reader, way = known, f"Go on with that adapter ({known})"
    else:
        reader, way = f"one that is not loaded, {found[:12]}", "Load the adapter that it was made with"
    raise InputError(
        "session_foreign",
        f"{path}: 'adapter' must be that of the conversation, {adapter or 'none'}; the session was read by {reader}. "
        f"{way}, or begin another file",
    )


def _apart(one: str, other: str) -> tuple[str, str]:
    """Two texts, short, from a little before where they part."""
    common = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    at = max(0, common - _SHORT // 2)
    before = "..." * bool(at)
    return before + one[at : at + _SHORT], before + other[at : at + _SHORT]


# --- out -------------------------------------------------------------------------------------------------------------


def to_record(conversation: Conversation) -> tuple[dict[str, str], dict[str, Stored]]:
    """Metadata and arrays of a conversation. What is stored of it in its library are places to go on from.

    Raises InputError where a message names an image or video that cannot be read any more.
    """
    model, processor = conversation.model, conversation.processor
    entries = conversation.entries
    places = [entry.snapshot.cache() for entry in entries]
    prefix = entries[-1].prefix if entries else Prefix(np.zeros(0, np.int32))
    media: dict[str, Media] = {}

    def read(message: Message) -> Message:
        if not isinstance(content := message.get("content"), list | tuple):
            return message
        return {**message, "content": processor.read_parts(content, conversation.vision)}

    def numbered(kind: str, part: Mapping[str, Any]) -> dict[str, Any]:
        media.setdefault(part[kind].digest, part[kind])
        return {"type": kind, kind: list(media).index(part[kind].digest)}

    values = {
        "places": [[len(entry.prefix), entry.kind] for entry in entries],
        "next_positions": [place.next_positions[0] for place in places],
        "runs": prefix.media,
        "system": conversation.system or None,
        "messages": replace_media([read(message) for message in conversation.messages], numbered),  # fills media
        "media": [[item.digest, item.times, item.original] for item in media.values()],
    }
    metadata = identity(model, processor) | {"template": template_digest(processor), "program": version("mlx_qwen35")}
    metadata["adapter"] = model.adapters.fingerprint(conversation.adapter)
    arrays: dict[str, Stored] = {"tokens": mx.array(prefix.tokens.astype(np.uint32))}
    arrays |= {f"media.{i}": _pixels(item) for i, item in enumerate(media.values())}
    arrays |= session_arrays(places, model.make_cache())
    return metadata | {name: json.dumps(value) for name, value in values.items()}, arrays


def _pixels(media: Media) -> Bytes:
    """Pixels that are written one image after the other: a page is drawn then."""
    return Bytes(media.shape, lambda: media.pixels)


# --- in --------------------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """What a file holds: system prompt, messages, and what was read of them, as `Conversation.resume` takes it."""

    system: str | None
    messages: list[Message]
    places: list[tuple[Prefix, str, Snapshot]]

    @property
    def tokens(self) -> int:
        """That were read."""
        return len(self.places[-1][0]) if self.places else 0


def read_record(file: SessionFile, model: Model, processor: Processor, adapter: str) -> Record:
    """The content of a session, for a conversation with this adapter. Everything is checked before it is used.

    Raises InputError session_invalid and session_foreign, which name the field.
    """
    header = file.header()
    check_identity(file.path, header.metadata, model, processor, adapter)
    blank = model.make_cache(adapter=adapter)
    try:
        values = {name: json.loads(header.metadata[name]) for name in VALUES}
        media = tuple(Shown(digest, tuple(map(tuple, places))) for digest, places in values["runs"])
        lengths = [length for length, _ in values["places"]]
        following = [_next_position(length, media) for length in lengths]
        if following != values["next_positions"]:
            raise ValueError(f"'next_positions' must be {following}, as its tokens and images have it")
        if wrong := misfits(header.entries, blank, lengths):
            raise ValueError(f"{len(wrong)} tensors do not fit its 'places', as {wrong[0]}")
        spots = [CachePosition((length,), (at,)) for length, at in zip(lengths, following, strict=True)]
        caches, arrays = read_places(file.arrays(), blank, spots)
        shown = [_resized(processor, np.array(arrays[f"media.{i}"]), *own) for i, own in enumerate(values["media"])]
        messages = replace_media(values["messages"], lambda kind, part: {"type": kind, kind: shown[part[kind]]})
        if not isinstance(values["system"], str | None):
            raise ValueError("'system' must be text or null")
        prefix = Prefix(np.array(arrays["tokens"]).astype(np.int32), media, adapter)
        kinds = [kind for _, kind in values["places"]]
        places = [
            (prefix.upto(cache.length), kind, cache.snapshot()) for kind, cache in zip(kinds, caches, strict=True)
        ]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("session_invalid", f"{file.path} must be a session as it was saved: {error}") from error
    return Record(values["system"], messages, places)


def _next_position(length: int, media: Iterable[Shown]) -> int:
    """The position behind so many tokens, of which some show these."""
    placeholders = [Placeholder(*place) for item in media for place in item.places if place[0] < length]
    return int(positions(length, placeholders).max(initial=-1)) + 1


def _resized(
    processor: Processor, pixels: np.ndarray, digest: str, times: list[float], original: list[int]
) -> Media:
    media = processor.resized(pixels, times, (original[0], original[1]))
    if media.digest != digest:
        raise ValueError(f"'media' must have the digest {media.digest}, got {digest}")
    return media
