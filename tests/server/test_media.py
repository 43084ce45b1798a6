"""Images and videos of requests: which sources are read, and what the others are refused with."""

import base64
import io
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator

import httpx
import pytest
from media.serving import Server
from PIL import Image
from serving import serving

from mlx_qwen35.load import load
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.media import read_media
from mlx_qwen35.server.options import ServerOptions

PLACE = "messages.0.content.0.image_url.url"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load("nano")[1]


def png(width: int = 32, height: int = 32, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize((width, height)).convert("RGB").save(file, kind)
    return file.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def claims(width: int, height: int) -> bytes:
    """The head of a PNG that says it is so large."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + png()[33:]


def refusal(processor: Processor, url: object, kind: str = "image", **options: bool) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_media(processor, kind, url, PLACE, ServerOptions(**options))
    error = caught.value
    assert error.status == 400 and error.param == PLACE
    return error


def test_a_data_uri_is_read(processor: Processor) -> None:
    media = read_media(processor, "image", uri(png()), PLACE, ServerOptions())
    assert media.kind == "image" and media.original == (32, 32)


def test_options_of_the_request_are_used(processor: Processor) -> None:
    media = read_media(processor, "image", uri(png(256, 256)), PLACE, ServerOptions(), max_pixels=64 * 64)
    assert media.pixels.shape[1:3] == (64, 64)
    with pytest.raises(ApiError) as caught:
        read_media(processor, "image", uri(png()), PLACE, ServerOptions(), max_pixels=0)
    assert (caught.value.code, caught.value.param) == ("option_invalid", PLACE)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("fetch_media", [False, True])
def test_what_is_no_url_never_touches_the_disk(processor: Processor, tmp_path, fetch_media: bool, kind: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png())
    (tmp_path / "home").symlink_to(tmp_path)
    before = os.stat(file).st_atime_ns
    sources = [str(file), f"file://{file}", f"FILE://{file}", f" file://{file}", "a.png", "~/a.png", str(tmp_path), "",
               "ftp://example.com/a.png", f" {uri(png())}", f"data\0:{file}", f"http:{file}", "//host/a.png", "blob:x",
               None, 7, [str(file)], {"url": uri(png())}]  # fmt: skip
    for source in sources:
        assert refusal(processor, source, kind, fetch_media=fetch_media).code == "media_source_invalid", source
    assert os.stat(file).st_atime_ns == before


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (claims(30_000, 30_000), "media_too_large"),
        (png(1, 1), "media_too_small"),
        (png(1, 64), "media_too_small"),
        (png()[:-20], "media_not_opened"),
        (png(kind="JPEG")[:-20], "media_damaged"),
        (b"", "media_empty"),
        (b"<html>", "media_not_opened"),
    ],
)
def test_a_bad_image_is_refused(processor: Processor, data: bytes, code: str) -> None:
    assert refusal(processor, uri(data)).code == code


def test_broken_base64_is_refused(processor: Processor) -> None:
    assert refusal(processor, "data:image/png;base64,!!!").code == "data_uri_invalid"
    assert refusal(processor, "data:image/png;base64").code == "data_uri_invalid"


def test_a_video_that_is_an_image_is_refused(processor: Processor) -> None:
    assert refusal(processor, uri(png()), "video").code == "media_type_wrong"


# --- URLs ------------------------------------------------------------------------------------------------------------

PUBLIC, PRIVATE = "93.184.215.14", "10.1.2.3"


@pytest.fixture
def network(web_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The addresses that were dialled. pictures.test is public and leads to `web_server`; inside.test is private."""
    dialled: list[str] = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo
    names = {"pictures.test": PUBLIC, PUBLIC: PUBLIC, "inside.test": PRIVATE, "metadata.test": "169.254.169.254"}

    def getaddrinfo(host: str, port: int, *rest: object, **more: object) -> list[tuple]:
        if host in names:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (names[host], port))]
        return resolve(host, port, *rest, **more)

    def to_server(sock: socket.socket, address: tuple[str, int]) -> None:
        dialled.append(address[0])
        connect(sock, ("127.0.0.1", web_server.server_port) if address[0] == PUBLIC else address)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", to_server)
    yield dialled


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "0.0.0.0", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]",
     "[fd00::1]", "10.0.0.1", "2130706433", "inside.test", "metadata.test", "user:secret@127.0.0.1"],
)  # fmt: skip
def test_an_address_of_this_network_is_not_dialled(processor: Processor, network: list[str], host: str) -> None:
    error = refusal(processor, f"http://{host}:1/a.png?token=1", fetch_media=True)
    assert error.code == "url_refused" and network == []
    assert not any(word in error.message for word in ("10.1.2.3", "169.254", "loopback", "private", "token", "secret"))


def test_a_redirect_to_an_address_of_this_network_is_not_followed(
    processor: Processor, web_server: Server, network: list[str]
) -> None:
    for place in ("http://inside.test/a.png", "http://[::ffff:169.254.169.254]/", "file:///etc/hostname"):
        web_server.sends("/a.png", b"", status=302, Location=place)
        error = refusal(processor, "http://pictures.test/a.png", fetch_media=True)
        assert error.code == "url_refused" and "inside" not in error.message and PRIVATE not in error.message
    assert network == [PUBLIC] * 3


def test_a_public_address_is_followed_only_where_that_is_allowed(
    processor: Processor, web_server: Server, network: list[str]
) -> None:
    web_server.sends("/a.png", png())
    assert refusal(processor, "http://pictures.test/a.png").code == "url_refused" and network == []
    media = read_media(processor, "image", "http://pictures.test/a.png", PLACE, ServerOptions(fetch_media=True))
    assert media.original == (32, 32) and network == [PUBLIC]


def test_what_a_server_does_not_deliver_is_told_without_its_address(
    processor: Processor, web_server: Server, network: list[str]
) -> None:
    web_server.sends("/gone.png?key=1", b"", status=404)
    error = refusal(processor, "http://pictures.test/gone.png?key=1", fetch_media=True)
    assert error.code == "fetch_failed" and "pictures" not in error.message and "key" not in error.message


def test_servers_that_keep_it_waiting_hold_up_no_other_request(web_server: Server, network: list[str]) -> None:
    web_server.does("/never.png", lambda handler: web_server.over.wait())
    text = {"type": "text", "text": "What is 34 + 58?"}
    image = {"type": "image_url", "image_url": {"url": "http://pictures.test/never.png"}}
    with serving(fetch_media=True) as server:

        def ask(*content: dict) -> httpx.Response:
            messages = [{"role": "user", "content": content}]
            return server.post("/v1/chat/completions", {"messages": messages, "temperature": 0})

        waiting = [threading.Thread(target=ask, args=(image,)) for _ in range(4)]
        for thread in waiting:
            thread.start()
        until = time.monotonic() + 20
        while len(web_server.asked) < len(waiting) and time.monotonic() < until:
            time.sleep(0.01)
        came = len(web_server.asked)
        if came == len(waiting):  # else this would wait too
            assert ask(text).json()["choices"][0]["message"]["content"] == "92"
        web_server.over.set()
        for thread in waiting:
            thread.join()
    assert came == len(waiting)
