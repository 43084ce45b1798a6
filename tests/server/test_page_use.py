"""The page at /, in a browser: a conversation's ways, settings, what does not go well, and what is kept."""

import json
import re
from pathlib import Path

import pytest
from adapters.by_hand import made, nano_with
from browsing import CHAT, SHAPES, Browser, Page, answered, ask, expect, opened, prompt, reply, says, set_up
from serving import Running, serving

pytestmark = pytest.mark.full


def test_a_clip_is_attached_and_seen_and_what_is_neither_is_refused(page: Page) -> None:
    page.locator("#files").set_input_files([SHAPES.parent / "moving.mp4", SHAPES.parents[2] / "LICENSE"])
    expect(page.locator("#notice")).to_contain_text("LICENSE")
    answer = ask(page, "Which way does the circle move?")
    expect(answer.locator("> .prose")).to_contain_text(re.compile("left|right|up|down"))


def test_edit_and_regenerate_replace_what_follows_and_show_what_was_reused(page: Page) -> None:
    ask(page, "What is 34 + 58?")
    answered(page).get_by_role("button", name="Regenerate").click()
    figures = answered(page).locator(".figures")
    expect(figures).to_have_text(re.compile(r"\d+ tokens · [\d.]+ tokens/s · .* [1-9]\d* of \d+ prompt tokens reused"))
    expect(prompt(page)).to_be_focused()
    ask(page, "Add 10 to that.")
    page.get_by_role("button", name="Edit the message").first.click()
    edited = page.get_by_role("textbox", name="Edited message")
    edited.press("Escape")
    expect(page.get_by_role("article")).to_have_count(4)
    page.get_by_role("button", name="Edit the message").first.click()
    edited.fill("What is 34 + 59?")
    edited.press("Enter")
    expect(page.get_by_role("article")).to_have_count(2)
    expect(answered(page).locator("> .prose")).to_have_text("93")


def test_an_answer_is_held_to_the_schema_of_the_settings(page: Page) -> None:
    set_up(page, thinking="off", schema='{"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"]}')
    assert json.loads(ask(page, "What is 34 + 58?").locator("> .prose").inner_text()) == {"a": 7}


