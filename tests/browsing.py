"""A browser of these tests: Chromium without a window, at the server's page."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

try:
    from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright
    from playwright.sync_api import Error as Error  # for the tests, which import from here so that all are skipped
except ImportError:
    pytest.skip("needs the package playwright", allow_module_level=True)

SHAPES = Path(__file__).parents[1] / "examples/pictures/shapes.png"
PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHAT = "**/v1/chat/completions"
WATCH = """
globalThis.violations = [];
addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""
expect.set_options(timeout=20_000)


@contextmanager
def browsing() -> Iterator[Browser]:
    """Chromium as the system has it. The test is skipped where it has none."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"needs a browser: one of {', '.join(PROGRAMS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A page with a storage of its own. In the end nothing may have failed in it, nor offended its policy."""
    context = browser.new_context(**options)
    context.add_init_script(WATCH)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(url)
    yield page
    assert not errors and page.evaluate("violations") == []
    context.close()


def prompt(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message", exact=True)


def ask(page: Page, text: str) -> Locator:
    """Send a message, wait for the whole answer, and give it."""
    prompt(page).fill(text)
    page.keyboard.press("Enter")
    return answered(page)


def answered(page: Page) -> Locator:
    answer = page.get_by_role("article", name="Answer").last
    expect(answer.get_by_role("button", name="Regenerate")).to_be_visible()
    return answer


def sse(*chunks: Any) -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)


def says(content: str) -> str:
    """What the API streams for an answer."""
    delta = {"index": 0, "delta": {"reasoning_content": "Well.", "content": content}, "finish_reason": None}
    return sse({"choices": [delta]}, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})


def reply(page: Page, content: str, body: str | None = None, **fulfil: Any) -> list[Any]:
    """Let the page have this answer instead of the server's. The list gets the bodies of its requests."""
    requests: list[Any] = []

    def handle(route: Route) -> None:
        requests.append(route.request.post_data_json)
        route.fulfill(**{"content_type": "text/event-stream", "body": says(content) if body is None else body} | fulfil)

    page.route(CHAT, handle)
    return requests


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
