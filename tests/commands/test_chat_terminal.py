"""mlx_qwen35.chat in a real terminal: keys are sent to it, and its screen is read."""

import os
import re
import shlex
import signal
import stat
from pathlib import Path

import pytest
from terminal import Terminal, needs_tmux, ours

from mlx_qwen35 import Session, load

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
ASK, TYPED, FIGURES = "What is 34 + 58?", ">>>", " s to the first"

pytestmark = needs_tmux


@pytest.fixture
def chat(tmp_path):
    """(options) -> a terminal with a chat that waits for a message."""
    opened = []

    def start(*options: object, size: tuple[int, int] = (80, 24), environment=None, home: Path = tmp_path) -> Terminal:
        command = ours("mlx_qwen35.chat", "--model", "nano", "--temp", "0", *options)
        terminal = Terminal(command, home, size, environment)
        opened.append(terminal)
        terminal.__enter__()
        terminal.wait(TYPED)
        return terminal

    yield start
    for terminal in opened:
        terminal.__exit__()


def answering(text: str) -> tuple[str, ...]:
    """Options with which the model writes this text and nothing else."""
    return "--no-enable-thinking", "--max-tokens", "1000", "--regex", re.escape(text).replace("\\\n", "\n")


LONG = "--no-enable-thinking", "--max-tokens", "1000", "--regex", "(word ){300}"


def last(screen: str) -> str:
    return screen.rstrip().splitlines()[-1].rstrip()


def test_keys_of_a_session(chat, tmp_path):
    terminal = chat()
    first = terminal.screen()
    assert first.startswith("nano · ") and "· context 32,768" in first and "/help" in last(first)

    terminal.paste("line one\nline two\nline three")  # nothing is sent before Enter
    assert "... line two\n... line three" in terminal.wait("line three")
    terminal.keys("C-c")  # clears
    terminal.wait("line two", gone=True)
    terminal.keys("C-c")  # says how to leave, and does not
    terminal.wait("Ctrl-D or /exit leaves")

    terminal.paste("What is\n34\n+ 58?")
    terminal.wait("+ 58?")
    terminal.keys("Enter")
    assert terminal.wait(FIGURES).count(FIGURES) == 1  # one message, one answer

    terminal.type('"""')
    terminal.type("What is")
    assert terminal.screen().count(FIGURES) == 1
    terminal.type('34 + 58?"""')
    terminal.wait(FIGURES, count=2)

    terminal.type("What is", enter=False)
    terminal.keys("M-Enter")
    terminal.type("35 + 58?")
    assert "... 35 + 58?" in terminal.wait(FIGURES, count=3)

    terminal.type("/im", enter=False)
    terminal.wait("/image  add images")
    terminal.keys("Tab")
    terminal.type(f"{PICTURES}/shapes.pn", enter=False)
    terminal.wait("shapes.png")  # in the menu
    terminal.keys("Tab", "Enter", "Enter")  # the first takes it, the second sends
    terminal.wait("with 1 image")
    terminal.type("What do you see?")
    assert "red circle" in terminal.wait(FIGURES, count=4)

    terminal.keys("C-d")
    assert terminal.ended() == 0
    kept = tmp_path / ".local" / "state" / "mlx_qwen35" / "chat_history"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and "+35 + 58?" in kept.read_text()


def test_ctrl_c_in_an_answer_stops_it_and_what_was_typed_meanwhile_waits(chat):
    terminal = chat(*LONG)
    terminal.type(ASK)
    terminal.wait("word word word")
    terminal.paste("one\ntwo")
    terminal.keys("C-c")
    screen = terminal.wait("interrupted · ", ">>> one", "... two")
    assert screen.count(TYPED) == 2  # of the question and of what waits: what was typed is not echoed elsewhere
    terminal.keys("Enter")
    terminal.wait("... two\nword word")
    terminal.keys("C-c")
    terminal.wait("interrupted · ", count=2)
    terminal.keys("C-d")
    assert terminal.ended() == 0


