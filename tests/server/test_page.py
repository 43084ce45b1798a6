"""The page at /, in a browser: asking, stopping, an image, and what it refuses. The full matrix has the rest of it."""

import base64
import re
import time

import pytest
from browsing import SHAPES, Error, Page, Route, answered, ask, expect, prompt, reply, set_up

from mlx_qwen35.server.service import Answer, Service

HOSTILE = """<img src=x onerror="globalThis.hurt = 1"> <script>globalThis.hurt = 1</script>

<iframe srcdoc="<script>parent.hurt = 1</script>"></iframe>

[click](javascript:globalThis.hurt=1) ![seen](http://127.0.0.1:9/pixel.png) <b onclick="hurt=1">bold</b>

<svg><animate onbegin="globalThis.hurt=1" attributeName="x" dur="1s"></svg>
"""


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
    expect(text).to_contain_text('"')
    page.get_by_role("button", name="New", exact=True).click()  # it goes on while one looks elsewhere
    expect(text).to_have_count(0)
    page.get_by_role("button", name="Who are you?", exact=True).click()
    expect(text).to_contain_text('"')
    (lane,) = answers[0].lanes
    request = lane.request
    assert request and not request.finished
    page.keyboard.press("Escape")
    deadline = time.monotonic() + 30
    while not request.finished and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    assert request.finish_reason == "interrupted"
    expect(answered(page).locator(".note")).to_have_text("Stopped.")
    expect(text).to_contain_text('"')


HAND_OVER = """(target, [kind, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "shapes.png", { type: "image/png" }));
  const given = { bubbles: true, cancelable: true };
  target.dispatchEvent(kind === "drop" ? new DragEvent("drop", { ...given, dataTransfer: data })
                                       : new ClipboardEvent("paste", { ...given, clipboardData: data }));
}"""


@pytest.mark.parametrize("way", ["drop", *(pytest.param(way, marks=pytest.mark.full) for way in ("paste", "button"))])
def test_an_image_is_attached_and_seen(page: Page, way: str) -> None:
    if way == "button":
        page.locator("#files").set_input_files(SHAPES)
    else:
        prompt(page).evaluate(HAND_OVER, [way, base64.b64encode(SHAPES.read_bytes()).decode()])
    expect(page.get_by_role("list", name="Attachments").get_by_role("img", name="shapes.png")).to_be_visible()
    answer = ask(page, "What do you see?")
    expect(answer.locator("> .prose")).to_have_text("A red circle and a blue square.")
    expect(page.get_by_role("article", name="You").get_by_role("img", name="shapes.png")).to_be_visible()
    expect(page.get_by_role("list", name="Attachments").get_by_role("listitem")).to_have_count(0)


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
