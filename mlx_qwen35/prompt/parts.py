"""Images, videos and PDFs among the parts of messages: the source and the options that each part names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.values import shown

# Where a part may name its source, and which options it may set for itself.
_SOURCES = {
    "image": ("image", "image_url", "url", "path", "base64"),
    "video": ("video", "video_url", "url", "path"),
    "pdf": ("pdf", "pdf_url", "url", "path", "base64"),
}
_OPTIONS = {
    "image": {"min_pixels": "min_pixels", "max_pixels": "max_pixels"},
    "video": {
        "fps": "fps", "num_frames": "video_num_frames", "total_pixels": "video_total_pixels",
        "source_fps": "source_fps",
    },
    "pdf": {"pages": "pages", "dpi": "dpi", "min_pixels": "min_pixels", "max_pixels": "max_pixels"},
}  # fmt: skip

Reader = Callable[[str, Any, VisionOptions], Media]  # kind, source, options
Opener = Callable[[Mapping[str, Any], VisionOptions], list[dict[str, Any]]]  # of a PDF; its pages as texts and images


def kind_of(part: Any) -> str | None:
    """ "image", "video" or "pdf", None for any other part."""
    if not isinstance(part, Mapping):
        return None
    names = [*part, part.get("type")]
    kinds = [kind for kind in _SOURCES if kind in names or f"{kind}_url" in names]
    if len(kinds) > 1:
        raise _refused(f"a part must be an image, a video or a PDF alone; got one with {', '.join(map(shown, part))}")
    return kinds[0] if kinds else None


def take_media(
    messages: Sequence[dict[str, Any]], read: Reader, options: VisionOptions
) -> tuple[list[dict[str, Any]], list[Media]]:
    """Read the images and videos of checked messages, in order; their parts become bare ones for the template."""
    media: list[Media] = []

    def bare(kind: str, part: Mapping[str, Any]) -> dict[str, Any]:
        media.append(_read_part(kind, part, read, options))
        return {"type": kind}

    return replace_media(messages, bare), media


def without_media(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages with bare parts for images and videos, and nothing is read."""
    return replace_media(messages, lambda kind, part: {"type": kind})


def read_parts(parts: Sequence[Any], read: Reader, pages: Opener, options: VisionOptions) -> list[Any]:
    """The parts of one message with their images, videos and PDFs read, so that they no longer depend on files."""
    if not isinstance(parts, list | tuple):
        raise InputError(
            "messages_invalid", f"the content of a message must be text or a list of parts, got {type(parts).__name__}"
        )
    whole = _with_pages(parts, pages, options)
    return _replaced(whole, lambda kind, part: {"type": kind, kind: _read_part(kind, part, read, options)})


def with_pages(messages: Sequence[dict[str, Any]], pages: Opener, options: VisionOptions) -> list[dict[str, Any]]:
    """Checked messages with its pages in the place of each PDF."""
    return [
        {**message, "content": _with_pages(message["content"], pages, options)}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _with_pages(parts: Sequence[Any], pages: Opener, options: VisionOptions) -> list[Any]:
    return [new for part in parts for new in (pages(part, options) if kind_of(part) == "pdf" else [part])]


Replace = Callable[[str, Mapping[str, Any]], dict[str, Any]]  # kind, part -> another part


def replace_media(messages: Sequence[dict[str, Any]], new: Replace) -> list[dict[str, Any]]:
    """The messages with another part in the place of each image and video."""
    return [
        {**message, "content": _replaced(message["content"], new)}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _replaced(parts: Sequence[Any], new: Replace) -> list[Any]:
    return [new(kind, part) if (kind := kind_of(part)) else part for part in parts]


def _read_part(kind: str, part: Mapping[str, Any], read: Reader, options: VisionOptions) -> Media:
    source, own = source_of(kind, part)
    if isinstance(source, Media):
        if own:
            raise InputError("option_no_effect", f"this {kind} was read before; {', '.join(own)} would have no effect")
        if source.kind != kind:
            raise _refused(f"a part of type {kind} must hold one, got {source}")
        return source
    for one, other in (("fps", "video_num_frames"), ("video_num_frames", "fps")):
        if one in own and other not in own:  # the part's choice replaces the general one
            own[other] = None
    return read(kind, source, replace(options, **own))


def source_of(kind: str, part: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The one source that a part names, and the options that it sets for itself."""
    named = [name for name in _SOURCES[kind] if part.get(name) is not None]
    if len(named) != 1:
        raise _refused(
            f"a part of type {kind} must name its source once, as {', '.join(_SOURCES[kind])}; got "
            f"{' and '.join(named) or 'none of them'}"
        )
    if unknown := [shown(name) for name in part if name not in ("type", *named, *_OPTIONS[kind])]:
        raise _refused(
            f"a part of type {kind} may hold its source and {', '.join(_OPTIONS[kind])}; got {', '.join(unknown)}"
        )
    source = part[named[0]]
    if isinstance(source, Mapping):  # {"image_url": {"url": ...}}
        if set(source) - {"detail"} != {"url"} or source.get("detail", "auto") != "auto":
            raise _refused(f"{named[0]} must hold a url alone, got {', '.join(map(shown, source))}")
        source = source["url"]
    source = f"data:;base64,{source}" if named[0] == "base64" else source
    return source, {option: part[name] for name, option in _OPTIONS[kind].items() if part.get(name) is not None}


def _refused(message: str) -> InputError:
    return InputError("message_part_invalid", message)
