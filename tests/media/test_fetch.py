"""URLs -> bytes, with the limits of mlx_qwen35.media.fetch."""

import base64
import contextlib
import socket
from functools import partial
from urllib.parse import quote

import pytest
import refusing
from media.serving import BODY, Answer, Handler, Server, start

from mlx_qwen35.media import fetch as module
from mlx_qwen35.media.fetch import is_remote, name_of

fetch = partial(module.fetch, allow_private_urls=True)  # the server is on this machine


def refused(source: str, code: str, *facts: object, kind: str = "image") -> None:
    with refusing.refused(code, *facts) as caught:
        fetch(source, kind)
    assert len(str(caught.value)) < 1000


# --- what is remote ---


@pytest.mark.parametrize("source", ["http://a/b", "https://a/b", "HTTPS://a/b", "data:,x", "DATA:,x"])
def test_http_https_and_data_are_remote(source):
    assert is_remote(source)


@pytest.mark.parametrize("source", ["picture.png", "/a/b.png", "~/a.png", "file:///a.png", "ftp://a/b", "http", ""])
def test_everything_else_is_a_path(source):
    assert not is_remote(source)


def test_names_are_short_where_the_source_is_long():
    assert name_of("https://host/a.png") == "https://host/a.png"
    assert len(name_of("https://host/" + "a" * 5000)) < 250
    name = name_of("data:image/png;base64," + "A" * 5000)
    assert len(name) < 150 and "image/png;base64" in name and "5,022 characters" in name
    assert len(name_of("data:" + "x" * 5000)) < 150


# --- data: URIs ---


def encoded(body: bytes = BODY) -> str:
    return base64.b64encode(body).decode()


@pytest.mark.parametrize(
    "header",
    [
        "image/png;base64",
        "IMAGE/PNG;BASE64",
        "image/jpeg;name=a.jpg;charset=utf-8;base64",
        "application/octet-stream;base64",
        ";base64",
    ],
)
def test_base64_data_is_decoded(header):
    assert fetch(f"data:{header},{encoded()}", "image") == BODY


def test_percent_encoded_data_is_decoded():
    assert fetch("data:image/png," + quote(BODY), "image") == BODY


def test_plain_data_is_taken_as_it_is():
    assert fetch("data:,GIF89a", "image") == b"GIF89a"


def test_base64_may_be_percent_encoded_and_broken_into_lines():
    body = b"\xff\xfe\xfb" * 40
    text = encoded(body)
    lines = "\r\n".join(text[i : i + 20] for i in range(0, len(text), 20))
    assert fetch("data:image/png;base64," + lines.replace("+", "%2B").replace("/", "%2f"), "image") == body


def test_base64_may_lack_its_padding():
    assert fetch("data:image/png;base64,AAE", "image") == b"\0\1"


@pytest.mark.parametrize("body", ["AAAAA", "AA=A", "A*==", "AAAA!!!!", "AÄÄA"])
def test_broken_base64_is_refused(body):
    refused(f"data:image/png;base64,{body}", "data_uri_invalid", "base64", "image/png;base64")


def test_a_data_uri_without_a_comma_is_refused():
    refused("data:image/png;base64" + "A" * 4000, "data_uri_invalid")


def test_a_data_uri_of_another_type_is_refused():
    refused(f"data:text/plain;base64,{encoded()}", "media_type_wrong")
    refused(f"data:text/html,{quote('<p>')}", "media_type_wrong")
    refused(f"data:image/png;base64,{encoded()}", "media_type_wrong", kind="video")


def test_a_data_uri_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setitem(module.MAX_BYTES, "image", 1000)
    refused(f"data:image/png;base64,{encoded()}", "media_too_large", "1,000", "MAX_BYTES", "1,280")


# --- http ---


def test_the_body_of_a_url_comes_back(server):
    assert fetch(server.sends("/a.png"), "image") == BODY


@pytest.mark.parametrize("kind", ["image/png", "IMAGE/PNG; charset=x", "application/octet-stream", None, ""])
def test_fitting_and_unsaid_types_are_accepted(server, kind):
    assert fetch(server.sends("/a", kind=kind), "image") == BODY


@pytest.mark.parametrize("kind", ["video/mp4", "image/gif", "application/octet-stream"])
def test_a_video_may_be_a_gif(server, kind):
    assert fetch(server.sends("/a", kind=kind), "video") == BODY


def test_a_web_page_is_not_a_picture(server):
    url = server.sends("/page", b"<html>", kind="text/html; charset=utf-8")
    refused(url, "media_type_wrong")


def test_a_video_given_as_a_picture_is_refused(server):
    refused(server.sends("/a.mp4", kind="video/mp4"), "media_type_wrong", "video/mp4")


