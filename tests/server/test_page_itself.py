"""The page at /, in a browser: what it refuses, how it looks, who can use it, and its modules."""

import json
import re
from pathlib import Path

import pytest
from browsing import Browser, Error, Page, Route, answered, ask, expect, opened, prompt, reply, says
from serving import Running

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples/pictures/shapes.png"
HOSTILE = """<img src=x onerror="globalThis.hurt = 1"> <script>globalThis.hurt = 1</script>

<iframe srcdoc="<script>parent.hurt = 1</script>"></iframe>

[click](javascript:globalThis.hurt=1) ![seen](http://127.0.0.1:9/pixel.png) <b onclick="hurt=1">bold</b>

<svg><animate onbegin="globalThis.hurt=1" attributeName="x" dur="1s"></svg>
"""
RICH = f"# Head\n\n{'long' * 200}\n\n```python\nprint({'1, ' * 100})\n```\n\n|a|b|\n|-|-|\n|{'c' * 90}|d|\n"


# --- safety ----------------------------------------------------------------------------------------------------------


def test_markup_in_an_answer_does_nothing_and_is_shown_as_text(page: Page) -> None:
    reply(page, HOSTILE)
    text = ask(page, "Hurt me").locator("> .prose")
    expect(text).to_contain_text('<img src=x onerror="globalThis.hurt = 1">')
    assert text.locator("img, script, iframe, svg, b, [onclick], [onerror], [href^=javascript]").count() == 0
    text.get_by_text("click", exact=True).click()
    expect(text.get_by_role("link", name="seen")).to_have_attribute("rel", re.compile("noopener"))
    page.reload()
    answered(page)
    assert page.evaluate("globalThis.hurt") is None


INLINE = """<script>globalThis.hurt = 1</script><img src="none" onerror="globalThis.hurt = 1"><style>* {}</style>
<p style="color: red"></p><img src="http://127.0.0.1:9/a.png"><script src="http://127.0.0.1:9/a.js"></script></body>"""


def test_the_policy_refuses_what_is_not_the_pages_own(page: Page) -> None:
    def inject(route: Route) -> None:
        served = route.fetch()
        route.fulfill(response=served, body=served.text().replace("</body>", INLINE))

    page.route(page.url, inject)
    page.goto(page.url)
    expect(prompt(page)).to_be_focused()
    with pytest.raises(Error, match="TrustedHTML"):
        page.evaluate("() => { document.body.innerHTML = '<p>'; }")
    assert sorted(page.evaluate("violations.splice(0)")) == [
        "img-src", "require-trusted-types-for", "script-src-attr", "script-src-elem", "script-src-elem",
        "style-src-attr", "style-src-elem",
    ]  # fmt: skip
    assert page.evaluate("globalThis.hurt") is None


# --- how it looks, and who can use it --------------------------------------------------------------------------------


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
          let first;
          for (let end = 1; end <= text.length; end += 1) {
            render(grown, text.slice(0, end));
            if (end === 20) first = grown.firstElementChild;
          }
          render(whole, text);
          return [grown.innerHTML, whole.innerHTML, grown.firstElementChild === first];
        }""",
        "# Head\n\nA [link] here.\n\n- one\n- two\n\n```py\nx = 1\n```\n\n|a|b|\n|-|-|\n|1|2|\n\nEnd.",
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
        ": reading\n\n" + says("Grüße 🙂").replace("\n", "\r\n") + "data: [DONE]\n\n",
    )
    assert [json.loads(parts) for parts in heard] == [
        [{"reasoning": "Well."}, {"content": "Grüße 🙂"}, {"finish": "stop"}]
    ]
