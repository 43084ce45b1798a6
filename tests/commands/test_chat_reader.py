"""What is a message: a line, or a block between three quotes; and what an answer is cut into."""

import io
import sys

import pytest
from refusing import refused
from rich.console import Console

from mlx_qwen35.commands.chat.markdown import blocks, rendered
from mlx_qwen35.commands.chat.reader import PlainReader
from mlx_qwen35.console.safe import safe


@pytest.fixture
def read(monkeypatch, capsys):
    """(text on standard input) -> the messages."""

    def messages(text: str, prompt: str = "") -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return list(iter(PlainReader(prompt).read, None))

    return messages


def test_each_line_of_a_pipe_is_a_message_and_nothing_is_printed(read, capsys):
    assert read("one\ntwo\n\n  three  \n") == ["one", "two", "", "three"]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_without_a_cursor_has_a_prompt_on_standard_error(read, capsys):
    assert read('"""a\nb"""\n', ">>> ") == ["a\nb"]
    assert capsys.readouterr() == ("", ">>> ... >>> ")


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        ('"""one\n\n  two\n"""\nthree\n', ["one\n\n  two", "three"]),
        ('"""one"""\n', ["one"]),
        ('"""/help\n"""\n', ["//help"]),  # // sends one slash
        ('"""Doc.""" and more\n', ['"""Doc.""" and more']),
        ('say """ to me\n', ['say """ to me']),
    ],
)
def test_three_quotes_hold_lines_together(read, typed, messages):
    assert read(typed) == messages


def test_three_quotes_must_be_closed(read):
    with refused("text_unreadable"):
        read('"""one\ntwo\n')


def test_an_answer_is_cut_where_a_block_begins_and_nothing_is_lost():
    parts = [
        "# A title\n", "Words\nand more.\n\n", "- one\n\n- two\n  more\n\n", "1. one\n2. two\n\n",
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n", "```python\nx = 1\n\n# no title\n```\n", "[1]: https://example.org\n",
    ]  # fmt: skip
    assert blocks("".join(parts)) == parts
    for part in parts:
        assert blocks(part) == [part]
    assert "".join(blocks("\n\n".join(parts))) == "\n\n".join(parts)


def test_no_control_character_is_left_but_line_ends_and_tabs():
    controls = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
    assert not set(safe(controls)) & (set(controls) - {"\n", "\t"})
    assert safe("a\r\nb\tc é 日本 👩‍💻") == "a\nb\tc é 日本 👩‍💻"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("2*3*4 = 24", "2*3*4 = 24"),
        ("(a)*b*(c) is x**2**3", "(a)*b*(c) is x**2**3"),
        ("see __init__ of a~~b~~c", "see __init__ of a~~b~~c"),
        ("*one* **two** _three_ ~~four~~, **五**六", "one two three four, 五六"),
        ("3) a\n7) b", " 3) a\n 7) b"),
        ("9. a\n10. b\n    - c", "  9. a\n 10. b\n      • c"),
        ("|a|b|\n|-|-|\n|1|2| |", " a  b\n ────\n 1  2"),
        ("|a|b|\n|-|-|\n|1|2|\n|3|4|5|", "|a|b|\n|-|-|\n|1|2|\n|3|4|5|"),
        ('[x](https://a.b "of c")', 'x (https://a.b "of c")'),
    ],
)
def test_nothing_that_was_written_is_left_out_of_an_answer(written, shown):
    console = Console(file=io.StringIO(), width=80)
    console.print(rendered(console, written), soft_wrap=True, end="")
    assert console.file.getvalue() == shown
