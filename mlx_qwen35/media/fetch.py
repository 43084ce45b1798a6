"""URL -> bytes: http and https with limits of time and size, and data: URIs. Standard library only.

A download is checked before it is decoded: the addresses of its hosts, its media type, its size, its time, and whether
all of it came.
"""

import base64
import binascii
import http.client
import io
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPMessage
from io import BytesIO
from typing import IO, Any, BinaryIO
from urllib.parse import quote, unquote_to_bytes

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.address import Connections, Opener, Request
from mlx_qwen35.values import flag

CONNECT_SECONDS = 20.0  # for the connection, and for each wait for more of the answer
DEADLINE_SECONDS = {"image": 60.0, "video": 900.0, "pdf": 300.0}  # for everything: names, redirects, headers and body
MAX_BYTES = {"image": 64_000_000, "video": 2_000_000_000, "pdf": 512_000_000}
_HTTP = ("http://", "https://")
_UNSAID = ("", "application/octet-stream", "binary/octet-stream")  # the last is what S3 says of what it does not know
# The media type of each kind, and with what those that are accepted begin; a GIF is a video too.
_TYPE = {"image": "image/*", "video": "video/*", "pdf": "application/pdf"}
_TYPES = {"image": ("image/",), "video": ("video/", "image/gif"), "pdf": ("application/pdf", "application/x-pdf")}
_A = {"image": "an image", "video": "a video", "pdf": "a PDF"}
_SLICE = 1 << 20
_SHOWN = 200  # characters of a name in a message


def is_remote(source: str) -> bool:
    """Whether a source is an http, https or data: URL, and not a path."""
    return source[:8].lower().startswith((*_HTTP, "data:"))


def fetch(source: str, kind: str, allow_private_urls: bool = False) -> bytes:
    """The bytes behind a URL for which is_remote is true.

    Args:
        source: an http or https URL, or a data: URI (base64 or percent-encoded).
        kind: "image", "video" or "pdf": chooses the limits and the media types that are accepted. A type that is
            absent, or application/octet-stream, is accepted for all.
        allow_private_urls: whether the URL, or what it redirects to, may lead to loopback, private, link-local or
            reserved addresses. A program that follows URLs of others must not: they would read what it can reach.

    Raises InputError when the host cannot be reached, or must not be, answers with another status than success, takes
    too long, sends too much, too little or another type, leads away from http and https; or when the data: URI is
    malformed.
    """
    if source[:5].lower() == "data:":
        return _decode(source, kind)
    data = BytesIO()
    _download(source, kind, allow_private_urls, data)
    return data.getvalue()


@contextmanager
def fetch_file(source: str, kind: str, allow_private_urls: bool = False) -> Iterator[BinaryIO]:
    """Like fetch, but in a file on disk without a name: it is gone afterwards, however the program ends."""
    if source[:5].lower() == "data:":
        yield BytesIO(_decode(source, kind))
        return
    with ExitStack() as stack:
        with disk(kind):
            # Without a buffer: writing its rest could fail when the file is closed.
            file = stack.enter_context(tempfile.TemporaryFile(buffering=0))
        _download(source, kind, allow_private_urls, file)
        file.seek(0)
        yield io.BufferedReader(file)


@contextmanager
def disk(kind: str) -> Iterator[None]:
    """OSErrors of the block are the disk's."""
    try:
        yield
    except OSError as error:
        raise InputError(
            "disk_full",
            f"the disk must have room for a downloaded {kind}: {error.strerror}. Make some, or set TMPDIR",
        ) from error


_URL = re.compile(r"\s*([a-z][a-z0-9+.-]*://)([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?", re.IGNORECASE | re.DOTALL)


def name_of(source: str) -> str:
    """A short name of a path, URL or data: URI for messages, without secrets: in a URL, *** stands for user and
    password, for the query, and for the fragment."""
    if source[:5].lower() == "data:":
        return f"a data: URI of {len(source):,} characters ({_short(source.partition(',')[0], 60)})"
    if (parts := _URL.fullmatch(source)) is None:
        return _short(source, _SHOWN)
    scheme, host, path, query, fragment = parts.groups(default="")
    _, at, host = host.rpartition("@")
    if not at and "@" in source and re.search(r":[^\]]*\D[^\]]*$", host):  # a password that holds / ? or #
        return f"{scheme}***"
    return _short(f"{scheme}{at and '***@'}{host}{path}{query and '?***'}{fragment and '#***'}", _SHOWN)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _check_type(media: str, kind: str, name: str) -> None:
    """`media`: a Content-Type, parameters and all."""
    media = media.partition(";")[0].strip().lower()
    if media in _UNSAID or media.startswith(_TYPES[kind]):
        return
    if media in ("text/html", "application/xhtml+xml"):
        hint = f"It is a web page: open it in a browser and copy the address of the {_A[kind].split()[1]}"
    else:
        other = next((other for other, types in _TYPES.items() if media.startswith(types)), None)
        hint = f"Give it as {_A[other]}" if other else f"Give the address of {_A[kind]}"
    raise InputError(
        "media_type_wrong",
        f"the media type of {_A[kind]} must be {_TYPE[kind]}; {name} says {_short(media, 60)}. {hint}",
    )