def test_another_type_is_refused(server):
    refused(server.sends("/a.json", kind="application/json"), "media_type_wrong")


def test_a_missing_page_is_an_error_with_its_status(server):
    url = server.sends("/gone", status=404)
    refused(url, "fetch_failed", "404")


def test_an_address_with_spaces_and_umlauts_is_encoded(server):
    server.sends("/a%20%C3%BC.png?q=%20")
    assert fetch(server.address + "/a ü.png?q=%20", "image") == BODY


def test_chunks_are_put_together(server):
    assert fetch(server.does("/chunks", chunks(BODY[:700], BODY[700:])), "image") == BODY


def chunks(*pieces: bytes, end: bool = True) -> Answer:
    def answer(handler: Handler) -> None:
        start(handler, {"Content-Type": "image/png", "Transfer-Encoding": "chunked"})
        for piece in pieces:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n" if end else b"")

    return answer


# --- sizes ---


def test_a_length_beyond_the_limit_is_refused_before_the_body(server, monkeypatch):
    monkeypatch.setitem(module.MAX_BYTES, "image", 1000)
    url = server.sends("/large", b"", **{"Content-Length": "1001"})  # the body never comes
    refused(url, "media_too_large", "1,000", "MAX_BYTES", "1,001")


def test_a_body_beyond_the_limit_is_refused_where_no_length_was_said(server, monkeypatch):
    monkeypatch.setitem(module.MAX_BYTES, "image", 1000)
    refused(server.does("/large", chunks(BODY, end=False)), "media_too_large", "1,000", "1,280")


def test_images_and_videos_have_their_own_limits(server, monkeypatch):
    monkeypatch.setitem(module.MAX_BYTES, "image", 1000)
    assert fetch(server.sends("/video", kind="video/mp4"), "video") == BODY


def test_a_body_shorter_than_its_length_is_refused(server):
    url = server.sends("/short", BODY[:100], **{"Content-Length": "1280"})
    refused(url, "fetch_failed", "100", "1,280")


def test_chunks_that_break_off_are_refused(server):
    refused(server.does("/short", chunks(BODY, end=False)), "fetch_failed")


# --- times ---


def silence(server: Server) -> Answer:
    return lambda handler: server.over.wait(30)


def test_a_server_that_stays_silent_is_given_up(server, monkeypatch):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.1)
    monkeypatch.setitem(module.DEADLINE_SECONDS, "image", 3.0)
    refused(server.does("/slow", silence(server)), "fetch_timeout", "0.1", "CONNECT_SECONDS")


def test_the_deadline_counts_before_the_headers_come(server, monkeypatch):
    monkeypatch.setitem(module.DEADLINE_SECONDS, "image", 0.1)
    refused(server.does("/slow", silence(server)), "fetch_timeout", "0.1", "DEADLINE_SECONDS")


def test_the_deadline_ends_a_download_that_trickles(server, monkeypatch):
    monkeypatch.setitem(module.DEADLINE_SECONDS, "image", 0.2)

    def drip(handler: Handler) -> None:
        start(handler, {"Content-Type": "image/png", "Content-Length": "1000"})
        while not server.over.wait(0.01):
            handler.wfile.write(b"a")

    refused(server.does("/trickle", drip), "fetch_timeout", "0.2", "DEADLINE_SECONDS")


# --- hosts and redirects ---


def test_a_port_without_a_server_is_unreachable():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refused(f"http://127.0.0.1:{port}/a.png", "fetch_failed", str(port))


@pytest.mark.parametrize("url", ["http://nothing.invalid/a.png", "http:///a.png", "http://a:b/c", "http://[::1/a.png"])
def test_a_host_that_cannot_be_is_unreachable(url, server):
    refused(url, "fetch_failed")


def test_a_server_that_hangs_up_is_an_error(server):
    refused(server.does("/", lambda handler: None), "fetch_failed")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed(server, status):
    server.sends("/there")
    assert fetch(server.sends("/here", b"", status=status, Location="/there"), "image") == BODY


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://host/a.png", "data:image/png,a"])
def test_a_redirect_leads_to_http_alone(server, status, target):
    url = server.sends("/here", b"", status=status, Location=target)
    refused(url, "url_refused", target.partition(":")[0])


def test_what_a_redirect_sends_beside_the_address_is_not_read(server):
    server.sends("/there")

    def endless(handler: Handler) -> None:
        start(handler, {"Location": "/there"}, 302)
        with contextlib.suppress(OSError):  # until the client leaves
            while not server.over.is_set():
                handler.wfile.write(bytes(1 << 20))

    assert fetch(server.does("/here", endless), "image") == BODY


def test_redirects_in_a_circle_end(server):
    refused(server.sends("/here", b"", status=302, Location="/here"), "fetch_failed", "302")
