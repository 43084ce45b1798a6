"""GET / and /page/NAME."""

import hashlib
from pathlib import Path

import httpx
import pytest
from serving import Running

from mlx_qwen35.server import page_route


def test_the_files_of_others_are_the_ones_whose_hashes_are_written_down() -> None:
    folder = Path(__file__).parents[2] / "mlx_qwen35/server/page/vendor"
    lines = (folder / "VENDORED.txt").read_text().partition("SHA-256\n")[2].splitlines()
    hashes = dict(reversed(line.split()) for line in lines)
    assert set(hashes) == {file.name for file in folder.iterdir()} - {"VENDORED.txt"}
    for name, known in hashes.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == known, name


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/", "text/html"), ("/page/main.js", "text/javascript"), ("/page/vendor/purify.min.js", "text/javascript"),
     ("/page/page.css", "text/css"), ("/page/icon.svg", "image/svg+xml")],
)  # fmt: skip
def test_each_file_comes_with_its_type_and_the_policy(nano_server: Running, path: str, kind: str) -> None:
    headers = httpx.get(nano_server.url + path).headers
    assert headers["Content-Type"].startswith(kind)
    assert {name: headers[name] for name in page_route.HEADERS} == page_route.HEADERS
    for rule in ("default-src 'self'", "img-src 'self' data: blob:", "frame-ancestors 'none'"):
        assert rule in headers["Content-Security-Policy"].split("; ")


@pytest.mark.parametrize("name", ["none.js", "../app.py", "%2e%2e/app.py", "vendor/../../app.py", "vendor"])
def test_no_other_file_is_served(nano_server: Running, name: str) -> None:
    assert httpx.get(f"{nano_server.url}/page/{name}").status_code == 404
