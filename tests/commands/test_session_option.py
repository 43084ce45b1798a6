"""--session of generate and chat: one conversation over several commands."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from mlx_qwen35 import Conversation, Session, load
from mlx_qwen35.commands import chat, generate
from mlx_qwen35.commands.chat.reader import PlainReader
from mlx_qwen35.commands.chat.screen import PlainScreen
from mlx_qwen35.commands.chat.talk import Talk
from mlx_qwen35.console.interrupt import unwound_when_ended
from mlx_qwen35.model.model import Model

PICTURE = str(Path(__file__).parents[2] / "examples" / "pictures" / "shapes.png")
GREEDY = ("--temp", "0", "--no-enable-thinking", "--max-tokens", "8")
OPTIONS = {"temp": 0, "enable_thinking": False, "max_tokens": 8}


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "talk.of mine"


@pytest.fixture
def run(monkeypatch, capsys):
    def command(main, *arguments: object, lines: str | io.StringIO = "") -> tuple[int, str, str]:
        """Exit status, and what went to standard output and standard error, progress left out."""
        monkeypatch.setattr(sys, "argv", ["mlx_qwen35.command", "--model", "nano", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines) if isinstance(lines, str) else lines)
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        out = capsys.readouterr()
        told = [line for line in out.err.splitlines(keepends=True) if not line.endswith(" ...\n")]
        return status, out.out, "".join(told)

    return command


def messages(path: Path, nano) -> list[dict]:
    with Session.load(path, *nano) as session:
        return session.conversation.messages


def test_each_prompt_is_the_next_message_of_the_conversation(run, path, nano):
    whole = Conversation(*nano, **OPTIONS)
    expected = [whole.send([{"type": "image", "image": PICTURE}, {"type": "text", "text": "What do you see?"}]).text]
    expected += [whole.send("What is 34 + 58?").text]
    first = run(generate.main, "--session", path, "--image", PICTURE, "--prompt", "What do you see?", *GREEDY)
    assert (first[0], first[1].strip()) == (0, expected[0])
    assert f"saved {path}" in first[2] and "image 1: " in first[2]
    status, out, err = run(generate.main, "--session", path, "--prompt", "What is 34 + 58?", "--json", *GREEDY)
    assert (status, json.loads(out)["text"]) == (0, expected[1])
    assert f"tokens from {path}" in err
    said = [message["content"] for message in messages(path, nano)]
    assert said[1:] == [expected[0], "What is 34 + 58?", expected[1]]
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]  # nothing is added to the name


def test_chat_goes_on_and_saves_at_its_end_and_on_demand(run, path, nano):
    _, out, _ = run(generate.main, "--session", path, "--prompt", "What is 34 + 58?", *GREEDY)
    _, said, err = run(chat.main, "--session", path, *GREEDY, lines="Add 10 to that.\n/save\nWho are you?\n")
    assert err.count(f"saved {path}") == 2
    found = messages(path, nano)
    assert [message["content"] for message in found[::2]] == ["What is 34 + 58?", "Add 10 to that.", "Who are you?"]
    assert found[1]["content"] == out.strip() and found[3]["content"] in said
    before = path.stat()
    assert run(chat.main, "--session", path, lines="/help\n")[0] == 0
    assert path.stat() == before  # there was nothing new


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_chat_whose_terminal_closes_saves_first(path, number):
    command = [sys.executable, "-m", "mlx_qwen35.chat", "--model", "nano", "--session", path, "--verbose", *GREEDY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as chat:
        chat.stdin.write("What is 34 + 58?\n")
        chat.stdin.flush()
        while not chat.stderr.readline().startswith("[prompt "):
            assert chat.poll() is None
        chat.send_signal(number)
        chat.wait(60)
    assert chat.returncode == 128 + number
    with Session.load(path, *load("nano")) as session:
        assert [message["role"] for message in session.conversation.messages] == ["user", "assistant"]


@pytest.fixture
def bothered(monkeypatch):
    """While a file is written to the disk, the process gets every signal that ends one, and Ctrl-C."""
    sync, got = os.fsync, []

    def slow(file: int) -> None:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            got.append(number)
            signal.raise_signal(number)
        sync(file)

    monkeypatch.setattr(os, "fsync", slow)
    return got


def test_a_signal_does_not_end_the_last_save(run, path, nano, bothered):
    assert run(generate.main, "--session", path, "--prompt", "Who are you?", *GREEDY)[0] == 0
    assert len(messages(path, nano)) == 2 and bothered


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_a_second_signal_does_not_end_the_save_of_the_first(path, nano, bothered, first):
    session = Session.load(path, *nano, **OPTIONS)
    talk = Talk(session.conversation, PlainReader(), PlainScreen(), session)
    with pytest.raises(SystemExit) as ended, unwound_when_ended(), closing(talk):
        talk.take("Who are you?")
        try:
            signal.raise_signal(first)
        finally:
            signal.raise_signal(signal.SIGINT)  # before the save begins
    assert ended.value.code == 128 + first and bothered
    assert len(messages(path, nano)) == 2


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)  # as nohup has it
    try:
        with unwound_when_ended():
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


class Closed(io.StringIO):
    """A standard output whose reader has left, or whose disk is full, after so many pieces."""

    def __init__(self, error: OSError, pieces: int):
        super().__init__()
        self.error, self.pieces = error, pieces

    def write(self, text: str) -> int:
        self.pieces -= bool(text.strip())
        if self.pieces < 0:
            raise self.error
        return len(text)

    def fileno(self) -> int:
        return os.open(os.devnull, os.O_WRONLY)


@pytest.mark.parametrize(("error", "status"), [(BrokenPipeError(), 1), (OSError(28, "No space left on device"), 2)])
@pytest.mark.parametrize("main", [generate.main, chat.main])
def test_an_answer_that_nobody_reads_is_saved_as_far_as_it_came(run, path, nano, monkeypatch, main, error, status):
    question = "What is 34 + 58?"
    expected = Conversation(*nano, **OPTIONS).send(question).text
    monkeypatch.setattr(sys, "stdout", Closed(error, 1))
    given = ("--prompt", question) if main is generate.main else ()
    assert run(main, "--session", path, *given, *GREEDY, lines=question + "\n")[0] == status
    asked, answer = messages(path, nano)
    assert asked["content"] == question
    assert answer["content"] and expected.startswith(answer["content"])


@pytest.mark.parametrize("main", [generate.main, chat.main])
def test_a_command_leaves_the_signals_of_the_process_as_they_were(run, path, main):
    before = [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)]
    run(main, "--session", path, *(("--prompt", "Hi") if main is generate.main else ()), *GREEDY)
    assert [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)] == before


class Broken(io.StringIO):
    """A standard input that fails behind its lines, once."""

    failed = False

    def readline(self, *_: int) -> str:
        line = super().readline()
        if not line:
            assert not self.failed, "it is read again"
            self.failed = True
            raise OSError(5, "Input/output error")
        return line


def test_a_chat_whose_input_cannot_be_read_saves_and_ends(run, path, nano):
    status, _, err = run(chat.main, "--session", path, *GREEDY, lines=Broken("Who are you?\n"))
    assert status == 2 and err.count("[text_unreadable]") == 1
    assert len(messages(path, nano)) == 2


def test_save_needs_a_file(run):
    assert "[option_missing]" in run(chat.main, lines="/save\n")[2]


def test_save_with_a_name_begins_a_file_of_its_own(run, path, nano):
    other = path.with_name("elsewhere")
    lines = f"What is 34 + 58?\n/save {other}\nWho are you?\n"
    assert run(chat.main, "--session", path, *GREEDY, lines=lines)[0] == 0
    assert not path.exists() and len(messages(other, nano)) == 4


def test_ctrl_c_while_the_prompt_is_read_keeps_what_was_read(run, path, nano, monkeypatch):
    prompt = ("--prompt", "Remember: " + ", ".join(f"k{i} is {i}" for i in range(20)))
    arguments = ("--session", path, *prompt, *GREEDY, "--prefill-step-size", "16", "--mtp", "off")
    expected = run(generate.main, *prompt, *GREEDY)[1]
    hidden, passes = Model.hidden, []

    def interrupted(self, *given, **options):
        passes.append(given)
        if len(passes) == 4:
            raise KeyboardInterrupt
        return hidden(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "hidden", interrupted)
        status, out, err = run(generate.main, *arguments)
    assert (status, out) == (130, "")
    assert "interrupted; 48 of " in err and f"saved {path}" in err
    assert messages(path, nano) == []
    status, out, err = run(generate.main, *arguments)
    assert (status, out) == (0, expected)
    assert f"48 tokens from {path}" in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("--ignore-chat-template",), "option_conflict"), (("--system-prompt", "Be long."), "option_conflict")],
)
def test_what_a_session_has_no_place_for_is_refused(run, path, arguments, code):
    run(generate.main, "--session", path, "--prompt", "Who are you?", *GREEDY)
    before = path.read_bytes()
    status, out, err = run(generate.main, "--session", path, "--prompt", "x", *arguments)
    assert (status, out, err.endswith(f"[{code}]\n")) == (2, "", True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("main", [generate.main, chat.main])
def test_a_file_that_is_no_session_is_refused_in_one_line_before_the_model_is_loaded(run, path, main):
    path.write_text("my diary")
    status, out, err = run(main, "--model", "no such model", "--session", path)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and str(path) in err and err.endswith("[session_invalid]\n")
    assert path.read_text() == "my diary"


def test_two_commands_cannot_use_one_file(run, path, nano):
    with Session.load(path, *nano):
        assert run(chat.main, "--session", path)[2].endswith("[session_busy]\n")
