"""The page at /, in a browser."""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browsing import CHAT, answered, ask, browsing, expect, opened, prompt, reply, says
from playwright.sync_api import Browser, Page
from serving import Running

from mlx_qwen35.server import page_route
from mlx_qwen35.server.service import Answer, Service

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples/pictures/shapes.png"
HOSTILE = """<img src=x onerror="globalThis.hurt = 1"> <script>globalThis.hurt = 1</script>

<iframe srcdoc="<script>parent.hurt = 1</script>"></iframe>

[click](javascript:globalThis.hurt=1) ![seen](http://127.0.0.1:9/pixel.png) <b onclick="hurt=1">bold</b>

<svg><animate onbegin="globalThis.hurt=1" attributeName="x" dur="1s"></svg>
"""
RICH = "# Head\n\n" + "long" * 200 + "\n\n```python\nprint(" + "1, " * 100 + ")\n```\n\n|a|b|\n|-|-|\n|" + "c" * 90 + "|d|\n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, nano_server: Running) -> Iterator[Page]:
    with opened(browser, nano_server.url) as page:
        yield page


def set_up(page: Page, **fields: str) -> None:
    """Fill in the settings and save them."""
    page.get_by_role("button", name="Settings").click()
    for name, value in fields.items():
        field = page.locator(f"#settings [name={name}]")
        if name == "thinking":
            field.select_option(value)
        else:
            field.fill(value)
    page.get_by_role("button", name="Save").click()


# --- what is served --------------------------------------------------------------------------------------------------


def test_the_files_of_others_are_the_ones_whose_hashes_are_written_down() -> None:
    folder = ROOT / "mlx_qwen35/server/page/vendor"
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


# --- asking ----------------------------------------------------------------------------------------------------------


def test_a_question_is_answered_with_its_thinking_folded_and_the_answer_is_announced(page: Page) -> None:
    answer = ask(page, "What is 34 + 58?")
    expect(answer.locator("> .prose")).to_have_text("92")
    thinking = answer.get_by_role("group")
    expect(thinking).to_have_text(re.compile(r"^Thought for \d+(\.\d)? s"))
    expect(thinking.locator(".prose")).to_be_hidden()
    expect(page.get_by_role("status")).to_have_text("92")
    thinking.locator("summary").press("Enter")
    expect(thinking.locator(".prose")).to_contain_text("4+8=12")


def test_stop_cancels_the_answer_in_the_server(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Answer] = []
    submit = Service.submit
    monkeypatch.setattr(Service, "submit", lambda *given: answers.append(submit(*given)) or answers[-1])
    set_up(page, thinking="off", schema='{"type": "string", "minLength": 100000}')
    prompt(page).fill("Who are you?")
    prompt(page).press("Enter")
    text = page.get_by_role("article", name="Answer").locator("> .prose")
    expect(text).to_contain_text("a")
    page.get_by_role("button", name="New", exact=True).click()  # it goes on while one looks elsewhere
    expect(text).to_have_count(0)
    page.get_by_role("button", name="Who are you?", exact=True).click()
    expect(text).to_contain_text("a")
    (request,) = answers[0].job.requests
    assert not request.finished
    page.keyboard.press("Escape")
    deadline = time.monotonic() + 30
    while not request.finished and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    assert request.finish_reason == "interrupted"
    expect(answered(page).locator(".note")).to_have_text("Stopped.")
    expect(text).to_contain_text("a")


HAND_OVER = """(target, [kind, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "shapes.png", { type: "image/png" }));
  const given = { bubbles: true, cancelable: true };
  target.dispatchEvent(kind === "drop" ? new DragEvent("drop", { ...given, dataTransfer: data })
                                       : new ClipboardEvent("paste", { ...given, clipboardData: data }));
}"""
