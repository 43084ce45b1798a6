"""Where URLs may lead, which address is dialled, what messages leave out, and how a download ends.

The server is on this machine; `public` makes it look like one of the internet: names resolve as a test says, and a
connection to PUBLIC goes to it.
"""

import base64
import io
import shutil
import socket
import ssl
import subprocess
import sys
import threading

import pytest
from media.serving import BODY, Handler, Server, send
from PIL import Image
from refusing import refused

from mlx_qwen35 import VisionOptions, load, read_image
from mlx_qwen35.commands import generate as command
from mlx_qwen35.console.options import given_options
from mlx_qwen35.engine.conversation import Conversation
from mlx_qwen35.engine.generation import start
from mlx_qwen35.media import fetch
from mlx_qwen35.media.address import not_public
from mlx_qwen35.media.fetch import fetch as fetch_bytes
from mlx_qwen35.media.fetch import name_of
from mlx_qwen35.media.frames import FrameSampling
from mlx_qwen35.media.video import read_video

PUBLIC, ALSO_PUBLIC, PRIVATE = "93.184.215.14", "93.184.215.15", "10.1.2.3"


def small_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def public(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """name -> its addresses, each look-up in "looked up", each connection in "dialled". PUBLIC leads to the server."""
    names: dict[str, list[str]] = {"pictures.test": [PUBLIC], "looked up": [], "dialled": []}
    connect = socket.socket.connect

    def getaddrinfo(host: str, port: int, *_: object, **__: object) -> list[tuple]:
        names["looked up"].append(host)
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names[host]]

    def to_server(sock: socket.socket, address: tuple[str, int]) -> None:
        names["dialled"].append(address[0])
        connect(sock, ("127.0.0.1", server.server_port))

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", to_server)
    return names


# --- which addresses are public ---


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::", "::1", "fe80::1", "fe80::1%1",
        "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1",
        "2002:7f00:1::1", "2002:0a00:0001::", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1",
        "2001:0:7f00:1::1", "4000::1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_of_the_public_internet_is_known(address):
    assert not_public(address)


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"]
)
def test_an_address_of_the_public_internet_is_known(address):
    assert not_public(address) is None


# --- what is refused, and what allows it ---


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "a.localhost.", "127.1", "0x7f.1", "2130706433", "0177.0.0.1", "0", "[::1]",
             "[::ffff:127.0.0.1]", "①②⑦.0.0.1"]
)  # fmt: skip
def test_this_machine_is_refused_however_it_is_spelled(host, server):
    with refused("url_refused", "allow_private_urls=True"):
        fetch_bytes(f"http://{host}:{server.server_port}/a.png", "image")
    assert not server.asked


def test_an_allowed_address_is_followed(server):
    assert fetch_bytes(server.url, "image", allow_private_urls=True) == BODY


def test_a_name_that_leads_into_a_private_network_is_refused(server, public):
    public["inside.test"] = [PRIVATE]
    with refused("url_refused", "inside.test", PRIVATE, "private"):
        fetch_bytes("http://inside.test/a.png", "image")
    assert not public["dialled"]


def test_a_name_with_one_private_address_among_others_is_refused(server, public):
    public["mixed.test"] = [PUBLIC, PRIVATE]
    with refused("url_refused", PRIVATE):
        fetch_bytes("http://mixed.test/a.png", "image")
    assert not public["dialled"]


def test_a_redirect_into_a_private_network_is_refused(server, public):
    public["inside.test"] = [PRIVATE]
    server.answer = lambda handler: send(handler, b"", 302, Location="http://inside.test/latest?key=1")
    with refused("url_refused", "inside.test", PRIVATE) as caught:
        fetch_bytes("http://pictures.test/a.png", "image")
    assert public["dialled"] == [PUBLIC] and "key=1" not in str(caught.value)


def test_the_address_that_was_checked_is_dialled(server, public, monkeypatch):
    public["changing.test"] = [PUBLIC, ALSO_PUBLIC]
    checked = socket.getaddrinfo

    def once(host: str, *rest: object, **more: object) -> list[tuple]:
        found = checked(host, *rest, **more)
        public["changing.test"] = [PRIVATE]  # from now on
        return found

    monkeypatch.setattr(socket, "getaddrinfo", once)
    assert fetch_bytes("http://changing.test/a.png", "image") == BODY
    assert public["looked up"] == ["changing.test"] and public["dialled"] == [PUBLIC]
    assert server.asked[0].headers["Host"] == "changing.test"


def test_the_next_address_is_dialled_where_one_does_not_answer(server, public, monkeypatch):
    public["pictures.test"] = [PUBLIC, ALSO_PUBLIC]
    connect = socket.socket.connect

    def dead_first(sock: socket.socket, address: tuple[str, int]) -> None:
        connect(sock, address)
        if address[0] == PUBLIC:
            raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", dead_first)
    assert fetch_bytes("http://pictures.test/a.png", "image") == BODY