def test_settings_are_kept_and_sent(page: Page) -> None:
    requests = reply(page, "Yes.")
    ask(page, "One")
    set_up(page, thinking="on", budget="20", temperature="0", max_tokens="99", system="Be brief.")
    page.reload()
    ask(page, "Two")
    first, second = requests
    assert first == {
        "messages": [{"role": "user", "content": "One"}], "stream": True, "stream_options": {"include_usage": True}
    }  # fmt: skip
    assert second == first | {
        "messages": [{"role": "system", "content": "Be brief."}, *first["messages"],
                     {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Two"}],
        "chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 20, "temperature": 0,
        "max_tokens": 99,
    }  # fmt: skip


def test_settings_in_force_are_told_beside_the_message(page: Page) -> None:
    told = page.get_by_role("button", name="Settings: ")
    set_up(page, key="none")
    expect(told).to_have_count(0)
    set_up(page, thinking="off", budget="9", temperature="0", max_tokens="99", system="Be brief.", schema="{}")
    expect(told).to_have_text("thinking off, temperature 0, at most 99 tokens, system prompt, schema")
    page.reload()
    told.click()
    expect(page.locator("[name=system]")).to_have_value("Be brief.")


@pytest.mark.parametrize(
    ("field", "value"), [("schema", "{"), ("schema", "[]"), ("temperature", "3"), ("max_tokens", "1.5")]
)
def test_settings_that_cannot_be_are_told_and_not_saved(page: Page, field: str, value: str) -> None:
    set_up(page, **{field: value})
    expect(page.get_by_role("alert")).not_to_be_empty()
    expect(page.locator(f"[name={field}]")).to_be_focused()
    assert page.evaluate("localStorage.getItem('settings')") is None


# --- while an answer comes -------------------------------------------------------------------------------------------

STREAM = """() => {
  const { fetch } = globalThis;
  globalThis.fetch = async (path, options) => !path.endsWith("completions") ? fetch(path, options) :
    new Response(new ReadableStream({ start(to) {
      globalThis.say = (text) => to.enqueue(new TextEncoder().encode(text));
      globalThis.end = () => to.close();
    } }));
}"""


def test_how_far_the_prompt_is_read_is_shown_and_told_at_each_quarter(page: Page) -> None:
    page.evaluate(STREAM)
    page.evaluate("""() => {
      globalThis.told = [];
      globalThis.now = 0;
      performance.now = () => now;
      const status = document.querySelector("[role=status]");
      new MutationObserver(() => told.push(status.textContent)).observe(status, { childList: true });
    }""")
    prompt(page).fill("Long")
    page.keyboard.press("Enter")
    reading = page.locator(".reading")
    expect(reading).to_be_visible()
    page.evaluate("say(': reading 1 of 4096\\n\\n')")
    page.evaluate("() => new Promise(requestAnimationFrame)")
    expect(reading).to_be_empty()  # of a short prompt nothing is told
    page.evaluate("now = 1000")
    for comment, text in {
        "waiting": "Waiting for the model", "reading 512 of 4096": "Reading the prompt, 12 %",
        "reading 1536 of 4096": "Reading the prompt, 37 %", "reading 2000 of 4096": "Reading the prompt, 48 %",
    }.items():  # fmt: skip
        page.evaluate(f"say(': {comment}\\n\\n')")
        expect(reading).to_have_text(text)
    page.evaluate("(text) => say(text)", says("Yes."))
    expect(reading).to_be_hidden()
    page.evaluate("end()")
    answered(page)
    quarters = ["Reading the prompt, 0 %", "Reading the prompt, 25 %"]
    assert page.evaluate("told") == ["Waiting for the model", *quarters, "Yes.\n"]


def test_the_list_marks_the_conversation_that_is_being_answered(page: Page) -> None:
    page.evaluate(STREAM)
    prompt(page).fill("First")
    page.keyboard.press("Enter")
    first = page.get_by_role("button", name="First", exact=True)
    expect(first).to_have_accessible_description("Being answered")
    page.get_by_role("button", name="New", exact=True).click()
    expect(first).to_have_accessible_description("Being answered")
    page.evaluate("(text) => { say(text); end(); }", says("Yes."))
    expect(first).to_have_accessible_description("")


def test_the_end_stays_in_view_unless_one_scrolls_up(page: Page) -> None:
    reply(page, "\n\n".join(["long"] * 40))
    page.locator("#files").set_input_files([SHAPES] * 8)
    figures = ask(page, "One").locator(".figures")
    expect(figures).to_be_in_viewport()
    page.locator(".media img").first.evaluate("(image) => { image.style.maxHeight = 'none'; image.height = 2000; }")
    expect(figures).to_be_in_viewport()
    page.unroute(CHAT)
    page.evaluate(STREAM)
    prompt(page).fill("Two")
    page.keyboard.press("Enter")
    page.mouse.move(600, 300)
    page.mouse.wheel(0, -400)
    scrolled = "document.querySelector('#scroll').scrollTop"
    page.wait_for_function(
        f"() => (globalThis.before = {scrolled}) + 800 < document.querySelector('#scroll').scrollHeight"
    )
    page.evaluate("(text) => say(text)", says("\n\n".join(["more"] * 40)))
    expect(page.get_by_role("article").last).to_contain_text("more")
    assert page.evaluate(f"before === {scrolled}")
    page.evaluate("end()")


# --- what does not go well -------------------------------------------------------------------------------------------


def test_what_the_api_refuses_is_shown_in_its_words(page: Page, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(SHAPES.read_bytes()[:600])
    page.locator("#files").set_input_files(tmp_path / "cut.png")
    with page.expect_response(CHAT) as told:
        ask(page, "What do you see?")
    message = re.sub(r"a data: URI of \d+ characters \(.*?\)", "cut.png", told.value.json()["error"]["message"])
    assert "cut.png" in message
    expect(answered(page).locator(".note")).to_have_text(message)
    expect(page.get_by_role("status")).to_have_text(message)


def test_a_file_is_named_where_the_refusal_says_nothing_of_it(page: Page) -> None:
    error = {"message": "too small", "param": "messages.3.content.1.image_url"}
    reply(page, "Yes.")
    ask(page, "One")
    set_up(page, system="Be brief.")
    page.locator("#files").set_input_files([SHAPES.parent / "moving.mp4", SHAPES])
    reply(page, "", json.dumps({"error": error}), status=400)
    expect(ask(page, "Two").locator(".note")).to_have_text("shapes.png: too small")


@pytest.mark.parametrize(
    ("body", "kept"),
    [(says("Half an").partition("\n\n")[0] + "\n\n", "Half an"), (None, "")],
    ids=["cut", "unreachable"],
)
def test_a_lost_server_is_told_and_what_came_is_kept(page: Page, body: str | None, kept: str) -> None:
    if body is None:
        page.route(CHAT, lambda route: route.abort("connectionreset"))
    else:
        reply(page, "", body)
    for _ in range(2):
        answer = answered(page) if page.get_by_role("article").count() else ask(page, "Who are you?")
        expect(answer.locator("> .prose")).to_have_text(kept)
        expect(answer.locator(".note")).to_contain_text("server")
        page.reload()
    page.unroute(CHAT)
    page.get_by_role("button", name="Regenerate").click()
    expect(answered(page).locator(".note")).to_be_hidden()


def test_a_server_that_is_gone_is_told_until_it_is_back(page: Page) -> None:
    page.route("**/v1/models", lambda route: route.abort("connectionrefused"))
    page.reload()
    expect(page.locator("#notice")).to_contain_text("server")
    expect(page.locator("#model")).to_be_empty()
    page.unroute("**/v1/models")
    expect(page.locator("#model")).to_have_text("nano")
    expect(page.locator("#notice")).to_be_empty()


def test_a_server_that_asks_for_a_key_gets_it_from_the_settings(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    with serving(api_key_file=tmp_path / "key") as server, opened(browser, server.url) as page:
        expect(page.locator("[name=key]")).to_be_focused()
        expect(page.get_by_role("alert")).to_have_text("The server asks for a key.")
        page.keyboard.press("Escape")
        ask(page, "What is 34 + 58?").get_by_role("button", name="Enter the key").click()
        expect(page.locator("[name=key]")).to_be_focused()
        page.keyboard.type("another")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("The server does not take this key.")
        expect(page.locator("[name=key]")).to_be_focused()
        page.locator("[name=key]").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("nano")
        page.get_by_role("button", name="Regenerate").click()
        expect(answered(page).locator("> .prose")).to_have_text("92")


# --- conversations ---------------------------------------------------------------------------------------------------


def test_conversations_survive_a_reload_and_are_renamed_and_deleted(page: Page) -> None:
    listed = page.get_by_role("navigation", name="Conversations").get_by_role("listitem")
    reply(page, "Yes, `it` is.")
    page.locator("#files").set_input_files(SHAPES)
    ask(page, "First")
    page.get_by_role("button", name="New", exact=True).click()
    ask(page, "Second")
    page.reload()
    expect(page.get_by_role("article", name="You")).to_contain_text("Second")
    page.get_by_role("button", name="First", exact=True).click()
    expect(page.get_by_role("article", name="You").get_by_role("img", name="shapes.png")).to_be_visible()
    expect(answered(page).locator("> .prose code")).to_have_text("it")
    page.get_by_role("button", name="Rename First").click()
    page.keyboard.type("Another")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Another")
    page.get_by_role("button", name="Delete Another").click()
    page.keyboard.press("Escape")
    expect(listed).to_have_count(2)
    page.get_by_role("button", name="Delete Another").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(listed).to_have_count(1)
    page.reload()
    expect(listed).to_have_text(re.compile("Second"))


def test_an_edit_and_a_deletion_end_the_answer_that_is_under_way(page: Page) -> None:
    reply(page, "Yes.")
    ask(page, "One")
    page.get_by_role("button", name="Edit the message").click()
    page.unroute(CHAT)
    set_up(page, thinking="off", schema='{"type": "string", "minLength": 100000}')
    prompt(page).fill("Two")
    prompt(page).press("Enter")
    expect(page.get_by_role("article")).to_have_count(4)
    page.get_by_role("textbox", name="Edited message").fill("Three")
    page.get_by_role("button", name="Send again").click()
    expect(page.get_by_role("article")).to_have_count(2)
    expect(page.get_by_role("article", name="Answer").locator("> .prose")).to_contain_text('"')
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.get_by_role("button", name="Delete One").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.get_by_role("article")).to_have_count(0)
    page.reload()
    expect(prompt(page)).to_be_focused()
    expect(page.get_by_role("navigation").get_by_role("listitem")).to_have_count(0)


def test_nothing_is_sent_by_an_address(page: Page, nano_server: Running) -> None:
    requests = reply(page, "Yes.")
    page.goto(nano_server.url + "/?q=Hello&prompt=Hello#Hello")
    page.wait_for_load_state("networkidle")
    expect(prompt(page)).to_be_focused()
    expect(prompt(page)).to_have_value("")
    expect(page.get_by_role("article")).to_have_count(0)
    assert not requests


@pytest.mark.full
def test_of_several_models_the_one_that_was_chosen_answers_and_stays_chosen(browser: Browser) -> None:
    with serving(lambda: nano_with(a=made(1), b=made(2))) as server, opened(browser, server.url) as page:
        choice = page.get_by_role("combobox", name="Model")
        expect(choice.locator("option")).to_have_text(["nano", "nano:a", "nano:b"])
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.post_data or "") if request.method == "POST" else None)
        ask(page, "What is 34 + 58?")
        choice.select_option("nano:b")
        page.get_by_role("button", name="Regenerate").click()
        answered(page)
        page.reload()
        expect(choice).to_have_value("nano:b")
        page.get_by_role("button", name="Regenerate").click()
        answered(page)
        assert [json.loads(body)["model"] for body in sent] == ["nano", "nano:b", "nano:b"]


def test_one_model_leaves_no_choice(page: Page) -> None:
    expect(page.locator("#model")).to_have_text("nano")
    expect(page.get_by_role("combobox", name="Model")).to_be_hidden()
