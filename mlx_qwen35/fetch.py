"""URL -> bytes: http and https with limits of time and size, and data: URIs. Standard library only.

A picture or a clip that comes over the network is checked before it is decoded: where the server leads, what it says
it sends, how much of it, how long it takes, and whether all of it came.
"""

import base64
import binascii
import http.client
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import quote, unquote_to_bytes

from mlx_qwen35.errors import InputError

CONNECT_SECONDS = 20.0  # for the connection, and for each wait for more of the answer
DEADLINE_SECONDS = {"image": 60.0, "video": 900.0}  # for everything: names, redirects, headers and body
MAX_BYTES = {"image": 64_000_000, "video": 2_000_000_000}
_HTTP = ("http://", "https://")
_UNSAID = ("", "application/octet-stream", "binary/octet-stream")  # the last is what S3 says of what it does not know
_ALSO = {"image": (), "video": ("image/gif",)}  # a GIF is a clip too
_SLICE = 1 << 20
_SHOWN = 200  # characters of a name in a message


def is_remote(source: str) -> bool:
    """Whether a source is a http, https or data: URL, and not a path."""
    return source[:8].lower().startswith((*_HTTP, "data:"))


def fetch(source: str, kind: str) -> bytes:
    """The bytes behind a URL for which is_remote is true.

    Args:
        source: an http or https URL, or a data: URI (base64 or percent-encoded).
        kind: "image" or "video": chooses the limits and the media types that are accepted. A type that is absent, or
            application/octet-stream, is accepted for both.

    Raises InputError when the host cannot be reached, answers with another status than success, takes too long, sends
    too much, too little or another type, leads away from http and https; or when the data: URI is malformed.
    """
    if source[:5].lower() == "data:":
        return _decode(source, kind)
    return _before_deadline(source, kind)


def name_of(source: str) -> str:
    """How messages call a path, URL or data: URI: short, even where the source holds megabytes."""
    if source[:5].lower() == "data:":
        return f"a data: URI of {len(source):,} characters ({_short(source.partition(',')[0], 60)})"
    return _short(source, _SHOWN)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _check_type(media: str, kind: str, name: str) -> None:
    """`media`: a Content-Type, parameters and all."""
    media = media.partition(";")[0].strip().lower()
    if media in _UNSAID or media.startswith(f"{kind}/") or media in _ALSO[kind]:
        return
    if media in ("text/html", "application/xhtml+xml"):
        raise InputError(
            "media_type_wrong",
            f"the address of {_article(kind)} must lead to the file itself; {name} is a web page ({media}) and not "
            f"{_article(kind)}. Open it in a browser and copy the address of the {kind}",
        )
    other = media.partition("/")[0]
    hint = f"Give it as {_article(other)}" if other in MAX_BYTES else f"Give the address of {_article(kind)}"
    raise InputError(
        "media_type_wrong",
        f"the media type of {_article(kind)} must be {kind}/...; {name} says {_short(media, 60)}. {hint}",
    )


def _article(kind: str) -> str:
    return {"image": "an image", "video": "a video"}[kind]


def _check_length(length: int, kind: str, name: str, at_least: str = "") -> None:
    if length > MAX_BYTES[kind]:
        raise InputError(
            "media_too_large",
            f"{_article(kind)} may have at most {MAX_BYTES[kind]:,} bytes (MAX_BYTES of mlx_qwen35.fetch); {name} has "
            f"{at_least}{length:,}. Make it smaller, or save it to a file and give its path",
        )


# --- data: URIs ---