def _check_length(length: int, kind: str, name: str, at_least: str = "") -> None:
    if length > MAX_BYTES[kind]:
        raise InputError(
            "media_too_large",
            f"{_A[kind]} may have at most {MAX_BYTES[kind]:,} bytes (MAX_BYTES of mlx_qwen35.media.fetch); {name} has "
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
            "data_uri_invalid", f"the data must be whole base64 or percent-encoded bytes; {name} is not: {reason}"
        ) from error
    _check_length(len(data), kind, name)
    return data


# --- http and https ---


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https alone."""

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage
    ) -> Any | None:
        fp.close()  # else its body is read, however long it is
        target = headers.get("location") or headers.get("uri") or ""
        scheme, colon, _ = target.partition(":")
        if colon and "/" not in scheme and scheme.lower() not in ("http", "https"):
            leads = f"{name_of(req.full_url)} leads to {name_of(target)}"
            raise InputError("url_refused", f"an address may lead on to http and https alone; {leads}")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request:
        kept = {name: text for name, text in req.headers.items() if name != "Proxy-authorization"}
        return Request(newurl, kept)  # which goes through the proxy, or not, by itself


def _opener(connections: Connections) -> urllib.request.OpenerDirector:
    """An opener that knows http and https and nothing else: no files, no ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        Opener(connections, name_of),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),  # a proxy of another kind
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def _download(source: str, kind: str, allow_private_urls: bool, into: BinaryIO) -> None:
    flag("allow_private_urls", allow_private_urls)
    late = InputError(
        "fetch_timeout",
        f"{_A[kind]} must arrive within {DEADLINE_SECONDS[kind]:g} seconds (DEADLINE_SECONDS of "
        f"mlx_qwen35.media.fetch); {name_of(source)} took longer. Try again, or save it to a file and give its path",
    )
    with Connections(DEADLINE_SECONDS[kind], allow_private_urls) as connections:
        try:
            _transfer(source, kind, connections, into)
        except InputError:
            if connections.late:
                raise late from None
            raise
        if connections.late:
            raise late


def _transfer(source: str, kind: str, connections: Connections, into: BinaryIO) -> None:
    name = name_of(source)
    url = quote(source, safe="!#$%&'()*+,/:;=?@[]~")  # spaces and letters beyond ASCII
    headers = {"User-Agent": "mlx-qwen35", "Accept": f"{_TYPE[kind]}, */*;q=0.5"}
    try:
        with _opener(connections).open(Request(url, headers), timeout=CONNECT_SECONDS) as answer:
            _check_type(answer.headers.get("Content-Type", ""), kind, name)
            _read(answer, kind, name, into)
    except InputError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _unreached(error, name) from None  # whose words may hold what a message must not


def _unreached(error: OSError | ValueError | http.client.HTTPException, name: str) -> InputError:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return InputError(
            "fetch_timeout",
            f"a server must send something every {CONNECT_SECONDS:g} seconds (CONNECT_SECONDS of "
            f"mlx_qwen35.media.fetch); that of {name} did not. Try again, or save the file and give its path",
        )
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        why = f"the server answered {error.code} {_short(str(reason), 100)}"
    elif isinstance(error, urllib.error.URLError) or (isinstance(error, ValueError) and isinstance(reason, OSError)):
        why = f"its host is not: {reason}"
    elif isinstance(error, (ValueError, http.client.InvalidURL)):
        why = "its address is not written as one"
    else:
        why = f"the server broke off the connection ({type(error).__name__})"
    return InputError("fetch_failed", f"{name} must be reachable; {why}. Look at the address and at the network")


def _read(answer: http.client.HTTPResponse, kind: str, name: str, into: BinaryIO) -> None:
    said = answer.headers.get("Content-Length", "")
    expected = int(said) if said.isdecimal() and not answer.headers.get("Transfer-Encoding") else None
    if expected is not None:
        _check_length(expected, kind, name)
    length = 0
    while piece := answer.read1(_SLICE):
        length += len(piece)
        _check_length(length, kind, name, at_least="at least ")
        with disk(kind):
            while piece:
                piece = piece[into.write(piece) :]
    if expected is not None and length < expected:
        came = f"{length:,} of {expected:,} bytes came"
        raise InputError("fetch_failed", f"{name} must arrive whole; {came}, then the server broke off. Try again")
