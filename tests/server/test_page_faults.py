"""The page at /, in a browser: what would break it, and what it says where there is nothing to show."""

import pytest
from browsing import CHAT, SHAPES, Browser, Page, answered, ask, expect, opened, prompt, reply, says, set_up
from serving import Running

pytestmark = pytest.mark.full


def test_the_enter_that_confirms_a_composed_word_sends_nothing(page: Page) -> None:
    requests = reply(page, "Yes.")
    prompt(page).fill("にほん")
    for key in ("{ isComposing: true }", "{ keyCode: 229 }"):  # the second: Safari's
        prompt(page).evaluate(
            f"field => field.dispatchEvent(new KeyboardEvent('keydown', {{ key: 'Enter', bubbles: true, ...{key} }}))"
        )
    page.wait_for_timeout(100)
    assert not requests and prompt(page).input_value() == "にほん"


def test_an_answer_too_deep_to_render_is_shown_as_its_text_and_kept(page: Page) -> None:
    deep = ">" * 3000 + " deep"
    reply(page, deep)
    for _ in range(2):
        answer = answered(page) if page.get_by_role("article").count() else ask(page, "How deep?")
        expect(answer.locator("> .prose")).to_have_text(deep)
        page.reload()
    page.unroute(CHAT)
    reply(page, "*Yes.*")
    expect(ask(page, "And now?").locator("> .prose em")).to_have_text("Yes.")


def test_what_was_too_deep_is_replaced_and_what_is_unchanged_is_not_rendered_again(page: Page) -> None:
    shown, left = page.evaluate(
        """async (deep) => {
          const { render } = await import("/page/render.js");
          const element = document.createElement("div");
          render(element, deep);
          render(element, "*Yes.*");
          const shown = element.textContent.trim();
          element.append("left");
          render(element, "*Yes.*");
          return [shown, element.lastChild.data];
        }""",
        ">" * 3000 + " deep",
    )
    assert shown == "Yes." and left == "left"


HOLD = """() => {
  const read = FileReader.prototype.readAsDataURL;
  FileReader.prototype.readAsDataURL = function (file) { globalThis.go = () => read.call(this, file); };
}"""


def test_what_is_sent_while_a_file_is_read_has_the_file(page: Page) -> None:
    requests = reply(page, "Yes.")
    page.evaluate(HOLD)
    page.locator("#files").set_input_files(SHAPES)
    page.wait_for_function("() => globalThis.go !== undefined")
    prompt(page).fill("What do you see?")
    for _ in range(2):
        page.keyboard.press("Enter")
    page.evaluate("go()")
    answered(page)
    (request,) = requests
    assert [part["type"] for part in request["messages"][0]["content"]] == ["image_url", "text"]
    assert request["messages"][0]["content"][1]["text"] == "What do you see?"


def test_a_file_that_cannot_be_read_is_told_and_holds_nothing_up(page: Page) -> None:
    reply(page, "Yes.")
    page.evaluate("() => { FileReader.prototype.readAsDataURL = function () { this.onerror(); }; }")
    page.locator("#files").set_input_files(SHAPES)
    expect(page.locator("#notice")).to_contain_text("shapes.png")
    expect(ask(page, "What do you see?").locator("> .prose")).to_have_text("Yes.")


@pytest.mark.parametrize(
    ("finish", "told"), [("stop", "The model said nothing."), ("length", "The answer was cut at the limit of tokens.")]
)
def test_an_answer_without_text_says_why(page: Page, finish: str, told: str) -> None:
    reply(page, "", says("\n").replace('"stop"', f'"{finish}"'))
    expect(ask(page, "Well?").locator(".note")).to_have_text(told)
    expect(page.get_by_role("status")).to_have_text(told)


@pytest.mark.parametrize(
    ("text", "attached"),
    [("a\t1\nb\t2", 0), ("", 1), ("shapes.png", 1), ("shapes.png\rother.png", 1)],
    ids=["cells", "picture", "file", "files"],
)
def test_a_paste_is_its_text_unless_that_only_names_its_files(page: Page, text: str, attached: int) -> None:
    given = prompt(page).evaluate(
        """(target, text) => {
          const clipboardData = new DataTransfer();
          clipboardData.items.add(new File(["x"], "shapes.png", { type: "image/png" }));
          if (text) clipboardData.setData("text/plain", text);
          const event = new ClipboardEvent("paste", { bubbles: true, cancelable: true, clipboardData });
          return target.dispatchEvent(event); // whether it is left to the browser, which pastes the text
        }""",
        text,
    )
    assert given is not bool(attached)
    expect(page.get_by_role("list", name="Attachments").get_by_role("listitem")).to_have_count(attached)


DENY = """
const deny = () => { throw new DOMException("Denied here.", "SecurityError"); };
Object.defineProperty(globalThis, "localStorage", { get: deny });
IDBFactory.prototype.open = deny;
"""


def test_the_page_works_without_storage_and_says_that_nothing_is_kept(browser: Browser, nano_server: Running) -> None:
    with opened(browser, "about:blank") as page:
        page.add_init_script(DENY)
        page.goto(nano_server.url + "/#gone")
        expect(page.locator("#model")).to_have_text("nano")
        requests = reply(page, "Yes.")
        page.get_by_role("button", name="Theme: system").click()
        expect(page.locator("html")).to_have_attribute("data-theme", "light")
        set_up(page, temperature="0")
        for question in ("One", "Two"):
            expect(ask(page, question).locator("> .prose")).to_have_text("Yes.")
            expect(page.locator("#notice")).to_contain_text("Denied here.")
        assert [(len(request["messages"]), request["temperature"]) for request in requests] == [(1, 0), (3, 0)]
        page.get_by_role("button", name="New", exact=True).click()
        expect(page.get_by_role("article")).to_have_count(0)
