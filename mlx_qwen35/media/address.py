"""Connections to the host of a URL: its name is resolved once, every address is checked, and a checked one is dialled.

So neither a redirect nor a name that resolves differently the next time leads elsewhere. A proxy that the environment
names is the user's own choice and dials by itself; there the name is checked as far as it resolves here.
"""

import base64
import contextlib
import functools
import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from mlx_qwen35.errors import InputError

_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address is its last 32 bits
_UNICAST = ipaddress.ip_network("2000::/3")  # the part of IPv6 that is assigned
_SHARED = ipaddress.ip_network("100.64.0.0/10")

_Address = tuple[socket.AddressFamily, tuple[Any, ...]]  # family, and what connect() takes


def not_public(address: str) -> str | None:
    """Why a numeric address is not one of the public internet; None where it is. An IPv4 address in IPv6 counts."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped or ip.sixtofour
        ip = inner or ip
    kinds = {
        "unspecified": ip.is_unspecified,
        "loopback": ip.is_loopback,
        "link-local": ip.is_link_local,
        "multicast": ip.is_multicast,
        "shared by a provider's customers": ip.version == 4 and ip in _SHARED,
        "private": ip.is_private,
        "reserved": not ip.is_global or ip.is_reserved or (ip.version == 6 and (ip not in _UNICAST or ip.teredo)),
    }
    return next((kind for kind, applies in kinds.items() if applies), None)


class Connections:
    """The connections of one download, which are cut when its time is over, whatever they wait for.

    Nothing can cut the wait for a name server that does not answer: it is left alone, in a thread.
    """

    def __init__(self, seconds: float, allow_private: bool):
        self._over, self._allow_private = False, allow_private
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return self._over or time.monotonic() >= self._end

    def __enter__(self) -> "Connections":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()
        for sock in self._sockets:
            sock.close()

    def watch(self, sock: socket.socket) -> None:
        """Cut this connection in time: a copy of the handle reaches it whatever is put on top."""
        with self._lock:
            if self.late:
                raise TimeoutError
            self._sockets.append(socket.socket(fileno=os.dup(sock.fileno())))

    def _cut(self) -> None:
        with self._lock:
            self._over = True
            for sock in self._sockets:
                with contextlib.suppress(OSError):  # it is closed already
                    sock.shutdown(socket.SHUT_RDWR)

    def dial(self, host: str, port: int, seconds: float, name: str) -> socket.socket:
        """A connection to the first address of `host` that takes one; each try may last so many seconds."""
        failed = OSError("it has no address")
        for family, address in self.addresses(host, port, name):
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(max(0.001, min(seconds, self._end - time.monotonic())))
                sock.connect(address)
                sock.settimeout(seconds)
                return sock
            except OSError as error:
                sock.close()
                failed = error
        raise failed

    def addresses(self, host: str, port: int, name: str) -> list[_Address]:
        """What a host's name resolves to. InputError if any of it is not public, unless that is allowed."""
        local = f".{host}".lower().rstrip(".").endswith(".localhost")
        found = [] if local and not self._allow_private else self._resolve(host, port)
        for address, kind in [(host, "this machine")] if local else [(a[0], not_public(a[0])) for _, a in found]:
            if kind is not None and not self._allow_private:
                raise InputError(
                    "url_refused",
                    f"an address must lead into the public internet; {name} leads to {address} ({kind}). If that is "
                    "meant, allow it: --allow-private-urls, in Python allow_private_urls=True",
                )
        return found

    def _resolve(self, host: str, port: int) -> list[_Address]:
        resolved: Future[list[_Address]] = Future()

        def work() -> None:
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                resolved.set_result([(family, address) for family, *_, address in found])
            except (OSError, UnicodeError) as error:  # the latter for a name that cannot be
                resolved.set_exception(error)

        threading.Thread(target=work, name="resolve", daemon=True).start()
        return resolved.result(max(0, self._end - time.monotonic()))


# --- connections -----------------------------------------------------------------------------------------------------


class _Connection(http.client.HTTPConnection):
    """A connection of http.client's that is watched from its first byte, a proxy's answer and TLS included.

    It dials, and checks, the host itself; a proxy is dialled by http.client.
    """

    def __init__(self, host: str, *, connections: Connections, proxied: bool, name: str, **options: Any):
        self._connections, self._proxied, self._name = connections, proxied, name
        self._sock: socket.socket | None = None
        super().__init__(host, **options)

    @property
    def sock(self) -> socket.socket | None:
        return self._sock

    @sock.setter
    def sock(self, sock: socket.socket | None) -> None:
        self._sock = sock
        if sock is not None:
            self._connections.watch(sock)

    def connect(self) -> None:
        if self._proxied:
            super().connect()
        else:
            assert self.timeout is not None
            self.sock = self._connections.dial(self.host, self.port, self.timeout, self._name)


class _Secure(_Connection, http.client.HTTPSConnection):
    def __init__(self, host: str, *, context: ssl.SSLContext, **options: Any):
        self._tls = context
        super().__init__(host, context=context, **options)

    def connect(self) -> None:
        super().connect()
        if self.sock is not None and not self._proxied:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)  # the name, not the address


class Request(urllib.request.Request):
    """A request that knows whether it goes through a proxy. user:password@ before a host becomes a header, which
    redirects do not take along."""

    def __init__(self, url: str, headers: dict[str, str]):
        self.proxied = False
        scheme, netloc, *rest = urlsplit(url)
        user, at, host = netloc.rpartition("@")
        host = unquote(host)
        host = host if host.isascii() else host.encode("idna").decode()
        super().__init__(urlunsplit((scheme, host, *rest)), headers=headers)
        if at:
            pair = unquote(user if ":" in user else f"{user}:")
            self.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")

    def set_proxy(self, host: str, type: str) -> None:
        self.proxied = True
        super().set_proxy(host, type)


class Opener(urllib.request.AbstractHTTPHandler):
    """Opens http and https over `connections`. name_of: how messages call a URL."""

    def __init__(self, connections: Connections, name_of: Callable[[str], str]):
        super().__init__()
        self._connections, self._name_of = connections, name_of

    def http_open(self, request: Request) -> http.client.HTTPResponse:
        return self._open(request, _Connection)

    def https_open(self, request: Request) -> http.client.HTTPResponse:
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        return self._open(request, _Secure, context=context)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _open(self, request: Request, kind: type, **options: Any) -> http.client.HTTPResponse:
        name = self._name_of(request.full_url)
        if request.proxied:
            with contextlib.suppress(OSError, UnicodeError):  # what does not resolve here is the proxy's to resolve
                self._connections.addresses(urlsplit(request.full_url).hostname or "", 0, name)
        line = functools.partial(kind, connections=self._connections, proxied=request.proxied, name=name)
        return self.do_open(line, request, **options)