def _decode(source: str, kind: str) -> bytes:
    name = name_of(source)
    header, comma, body = source[5:].partition(",")
    if not comma:
        raise InputError(
            "data_uri_invalid", f"a data: URI must be data:[type][;base64],data; {name} has no comma. Write it so"
        )
    media, *parameters = header.split(";")
    _check_type(media, kind, name)
    try:
        data = unquote_to_bytes(body) if "%" in body else body.encode("ascii")
        if parameters and parameters[-1].strip().lower() == "base64":
            data = b"".join(data.split())
            data = base64.b64decode(data + b"=" * (-len(data) % 4 if b"=" not in data else 0), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        reason = "it holds characters that are not ASCII" if isinstance(error, UnicodeEncodeError) else str(error)
        raise InputError(
            "data_uri_invalid",
            f"the data of a data: URI must be whole base64 or percent-encoded bytes; {name} is not: {reason}. "
            "Encode it again",
        ) from error
    _check_length(len(data), kind, name)
    return data


# --- http and https ---


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https alone."""

    def http_error_302(self, request, answer, code, message, headers):
        target = headers.get("location") or headers.get("uri") or ""
        scheme, colon, _ = target.partition(":")
        if colon and "/" not in scheme and scheme.lower() not in ("http", "https"):
            answer.close()
            raise InputError(
                "url_refused",
                f"an address may lead on to http and https alone; {name_of(request.full_url)} leads to "
                f"{name_of(target)}. Give the address of the file itself",
            )
        return super().http_error_302(request, answer, code, message, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _opener() -> urllib.request.OpenerDirector:
    """An opener that knows http and https and nothing else: no files, no ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _Redirects,
    ):
        opener.add_handler(handler())
    return opener


def _before_deadline(source: str, kind: str) -> bytes:
    """_download in a thread of its own, so that a name server or a trickle of headers cannot hold the caller."""
    outcome: list[bytes | InputError] = []
    end = time.monotonic() + DEADLINE_SECONDS[kind]

    def work() -> None:
        try:
            outcome.append(_download(source, kind, end))
        except InputError as error:
            outcome.append(error)

    thread = threading.Thread(target=work, name="fetch", daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS[kind])
    if thread.is_alive():
        raise _late(source, kind)
    assert outcome, "the thread failed; its traceback is above"
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def _late(source: str, kind: str) -> InputError:
    return InputError(
        "fetch_timeout",
        f"{_article(kind)} must arrive within {DEADLINE_SECONDS[kind]:g} seconds (DEADLINE_SECONDS of "
        f"mlx_qwen35.fetch); {name_of(source)} took longer. Try again, or save it to a file and give its path",
    )


def _download(source: str, kind: str, end: float) -> bytes:
    name = name_of(source)
    url = quote(source, safe="!#$%&'()*+,/:;=?@[]~")  # spaces and letters beyond ASCII
    headers = {"User-Agent": "mlx-qwen35", "Accept": f"{kind}/*, */*;q=0.5"}
    try:
        request = urllib.request.Request(url, headers=headers)
        with _opener().open(request, timeout=CONNECT_SECONDS) as answer:
            _check_type(answer.headers.get("Content-Type", ""), kind, name)
            return _read(answer, source, kind, end)
    except urllib.error.HTTPError as error:
        error.close()
        raise InputError(
            "fetch_failed",
            f"a server must answer with the file; for {name} it answered {error.code} {error.reason}. "
            "Look whether the address is right and open to everyone",
        ) from error
    except InputError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _unreached(error, name) from error


def _unreached(error: OSError | ValueError | http.client.HTTPException, name: str) -> InputError:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return InputError(
            "fetch_timeout",
            f"a server must send something every {CONNECT_SECONDS:g} seconds (CONNECT_SECONDS of mlx_qwen35.fetch); "
            f"that of {name} did not. Try again, or save the file and give its path",
        )
    if isinstance(error, (urllib.error.URLError, http.client.InvalidURL, ValueError)):
        return InputError(
            "fetch_failed",
            f"the host of an address must be reachable; that of {name} is not: {reason}. "
            "Look at the address and at the network",
        )
    return InputError(
        "fetch_failed",
        f"a file must arrive whole; the server broke off the connection for {name} "
        f"({type(error).__name__}: {error}). Try again",
    )


def _read(answer: http.client.HTTPResponse, source: str, kind: str, end: float) -> bytes:
    name = name_of(source)
    said = answer.headers.get("Content-Length", "")
    expected = int(said) if said.isdecimal() and not answer.headers.get("Transfer-Encoding") else None
    if expected is not None:
        _check_length(expected, kind, name)
    data = bytearray()
    while piece := answer.read1(_SLICE):
        data += piece
        _check_length(len(data), kind, name, at_least="at least ")
        if time.monotonic() > end:
            raise _late(source, kind)
    if expected is not None and len(data) < expected:
        raise InputError(
            "fetch_failed",
            f"a file must arrive whole; of {name} came {len(data):,} bytes of {expected:,}, then the server broke off. "
            "Try again",
        )
    return bytes(data)
