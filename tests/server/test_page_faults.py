"""The page at /, in a browser: what would break it, and what it says where there is nothing to show."""

import pytest
from browsing import Page, prompt, reply

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