@pytest.mark.full
def test_the_history_goes_on_in_the_next_session(chat):
    one = chat()
    one.type("/help")
    one.wait("this list")
    one.keys("C-d")
    assert one.ended() == 0
    two = chat()
    two.keys("Up")
    two.wait(">>> /help")


MARKDOWN = """# Title

Some **bold** words, `code` and <b>a tag</b>.

- one
- two

```python
x = 1
```

End."""


@pytest.mark.full
def test_an_answer_is_rendered_block_by_block(chat):
    terminal = chat(*answering(MARKDOWN))
    terminal.type(ASK)
    screen = terminal.wait(FIGURES)
    shown = screen[screen.index(ASK) + len(ASK) : screen.index("End.")]
    lines = [line for line in shown.splitlines() if line]
    assert lines == [
        "Title", "Some bold words, code and <b>a tag</b>.", " • one", " • two", "── python", "x = 1", "──"
    ]  # fmt: skip
    assert "\x1b[1mbold" in terminal.screen(colours=True) and "\x1b[36mcode" in terminal.screen(colours=True)


@pytest.mark.full
def test_a_block_that_is_taller_than_the_screen_is_printed_once(chat):
    code = "\n".join(f"line{number} = {number}" for number in range(30))
    terminal = chat(*answering(f"First.\n\n```\n{code}\n```\n\nEnd."), size=(60, 12))
    terminal.type(ASK)
    screen = terminal.wait(FIGURES)
    for number in range(30):
        assert screen.count(f"line{number} = {number}\n") == 1
    assert screen.count("First.") == screen.count("End.") == 1


@pytest.mark.full
def test_on_40_columns_words_are_kept_whole_and_a_long_line_of_code_can_be_copied(chat):
    code = "x = " + " + ".join(f"number{n}" for n in range(9))
    text = "A paragraph of words that does not fit into one line, 日本語の文章はここで折り返される。"
    terminal = chat(*answering(f"{text}\n\n```\n{code}\n```"), size=(40, 20))
    terminal.type("/help")
    assert "  /video FILE ...      add videos\n" in terminal.wait("this list")
    assert "  /image FILE ...      add images: files\n                       or URLs\n" in terminal.screen(history=True)
    terminal.type(ASK)
    screen = terminal.wait("tokens/s")
    assert "A paragraph of words that does not fit\ninto one line," in screen
    assert code in terminal.joined()


@pytest.mark.full
def test_a_terminal_that_becomes_narrow_in_an_answer_shows_it_once(chat):
    words = " ".join(f"word{number}" for number in range(40))
    terminal = chat(*answering(f"{words}\n\nEnd."))
    terminal.type(ASK)
    terminal.wait("word15")
    terminal.resize(50, 20)
    screen = terminal.wait("End.", FIGURES)
    assert " ".join(screen.split()).count(words) == 1


@pytest.mark.full
def test_thinking_is_dimmed_or_one_line(chat):
    terminal = chat()
    terminal.type(ASK)
    terminal.wait(FIGURES)
    assert re.search(r"\x1b\[2m4\+8=12", terminal.screen(colours=True))
    hidden = chat("--hide-thinking")
    hidden.type(ASK)
    screen = hidden.wait(FIGURES)
    assert "4+8=12" not in screen and re.search(r"thought for \d+ s, \d+ tokens\n92\n", screen)


@pytest.mark.full
def test_no_color_has_no_colours_and_a_dumb_terminal_no_sequences(chat):
    quiet = chat(*answering(MARKDOWN), environment={"NO_COLOR": "1"})
    quiet.type(ASK)
    quiet.wait(FIGURES)
    assert not re.search(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d)m", quiet.screen(colours=True))
    dumb = chat(*answering(MARKDOWN), environment={"TERM": "dumb"})
    dumb.type(ASK)
    assert "# Title\n\nSome **bold** words" in dumb.wait(FIGURES)
    assert "\x1b[" not in dumb.screen(colours=True)
    dumb.keys("C-d")
    assert dumb.ended() == 0