# --- proxies ---


def test_a_proxy_of_the_environment_may_be_on_this_machine(server, public, monkeypatch):
    public["proxy.test"] = ["127.0.0.1"]
    monkeypatch.setenv("http_proxy", "http://proxy.test:3128")
    assert fetch_bytes("http://resolved-by-the-proxy-alone.test/a.png", "image") == BODY
    assert server.asked[0].path == "http://resolved-by-the-proxy-alone.test/a.png"


def test_a_proxy_of_another_kind_is_an_error(server, public, monkeypatch):
    monkeypatch.setenv("http_proxy", "socks5://proxy.test:1080")
    with refused("fetch_failed", "socks5"):
        fetch_bytes("http://pictures.test/a.png", "image")


def test_the_word_for_a_proxy_goes_to_no_other(server, public, monkeypatch):
    public["proxy.test"], public["other.test"] = ["127.0.0.1"], [PUBLIC]
    monkeypatch.setenv("http_proxy", "http://me:word@proxy.test:3128")
    monkeypatch.setenv("no_proxy", "other.test")
    server.answer = lambda handler: (
        send(handler) if handler.path == "/there" else send(handler, b"", 302, Location="http://other.test/there")
    )
    assert fetch_bytes("http://pictures.test/a.png", "image") == BODY
    first, second = (handler.headers["Proxy-Authorization"] for handler in server.asked)
    assert first.startswith("Basic ") and second is None


@pytest.mark.parametrize("host", ["inside.test", "localhost"])
def test_a_private_address_behind_a_proxy_is_refused(server, public, monkeypatch, host):
    public["proxy.test"], public["inside.test"] = ["127.0.0.1"], [PRIVATE]
    monkeypatch.setenv("http_proxy", "http://proxy.test:3128")
    with refused("url_refused", host):
        fetch_bytes(f"http://{host}/a.png", "image")
    assert not server.asked


# --- TLS ---


