"""Images and clips among the parts of messages: what each names, and how the text around them stays text."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.prompt.control import marked, unmarked
from mlx_qwen35.values import shown

PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
IMAGE_PAD, VIDEO_PAD = map(marked, PADS.values())  # one that bears no mark is a user's text
_START, _END = marked("<|vision_start|>"), marked("<|vision_end|>")
_PLACES = re.compile("|".join(map(re.escape, (_START + VIDEO_PAD + _END, VIDEO_PAD, IMAGE_PAD))))

# Where a part may name its source, and which options it may set for itself.
_SOURCES = {"image": ("image", "image_url", "url", "path", "base64"), "video": ("video", "video_url", "url", "path")}
_OPTIONS = {
    "image": {"min_pixels": "min_pixels", "max_pixels": "max_pixels"},
    "video": {
        "fps": "fps", "num_frames": "video_num_frames", "total_pixels": "video_total_pixels",
        "source_fps": "source_fps",
    },
}  # fmt: skip

Reader = Callable[[str, Any, VisionOptions], Media]  # kind, source, options


def kind_of(part: Any) -> str | None:
    """ "image" or "video" as the chat template tells them, None for any other part."""
    if not isinstance(part, Mapping):
        return None
    names = [*part, part.get("type")]
    kinds = [kind for kind in ("image", "video") if kind in names or f"{kind}_url" in names]
    if len(kinds) == 2:
        raise InputError(
            "message_part_invalid",
            f"a part must be an image or a video, not both; got one with {', '.join(map(shown, part))}",
        )
    return kinds[0] if kinds else None


def take_media(
    messages: Sequence[Mapping[str, Any]], read: Reader, options: VisionOptions
) -> tuple[list[dict[str, Any]], list[Media]]:
    """Checked messages with bare parts for the template in the place of images and clips, and those, read, in order."""
    media: list[Media] = []
    bare = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            message = {**message, "content": [_bare(part, read, options, media) for part in content]}
        bare.append(message)
    return bare, media


def without_media(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same, and nothing is read."""
    return [
        {**message, "content": [{"type": kind_of(part)} if kind_of(part) else part for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def read_parts(parts: Sequence[Any], read: Reader, options: VisionOptions) -> list[Any]:
    """The parts of one message with images and clips read: what becomes of their files no longer matters."""
    if not isinstance(parts, list | tuple):
        raise InputError(
            "messages_invalid", f"the content of a message must be text or a list of parts, got {type(parts).__name__}"
        )
    done = []
    for part in parts:
        kind = kind_of(part)
        done.append({"type": kind, kind: read_part(kind, part, read, options)} if kind else part)
    return done


def _bare(part: Any, read: Reader, options: VisionOptions, media: list[Media]) -> Any:
    kind = kind_of(part)
    if kind is None:
        return part
    media.append(read_part(kind, part, read, options))
    return {"type": kind}


def read_part(kind: str, part: Mapping[str, Any], read: Reader, options: VisionOptions) -> Media:
    named = [name for name in _SOURCES[kind] if part.get(name) is not None]
    if len(named) != 1:
        raise InputError(
            "message_part_invalid",
            f"a part of type {kind} must name its source once, as {', '.join(_SOURCES[kind])}; got "
            f"{' and '.join(named) or 'none of them'}",
        )
    if unknown := [shown(name) for name in part if name not in ("type", *named, *_OPTIONS[kind])]:
        raise InputError(
            "message_part_invalid",
            f"a part of type {kind} may hold its source and {', '.join(_OPTIONS[kind])}; got {', '.join(unknown)}",
        )
    source = part[named[0]]
    if isinstance(source, Mapping):  # {"image_url": {"url": ...}}
        if set(source) - {"detail"} != {"url"} or source.get("detail", "auto") != "auto":
            raise InputError(
                "message_part_invalid", f"{named[0]} must hold a url alone, got {', '.join(map(shown, source))}"
            )
        source = source["url"]
    source = f"data:;base64,{source}" if named[0] == "base64" else source
    own = {option: part[name] for name, option in _OPTIONS[kind].items() if part.get(name) is not None}
    if isinstance(source, Media):
        if own:
            raise InputError("option_no_effect", f"this {kind} was read before; {', '.join(own)} would have no effect")
        if source.is_clip != (kind == "video"):
            raise InputError("message_part_invalid", f"a part of type {kind} must hold one, got {source}")
        return source
    for one, other in (("fps", "video_num_frames"), ("video_num_frames", "fps")):
        if one in own and other not in own:  # the part's choice replaces the general one
            own[other] = None
    return read(kind, source, replace(options, **own))


# --- placeholders ----------------------------------------------------------------------------------------------------


def in_order(text: str, media: Sequence[Media]) -> list[Media]:
    """Images and clips in the order of their placeholders in a text. InputError unless there are as many of each."""
    kinds = {IMAGE_PAD: [m for m in media if not m.is_clip], VIDEO_PAD: [m for m in media if m.is_clip]}
    found = [IMAGE_PAD if match == IMAGE_PAD else VIDEO_PAD for match in _PLACES.findall(text)]
    for pad, given in kinds.items():
        if found.count(pad) != len(given):
            kind = "images" if pad == IMAGE_PAD else "videos"
            raise InputError(
                "placeholders_mismatch",
                f"there must be one {unmarked(pad)} for each of the {kind}; got {found.count(pad)} and {len(given)}",
            )
    queues = {pad: iter(given) for pad, given in kinds.items()}
    return [next(queues[pad]) for pad in found]


def spread_clips(text: str, media: Sequence[Media], outer_tags: bool) -> str:
    """The text with the placeholder of each clip made one for each pair of its frames, with the time before it.

    media: images and clips in the order of their placeholders. <|vision_start|><|video_pad|><|vision_end|> becomes
    <0.3 seconds><|vision_start|><|video_pad|><|vision_end|><1.3 seconds>..., inside the outer tags with outer_tags.
    """
    queue = iter(media)

    def groups(match: re.Match) -> str:
        item, place = next(queue), match.group()
        if place == IMAGE_PAD:
            return place
        inner = "".join(f"<{seconds:.1f} seconds>{_START}{VIDEO_PAD}{_END}" for seconds in item.times)
        return f"{_START}{inner}{_END}" if outer_tags and place != VIDEO_PAD else inner

    return _PLACES.sub(groups, text)
