"""The page at /, in a browser: how it looks, who can use it, and its modules by themselves."""

import json
import re

import pytest
from browsing import SHAPES, Browser, Page, answered, ask, expect, opened, prompt, reply, says
from serving import Running

pytestmark = pytest.mark.full
RICH = f"# Head\n\n{'long' * 200}\n\n```python\nprint({'1, ' * 100})\n```\n\n|a|b|\n|-|-|\n|{'c' * 90}|d|\n"


def test_nothing_leaves_a_screen_of_360_pixels(browser: Browser, nano_server: Running) -> None:
    width = "() => document.scrollingElement.scrollWidth"
    outside = """() => [...document.querySelectorAll("main *, #sidebar *, dialog[open], dialog[open] *")]
      .filter((e) => !e.closest(".code pre, .table, .unseen") && e.checkVisibility({ visibilityProperty: true }))
      .filter((e) => e.getBoundingClientRect().right > 360 || e.getBoundingClientRect().left < 0)
      .map((e) => e.outerHTML.slice(0, 80))"""
    with opened(browser, nano_server.url, viewport={"width": 360, "height": 640}) as page:
        reply(page, RICH)
        page.locator("#files").set_input_files([SHAPES] * 4)
        ask(page, "word" * 100)
        assert page.evaluate(width) == 360 and page.evaluate(outside) == []
        page.get_by_role("button", name="Conversations").click()
        expect(page.get_by_role("button", name="New", exact=True)).to_be_focused()
        assert page.evaluate(width) == 360 and page.evaluate(outside) == []
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Settings").click()
        assert page.evaluate(width) == 360 and page.evaluate(outside) == []


def test_the_page_is_used_by_keyboard_alone(page: Page) -> None:
    focused = """() => { const e = document.activeElement;
      return [e.ariaLabel || e.innerText || e.labels?.[0]?.innerText, getComputedStyle(e).outlineStyle]; }"""
    requests = reply(page, "`x`\n\n```\ncode\n```")
    prompt(page).press("Shift+Enter")
    page.keyboard.type("two lines")
    assert not requests
    page.keyboard.press("Enter")
    answered(page)
    assert requests[0]["messages"][0]["content"] == "\ntwo lines"
    page.get_by_role("link", name="Go to the message field").focus()
    names = []
    while not names or names[-1] != "Message":
        page.keyboard.press("Tab")
        name, outline = page.evaluate(focused)
        assert outline != "none" or name == "Message", name  # the composer's border tells of its field
        names.append(name.strip())
    assert names == [
        "New", "two lines", "Rename two lines", "Delete two lines", "Theme: system", "Settings", "Edit the message",
        "Thought for 0.0 s", "Copy the code", "code", "Copy the answer", "Regenerate the answer", "Message",
    ]  # fmt: skip


def test_every_control_has_a_name(page: Page) -> None:
    reply(page, RICH)
    ask(page, "Hello")
    page.locator("#files").set_input_files(SHAPES)
    page.get_by_role("button", name="Remove shapes.png").wait_for()
    page.get_by_role("button", name="Edit the message").click()
    for dialog in ("", "Settings"):
        if dialog:
            page.get_by_role("button", name=dialog).click()
        for role in ("button", "textbox", "spinbutton", "combobox", "link", "img", "article", "navigation", "dialog"):
            for control in page.get_by_role(role).all():
                expect(control).to_have_accessible_name(re.compile(r"\w"))


def test_the_theme_is_the_systems_until_one_is_chosen(browser: Browser, nano_server: Running) -> None:
    colour = "() => parseInt(getComputedStyle(document.body).backgroundColor.slice(4)) < 128 ? 'dark' : 'light'"
    with opened(browser, nano_server.url, color_scheme="dark") as page:
        assert page.evaluate(colour) == "dark"
        page.emulate_media(color_scheme="light")
        assert page.evaluate(colour) == "light"
        page.get_by_role("button", name="Theme: system").click()
        page.get_by_role("button", name="Theme: light").click()
        page.reload()
        assert page.evaluate(colour) == "dark"
        page.get_by_role("button", name="Theme: dark").click()
        assert page.evaluate(colour) == "light"


def test_code_and_answers_are_copied(browser: Browser, nano_server: Running) -> None:
    with opened(browser, nano_server.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        reply(page, "Run **this**:\n\n```sh\nls -l\n```")
        answer = ask(page, "How?")
        for name, text in {"Copy the code": "ls -l\n", "Copy the answer": "Run **this**:\n\n```sh\nls -l\n```"}.items():
            answer.get_by_role("button", name=name).click()
            expect(page.get_by_role("status")).to_have_text("Copied")
            assert page.evaluate("navigator.clipboard.readText()") == text


# --- the modules by themselves ---------------------------------------------------------------------------------------


def test_markdown_that_grows_ends_as_if_rendered_at_once_and_keeps_what_is_finished(page: Page) -> None:
    grown, whole, kept = page.evaluate(
        """async (text) => {
          const { render } = await import("/page/render.js");
          const [grown, whole] = [document.createElement("div"), document.createElement("div")];
          let first, kept;
          for (let end = 1; end <= text.length; end += 1) {
            render(grown, text.slice(0, end));
            if (end === 20) first = grown.firstElementChild;
            if (text.startsWith("[link]:", end)) kept = grown.firstElementChild === first;
          }
          render(whole, text);
          return [grown.innerHTML, whole.innerHTML, kept];
        }""",
        "# Head\n\nA [link] here.\n\n- one\n- two\n\n```py\nx = 1\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n"
        "[link]: https://example.org\n\nEnd.",
    )
    assert grown == whole and kept and "<table>" in whole


def test_a_stream_cut_anywhere_is_read_the_same(page: Page) -> None:
    heard = page.evaluate(
        """async (text) => {
          const { complete } = await import("/page/api.js");
          const bytes = new TextEncoder().encode(text);
          const heard = new Set();
          for (let size = 1; size < 40; size += 1) {
            globalThis.fetch = async () => new Response(new ReadableStream({
              start(to) {
                for (let at = 0; at < bytes.length; at += size) to.enqueue(bytes.slice(at, at + size));
                to.close();
              } }));
            const parts = [];
            for await (const part of complete({}, "", undefined)) parts.push(part);
            heard.add(JSON.stringify(parts));
          }
          return [...heard];
        }""",
        ": reading 9 of 36\n\n" + says("Grüße 🙂").replace("\n", "\r\n") + "data: [DONE]\n\n",
    )
    assert [json.loads(parts) for parts in heard] == [
        [{"read": 0.25}, {"reasoning": "Well."}, {"content": "Grüße 🙂"}, {"finish": "stop"}]
    ]
