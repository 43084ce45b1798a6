"""What stands before every endpoint: who may ask, and what a body may be. Plain ASGI: streams pass as they are.

A page of another site reaches a server on this machine through its visitor's browser. It cannot choose the headers Host
(which holds its own name, even where that name was made to lead here) and Origin; so both are checked, and no answer
allows another origin to read it.
"""

import hmac
import ipaddress
import os
import re
import uuid
from collections.abc import Collection, Iterator

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_qwen35.errors import InputError
from mlx_qwen35.server.body import ClientLeft, parse, read_body
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.options import ServerOptions
from mlx_qwen35.server.status import condition_of
from mlx_qwen35.values import shown

KEY = "MLX_QWEN35_API_KEY"  # environment
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:@/\[\]]+)(:\d+)?", re.IGNORECASE)
_OPEN = ("/", "/health")  # paths without a key, loaded or not; a browser has the page before it can ask for a key
_PAGE = "/page/"


def read_key(options: ServerOptions) -> str | None:
    """The key that requests must bring, of the file or the environment. InputError for none where one is needed."""
    file = options.api_key_file
    if file:
        try:
            key = file.expanduser().read_text(encoding="utf-8-sig").strip()
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError("text_unreadable", f"--api-key-file must be a readable text file: {error}") from error
    else:
        key = os.environ.get(KEY, "").strip()
    if (file or key) and not re.fullmatch(r"[!-~]+", key):
        where = f"--api-key-file {file}" if file else KEY
        raise InputError("option_invalid", f"{where} must hold one key, of printable ASCII characters without spaces")
    if not key and not is_loopback(options.host):
        raise InputError(
            "option_missing",
            f"--host {options.host} lets other machines in, so a key must be given: --api-key-file FILE, or {KEY} in "
            "the environment",
        )
    return key or None


def read_names(options: ServerOptions) -> set[str]:
    """The names by which the server is reached, beside those of this machine. InputError for what is none."""
    names = {_bare(options.host)} - {""}
    for name in options.allowed_host or ():
        if not (bare := _bare(name)):
            raise InputError("option_invalid", f"--allowed-host must be a name such as models.local, got {shown(name)}")
        names.add(bare)
    return names


def is_loopback(host: str) -> bool:
    """Whether a name or an address leads to this machine, whatever a name server says."""
    if host.rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def refusal(scope: Scope, error: Exception) -> Response:
    """An error in the shape of the API that the path belongs to; scope["refused"] has it, for the log."""
    told = scope["refused"] = ApiError.of(error)
    if not scope["path"].startswith("/v1/messages"):
        return JSONResponse(told.openai(), told.status, told.headers)
    name = f"req_{uuid.uuid4().hex}"
    return JSONResponse(told.anthropic(name), told.status, told.headers | {"request-id": name})


class Guard:
    """Refuses, or hands on with the parsed body of a POST in scope["json"].

    names: see `read_names`. key: see `read_key`; None where none is asked for.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], key: str | None):
        self._app, self._names, self._key = app, names, key.encode() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            self._check_names(headers, scope)
            self._check_key(headers, scope["path"])
            if not _is_open(scope["path"]) and (condition := condition_of(scope["app"])) != "ok":
                raise ApiError(503, condition, f"the server is {condition}; try again", headers={"Retry-After": "5"})
            if scope["method"] == "POST":
                scope["json"] = parse(await read_body(headers, receive))
        except ClientLeft:
            return
        except ApiError as error:
            await refusal(scope, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_names(self, headers: Headers, scope: Scope) -> None:
        reached = (scope.get("server") or ("",))[0]  # the address of this end of the connection
        hosts = {"host": headers.get("host", "")}
        if (origin := headers.get("origin")) is not None:
            hosts["origin"] = origin.partition("://")[2]
        for header, host in hosts.items():
            name = _bare(host)
            if not (is_loopback(name) or name in self._names or name == reached):
                lets = f"--allowed-host {name} lets it in" if name else "It is no name and no address"
                rule = f"{header.title()} must name this server, got {shown(host[:80])}. {lets}"
                raise ApiError(403, f"{header}_refused", rule)

    def _check_key(self, headers: Headers, path: str) -> None:
        if self._key is None or _is_open(path):
            return
        given = [*filter(None, _keys(headers))]
        if not any([hmac.compare_digest(key, self._key) for key in given]):
            rule = "the server's key must come as Authorization: Bearer KEY, or as x-api-key: KEY"
            if given:
                rule = f"the key must be the server's, of its --api-key-file or {KEY}; another one came"
            raise ApiError(401, "key_invalid", rule, headers={"WWW-Authenticate": "Bearer"})


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith(_PAGE)


def _bare(host: str) -> str:
    """The name in a Host header, without its port and the brackets of an address; "" where it is none."""
    found = _HOST.fullmatch(host) or _HOST.fullmatch(f"[{host}]")
    return found[1].strip("[]").rstrip(".").lower() if found else ""


def _keys(headers: Headers) -> Iterator[bytes]:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield key.strip().encode()
    yield headers.get("x-api-key", "").encode()