@pytest.fixture
def secure(server, public, tmp_path, monkeypatch) -> None:
    """The server speaks TLS with a certificate for pictures.test, which is trusted."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make a certificate")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    ask = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=pictures.test"
    names = ["-addext", "subjectAltName=DNS:pictures.test", "-keyout", key, "-out", certificate]
    subprocess.run([*ask.split(), *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", certificate)


def test_a_certificate_is_checked_against_the_name_and_not_the_address(secure, public):
    assert fetch_bytes("https://pictures.test/a.png", "image") == BODY
    public["other.test"] = [PUBLIC]
    with refused("fetch_failed", "other.test"):
        fetch_bytes("https://other.test/a.png", "image")


# --- secrets ---


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://host/a.png", "https://host/a.png"),
        ("https://host/a.png?token=secret", "https://host/a.png?***"),
        ("https://me:secret@host:8/a.png", "https://***@host:8/a.png"),
        ("https://me:sec@ret@host/a", "https://***@host/a"),
        ("https://me:sec/ret@host/a", "https://***"),
        ("https://me:sec?ret@host/a", "https://***"),
        ("https://host/a#secret", "https://host/a#***"),
        ("HTTPS://host?secret#secret", "HTTPS://host?***#***"),
        ("http://[::1]:80/a", "http://[::1]:80/a"),
        ("https://host/@me/a", "https://host/@me/a"),
        ("ftp://me:secret@host/a", "ftp://***@host/a"),
        ("pictures/what?.png", "pictures/what?.png"),
    ],
)
def test_names_hold_no_secrets(url, name):
    assert name_of(url) == name


@pytest.mark.parametrize("status", [404, 302])
def test_messages_hold_no_secrets(server, status):
    server.answer = lambda handler: send(handler, b"", status, Location="http://other:secret@127.0.0.1:1/?secret")
    url = server.url.replace("http://", "http://me:secret@") + "?token=secret"
    with refused("fetch_failed") as caught:
        fetch_bytes(url, "image", allow_private_urls=True)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://me:secret@[::1/a", "http://me:secret@host:port/?secret", "http://host:secret@/"]
)
def test_messages_of_what_is_no_address_hold_no_secrets(url, server):
    with refused("fetch_failed") as caught:
        fetch_bytes(url, "image", allow_private_urls=True)
    assert "secret" not in str(caught.value)


def test_user_and_password_go_to_their_host_and_not_where_it_leads(server):
    server.answer = lambda handler: (
        send(handler) if handler.path == "/there" else send(handler, b"", 302, Location="/there")
    )
    url = server.url.replace("http://", "http://me:p%40ss@")
    assert fetch_bytes(url, "image", allow_private_urls=True) == BODY
    first, second = (handler.headers["Authorization"] for handler in server.asked)
    assert first == "Basic " + base64.b64encode(b"me:p@ss").decode() and second is None


# --- the end of a download ---


@pytest.mark.parametrize("where", ["status", "headers", "body"])
def test_a_server_that_drips_is_left_and_no_thread_stays(server, monkeypatch, where):
    monkeypatch.setitem(fetch.DEADLINE_SECONDS, "image", 0.5)
    gone = threading.Event()
    start = {
        "status": b"",
        "headers": b"HTTP/1.1 200 OK\r\nX: ",
        "body": b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n",
    }

    def drip(handler: Handler) -> None:
        handler.wfile.write(start[where])
        try:
            for _ in range(500):
                if server.over.wait(0.01):
                    break
                handler.wfile.write(b"H")
        except OSError:
            gone.set()

    server.answer = drip
    before = set(threading.enumerate())
    with refused("fetch_timeout", "0.5 seconds"):
        fetch_bytes(server.url, "image", allow_private_urls=True)
    assert gone.wait(5)
    ours = [thread for thread in set(threading.enumerate()) - before if "process_request" not in thread.name]
    assert not ours


def test_a_name_server_that_does_not_answer_holds_nobody(server, monkeypatch):
    monkeypatch.setitem(fetch.DEADLINE_SECONDS, "image", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: server.over.wait(30) and [])
    with refused("fetch_timeout", "0.1 seconds"):
        fetch_bytes("http://slow.test/a.png", "image")


# --- videos on disk ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary files go."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_video_lies_on_disk_and_is_gone_afterwards(server, folder):
    server.answer = lambda handler: send(handler, BODY * 1000)
    with fetch.fetch_file(server.url, "video", allow_private_urls=True) as file:
        assert file.fileno() and file.read() == BODY * 1000
    assert file.closed or file.raw.closed
    assert not list(folder.iterdir())


def test_a_video_that_fails_leaves_nothing(server, folder):
    server.answer = lambda handler: send(handler, BODY, **{"Content-Length": "2000"})
    with refused("fetch_failed", "2,000"), fetch.fetch_file(server.url, "video", allow_private_urls=True):
        pass
    assert not list(folder.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a process")
def test_a_disk_that_is_full_is_told(server, folder):
    import resource

    server.answer = lambda handler: send(handler, BODY * 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with refused("disk_full"), fetch.fetch_file(server.url, "video", allow_private_urls=True):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(folder.iterdir())


# --- the option, everywhere ---


def test_read_image_takes_the_option(server):
    server.answer = lambda handler: send(handler, small_png())
    with refused("url_refused", "127.0.0.1"):
        read_image(server.url)
    assert read_image(server.url, allow_private_urls=True).shape == (32, 32, 3)


@pytest.mark.parametrize("several", [False, True])
def test_read_video_takes_the_option(server, several):
    server.answer = lambda handler: send(handler, small_png())
    source, options = ([server.url] * 2, {"source_fps": 2}) if several else (server.url, {})
    sampling = FrameSampling(2, None, 2, 9)
    with refused("url_refused", "127.0.0.1"):
        read_video(source, sampling, lambda *_: (1, 1), **options)
    options["allow_private_urls"] = True
    if several:
        assert read_video(source, sampling, lambda *_: (1, 1), **options).total == 2
    else:
        with refused("media_type_wrong", "PNG"):
            read_video(source, sampling, lambda *_: (1, 1), **options)


@pytest.mark.parametrize("value", [1, "false"])
def test_the_option_is_true_or_false(server, value):
    with refused("option_invalid", "allow_private_urls", repr(value)):
        read_image(server.url, allow_private_urls=value)
    with refused("option_invalid", "allow_private_urls"):
        VisionOptions(allow_private_urls=value)


@pytest.mark.parametrize("way", ["generate", "messages", "conversation"])
def test_generation_messages_and_conversations_take_the_option(server, way):
    server.answer = lambda handler: send(handler, small_png())
    model, processor = load("nano")
    content = [{"type": "image_url", "image_url": {"url": server.url}}, {"type": "text", "text": "What?"}]

    def see(**options: bool) -> None:
        if way == "generate":
            start(model, processor, ["What?"], images=[server.url], **options)
        elif way == "messages":
            processor.encode_messages([{"role": "user", "content": content}], VisionOptions(**options))
        else:
            processor.read_parts(content, Conversation(model, processor, **options).vision)

    with refused("url_refused", "127.0.0.1"):
        see()
    see(allow_private_urls=True)


def test_the_command_takes_the_option(server, monkeypatch, capsys):
    words = ["--model", "nano", "--image", server.url, "-p", "What?"]
    monkeypatch.setattr(sys, "argv", [command.COMMAND, *words])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "[url_refused]" in capsys.readouterr().err
    assert given_options(command.parser().parse([*words, "--allow-private-urls"])) == {"allow_private_urls": True}