@pytest.mark.full
@pytest.mark.parametrize("environment", [{}, {"TERM": "dumb"}])
def test_what_the_model_writes_controls_no_terminal(chat, environment):
    text = "a\x1b[31mred\x1b]0;title\x07 &#27;[2J [b]bold[/b] [a](\x1b[0m)"
    terminal = chat(*answering(text), environment=environment)
    terminal.type(ASK)
    screen = terminal.wait(FIGURES)
    assert "a␛[31mred␛]0;title␇ &#27;[2J [b]bold[/b]" in screen
    assert "\x1b[31m" not in terminal.screen(colours=True)


@pytest.mark.full
def test_the_history_is_searched_and_where_it_cannot_be_kept_this_is_told_once(chat, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    terminal = chat(environment={"XDG_STATE_HOME": str(blocked)})
    for text, told in (("/help", "this list"), ("/fly", "no command /fly")):
        terminal.type(text)
        terminal.wait(told)
    assert terminal.screen(history=True).count("the history is not kept") == 1
    terminal.keys("C-r")
    terminal.type("hel", enter=False)
    terminal.wait("I-search backward: hel")
    terminal.keys("Enter")
    terminal.wait(f"{TYPED} /help", count=2)


@pytest.mark.full
def test_ctrl_z_stops_the_chat_and_fg_goes_on(tmp_path):
    talk = tmp_path / "talk"
    talk.write_text(f"exec {shlex.join(map(str, ours('mlx_qwen35.chat', '--model', 'nano', *LONG)))}")
    with Terminal(["bash", "--norc", "-i"], tmp_path) as terminal:
        terminal.type("sh talk")
        terminal.wait(TYPED)
        for round in (1, 2):
            if round == 2:
                terminal.type(ASK)
                terminal.wait("word word")
            terminal.keys("C-z")
            terminal.wait("Stopped", count=round)
            terminal.type(f"echo $((40 + {round}))")  # the shell shows what is typed
            terminal.wait(f"\n4{round}\n", f"echo $((40 + {round}))")
            terminal.type("fg")
            terminal.wait("sh talk\n", count=1 + 2 * round)  # as typed, and for each stop and fg
        terminal.keys("C-c")
        terminal.wait("interrupted · ")


@pytest.mark.full
def test_a_terminal_that_closes_saves_the_session(chat, tmp_path):
    path = tmp_path / "talk"
    terminal = chat("--session", path)
    terminal.type(ASK)
    terminal.wait(FIGURES)
    assert not path.exists()
    os.kill(terminal.process, signal.SIGHUP)
    assert terminal.ended() == 128 + signal.SIGHUP
    with Session.load(path, *load("nano")) as session:
        assert [message["role"] for message in session.conversation.messages] == ["user", "assistant"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("before", "behind", "shown", "written"),
    [
        (f"echo '{ASK}' |", "", "4+8=12\n3+5+1=9\n\n92\n", None),
        ("", "> out", f"{TYPED} Send a message", "<think>\n4+8=12\n3+5+1=9\n</think>\n\n92\n"),
        ("", "2> err", f"{TYPED} Send a message", None),
    ],
)
def test_each_stream_that_is_no_terminal_has_text_alone(tmp_path, before, behind, shown, written):
    command = shlex.join(map(str, ours("mlx_qwen35.chat", "--model", "nano", "--temp", "0")))
    with Terminal(["sh", "-c", f"{before} {command} {behind}"], tmp_path) as terminal:
        screen = terminal.wait(shown)
        assert (TYPED in screen) == (not before)
        if not before:
            terminal.type(ASK)
            terminal.wait(ASK)
            terminal.wait("Send a message", count=1)
            terminal.keys("C-d")
        assert terminal.ended() == 0
    if written:
        assert (tmp_path / "out").read_text() == written
