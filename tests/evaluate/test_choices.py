"""Answers of models, and what they say."""

import pytest

from mlx_qwen35.evaluate.choices import edit_distance, letter, page_similarity, same_list, same_number, same_text


def test_a_question_of_one_choice_and_lists_without_end_are_read():
    assert letter("B", ["red"]) is None and letter("(A)", ["red"]) == "A"
    assert same_list("[1, '2', 3.0]", "[1, 2, 3]") and not same_list(f"[{'9' * 5000}]", "[1]")
    assert not same_list("[one]", "[1]") and not same_list(f"[{'-' * 9999}1]", "[1]")


COLOURS = ["red", "blue", "a dark green", "green"]

LETTERS = {
    "B": "B", "(B)": "B", "B.": "B", "**B**": "B", "B. blue": "B", "blue": "B", "It is blue.": "B",
    "The answer is (B).": "B", "Answer: B": "B", "Answer: (B) blue\n\nNot A, (A) is red": "B",
    "The answer is B because A is wrong.": "B", "I think A is wrong. B": "B", "\\boxed{B}": "B",
    "$\\boxed{\\text{B}}$": "B", "Thus the correct option is **B**.": "B", '{"answer": "B"}': "B",
    "The final answer is: **B) blue**": "B", "The answer is\n\nB": "B", "**Answer: D. green**": "D",
    "The answer is A at first. No, the answer is C.": "C", "A\n\nThe picture shows the sea.": "A",
    "Perhaps (A)? Rather (B)": "B", "It is a dark green thing": "C", "A": "A", "I cannot tell": None,
    "A thing": None, "": None, "E": None,
}  # fmt: skip


@pytest.mark.parametrize("answer", LETTERS)
def test_the_letter_that_an_answer_chooses_is_found_and_none_is_guessed(answer):
    assert letter(answer, COLOURS) == LETTERS[answer]


NUMBERS = {  # answer -> (right, decimal places, whether it is)
    "12": ("12", None, True), "The answer is 1,200 cm.": ("1200", None, True), "x = 3/4": ("0.75", 2, True),
    "\\boxed{\\frac{3}{4}}": ("0.75", 2, True), "−2": ("-2", None, True), "1.454": ("1.45", 2, True),
    "1.456": ("1.45", 2, False), "7.4": ("7", None, False), "2e3": ("2000", None, True),
    "about 12%": ("12", None, True),
    "First 5, then 6. The answer is 5.": ("5", None, True), "the third version, v2": ("2", None, False),
    "nothing": ("0", None, False), "": ("0", None, False),
}  # fmt: skip


@pytest.mark.parametrize("answer", NUMBERS)
def test_a_number_is_right_within_its_decimal_places(answer):
    right, places, is_right = NUMBERS[answer]
    assert same_number(answer, right, places) is is_right


TEXTS = {
    ("It is the Eiffel Tower.", "Eiffel Tower"): True, ("24", "24.0"): True, ("the Answer is **No**", "no"): True,
    ("nowhere", "no"): False, ("", "no"): False, ("It was 25.", "24"): False,
}  # fmt: skip


@pytest.mark.parametrize("answer, right", TEXTS)
def test_words_are_found_whole_and_numbers_by_value(answer, right):
    assert same_text(answer, right) is TEXTS[answer, right]


def test_a_list_is_right_by_its_numbers():
    assert same_list("so the list is [1, 2.0]", "[1, 2]")
    assert not same_list("[2, 1]", "[1, 2]") and not same_list("1, 2", "[1, 2]") and not same_list("[x]", "[1, 2]")


def test_edit_distance_is_levenshteins():
    def by_definition(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        rest = by_definition(one[1:], other[1:]) + (one[0] != other[0])
        return min(rest, by_definition(one[1:], other) + 1, by_definition(one, other[1:]) + 1)

    words = ["", "a", "kitten", "sitting", "aabba", "babab", "ünï"]
    assert all(edit_distance(one, other) == by_definition(one, other) for one in words for other in words)


PAGE = "# Title\n\nHello **world**\n\n- one\n\n<table><tr><td>7</td></tr></table>\n\n$$a+b$$\n\n| a | b |\n\nPage 12"


def test_a_page_counts_by_its_text_without_tables_formulas_and_what_does_not_count():
    assert page_similarity(PAGE, ["Title", "Hello world", "one"], ["Page 12"]) == 1.0
    assert page_similarity("Hello word", ["Hello world"]) == pytest.approx(0.9)
    assert page_similarity("", ["Hello"]) == 0.0
