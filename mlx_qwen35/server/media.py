"""Images, videos and PDFs of requests: data: URIs, and http(s) URLs of the public internet where the server may follow
them.

A path never reaches the disk: what is neither is refused before the library, which reads files, sees it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.fetch import is_remote
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.options import ServerOptions

LEAST_SIDE = 2  # pixels; a single one is a counter of a web page, or an attempt to break the server
# What a client is told in place of the library's words, which may tell where in this network a name leads.
_TOLD = {
    "url_refused": "must lead into the public internet, by http or https alone; this URL, or what it leads on to, "
    "does not. Send a data: URI",
    "fetch_failed": "must be a URL whose server delivers the whole file; this one did not. Send a data: URI",
    "fetch_timeout": "must be a URL whose server delivers in time; this one did not. Send a data: URI",
}


def read_media(processor: Processor, kind: str, url: Any, place: str, options: ServerOptions, **vision: Any) -> Media:
    """The image or video behind a URL of a request. For `off_loop`: it decodes, and may wait for other servers.

    Args:
        kind: "image" or "video".
        url: as the client sent it.
        place: the field that holds it, as "messages.0.content.1.image_url.url".
        vision: fields of VisionOptions that the client has set.

    Raises ApiError 400 with the place.
    """
    with _told(url, place, options):
        media = processor.read(kind, url, VisionOptions(**vision))
    if min(media.original) < LEAST_SIDE:
        height, width = media.original
        rule = f"{place} must have at least {LEAST_SIDE} pixels on each side; it is {width} x {height}"
        raise ApiError(400, "media_too_small", rule, place)
    return media


def read_pages(processor: Processor, url: Any, place: str, options: ServerOptions) -> list[dict[str, Any]]:
    """The pages of the PDF behind a URL, or in base64, as parts of a message. For `off_loop`, as `read_media`.

    They hold their pixels: the engine's thread draws none, which may take its time.
    """
    if isinstance(url, str) and not is_remote(url):
        url = f"data:application/pdf;base64,{url}"
    with _told(url, place, options):
        parts = processor.read_parts([{"type": "pdf", "pdf": url}], VisionOptions())
        return [part if part["type"] == "text" else {**part, "image": part["image"].held()} for part in parts]


@contextmanager
def _told(url: Any, place: str, options: ServerOptions) -> Iterator[None]:
    """The block reads what is behind a URL of a request, if it may; its errors name the place."""
    if not isinstance(url, str) or not is_remote(url):
        raise ApiError(400, "media_source_invalid", f"{place} must be a data: URI{_or_url(options)}", place)
    if not options.fetch_media and url[:5].lower() != "data:":
        wants = "this server follows no URLs (--fetch-media would let it)"
        raise ApiError(400, "url_refused", f"{place} must be a data: URI: {wants}", place)
    try:
        yield
    except InputError as error:
        if error.code in _TOLD:
            raise ApiError(400, error.code, f"{place} {_TOLD[error.code]}", place) from None
        raise ApiError.of(error, place) from None


def _or_url(options: ServerOptions) -> str:
    return " or an http(s) URL" if options.fetch_media else ""
