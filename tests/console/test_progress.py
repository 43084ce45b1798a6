"""Long steps show on standard error how far they have come; an answer that was cut in its reasoning says so."""

import io
import json
import os
import sys
import threading
import time

import pytest

from mlx_qwen35 import load
from mlx_qwen35.commands.chat import main as chat
from mlx_qwen35.commands.generate import main as command
from mlx_qwen35.commands.output import print_pieces
from mlx_qwen35.console import progress
from mlx_qwen35.console.notices import tell
from mlx_qwen35.console.progress import Step, seconds_left
from mlx_qwen35.doctor import check, probe
from mlx_qwen35.doctor.command import main as doctor
from mlx_qwen35.prompt.piece import REASONING, Piece

ASK = "What is 34 + 58?"


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture
def stderr(monkeypatch):
    """(whether it is a terminal) -> standard error, on which nothing waits to be shown."""

    def replaced(terminal: bool) -> io.StringIO:
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        for name in ("SOON", "OFTEN", "SELDOM"):
            monkeypatch.setattr(progress, name, 0.0)
        monkeypatch.setattr(progress, "TURN", 3600)
        return stream

    return replaced


def begun(stream: io.StringIO) -> None:
    until = time.monotonic() + 60
    while not stream.getvalue():
        assert time.monotonic() < until, "nothing is shown"
        time.sleep(0.001)


def test_a_quick_step_shows_nothing(capsys):
    with Step("loading", "B") as step:
        step(5, 10)
        step.say("checking")
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_step_is_one_line_that_is_written_over_and_erased(stderr):
    stream = stderr(terminal=True)
    with Step("loading", "B") as step:
        begun(stream)
        step(1_500_000, 3_000_000)
        step.say("checking")
    shown = "⠋ loading", "⠙ loading: 1.5 of 3.0 MB, 50 %", "⠙ checking", ""
    assert stream.getvalue() == "".join(f"\r\033[K{text}" for text in shown)


def test_on_a_terminal_a_step_makes_room_for_other_lines(stderr):
    stream = stderr(terminal=True)
    with Step("prefill", "tokens") as step:
        begun(stream)
        step.clear()
        print("image 1", file=stream)
        step(1, 2)
    assert stream.getvalue() == "\r\033[K⠋ prefill\r\033[Kimage 1\n\r\033[K⠙ prefill: 1 of 2 tokens, 50 %\r\033[K"


def test_a_notice_stands_on_lines_of_its_own_beside_a_step_whose_name_has_lines(stderr):
    stream = stderr(terminal=True)
    with Step("reading\n  a.png\tb.png") as step:
        begun(stream)
        tell("image 1")
        step.say("the\nend")
    tell("done")
    shown = "\r\033[K⠋ reading a.png b.png", "\r\033[Kimage 1\n", "\r\033[K⠙ the end", "\r\033[Kdone\n"
    assert stream.getvalue() == "".join(shown)


def test_the_spinner_turns_while_nothing_is_told(stderr, monkeypatch):
    stream = stderr(terminal=True)
    monkeypatch.setattr(progress, "TURN", 0.0)
    with Step("loading"):
        while not all(picture in stream.getvalue() for picture in progress.SPINNER):
            time.sleep(0.001)


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (80, "⠙ loading Qwen3.5-27B-4bit: 7.5 of 15.0 GB, 50 %"),
        (40, "⠙ loading Qwen3.5-27B-4bit: 50 %"),
        (26, "⠙ loading Qwen3.5-…: 50 %"),
    ],
)
def test_a_step_leaves_out_what_a_narrow_terminal_has_no_room_for(stderr, monkeypatch, columns, line):
    stream = stderr(terminal=True)
    stream.fileno = lambda: 2
    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((columns, 20)))
    with Step("loading Qwen3.5-27B-4bit", "B") as step:
        begun(stream)
        step(7_500_000_000, 15_000_000_000)
    assert stream.getvalue().split("\r\033[K")[2] == line


def test_what_begins_anew_is_timed_anew(stderr):
    stream = stderr(terminal=False)
    with Step("loading", "B", timed=True) as step:
        for done in (*range(5), *range(5)):
            step(done, 5)
    assert stream.getvalue().count("left") == 0


def test_a_step_that_ctrl_c_ends_while_it_starts_shows_nothing_later(stderr, monkeypatch):
    stderr(terminal=True)
    start, started = threading.Thread.start, []

    def interrupted(thread):
        started.append(thread)
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), Step("loading"):
        pass
    started[0].join(60)
    assert not started[0].is_alive()


def test_elsewhere_a_step_has_plain_lines(stderr):
    stream = stderr(terminal=False)
    with Step("reading", "tokens") as step:
        begun(stream)
        step(1024, 4096)
    assert stream.getvalue() == "reading ...\nreading: 1,024 of 4,096 tokens, 25 % ...\n"


def test_elsewhere_what_a_step_says_too_soon_after_a_line_is_shown_later(stderr, monkeypatch):
    stream = stderr(terminal=False)
    monkeypatch.setattr(progress, "SELDOM", 0.2)
    monkeypatch.setattr(progress, "TURN", 0.0)
    with Step("preparing") as step:
        begun(stream)
        step.say("writing random weights")
        while "writing" not in stream.getvalue():
            time.sleep(0.001)
        time.sleep(0.3)
    assert stream.getvalue() == "preparing ...\nwriting random weights ...\n"


def prefill_marks(done: int, *, held: int = 0, start: float = 0.0, slower: float = 1.0) -> list[tuple[int, float]]:
    """Marks of a prefill in chunks of 512, up to `done` tokens behind `held`, of 2 ms + 1 us * context a token.

    start: seconds before the first mark. slower: by how much the second half is.
    """
    marks, seconds = [], start
    for end in range(512, done + 1, 512):
        mean = held + end - 256
        seconds += 512 * (2e-3 + 1e-6 * mean) * (slower if end > done // 2 else 1)
        marks.append((end, seconds))
    return marks


@pytest.mark.parametrize("held", [0, 50_000])
@pytest.mark.parametrize("start", [0, 100])
def test_the_time_left_grows_with_the_context_and_is_exact_for_attention(held, start):
    rest = (100_000 - 8192) * (2e-3 + 1e-6 * (held + (100_000 + 8192) / 2))
    assert seconds_left(prefill_marks(8192, held=held, start=start), 100_000) == pytest.approx(rest)
    assert seconds_left(prefill_marks(8192, held=held), 8192) == 0


def test_a_machine_that_slows_down_has_more_time_left_by_the_recent_speed():
    plain, slow = (seconds_left(prefill_marks(8192, slower=slower), 16384) for slower in (1, 2))
    assert slow > 2 * plain


def test_a_prefill_that_becomes_faster_goes_on_at_the_recent_speed():
    assert seconds_left([(n, n / 100 if n < 1000 else 10 + (n - 1000) / 500) for n in range(0, 2001, 200)], 3000) == 2


def test_the_time_left_is_not_guessed_from_few_chunks_or_seconds():
    assert seconds_left([(1024, 0.0), (2048, 9.0), (3072, 18.0), (4096, 27.0)], 10_000) is None
    assert seconds_left([(n, n / 1000) for n in range(0, 2900, 100)], 10_000) is None
    assert seconds_left([(n, n / 1000) for n in range(0, 3100, 100)], 10_000) is not None


@pytest.mark.parametrize(
    ("timed", "seconds", "left"),
    [
        (True, 0.2, ", 1 s left"),
        (True, 89, ", 89 s left"),
        (True, 91, ", 2 min left"),
        (True, 5000, ", 83 min left"),
        (True, 9000, ", 2.5 h left"),
        (True, None, ""),
        (False, 89, ""),
    ],
)
def test_a_step_that_is_timed_shows_the_time_left(stderr, monkeypatch, timed, seconds, left):
    stream = stderr(terminal=False)
    monkeypatch.setattr(progress, "seconds_left", lambda marks, total: seconds)
    with Step("prefill", "tokens", timed) as step:
        begun(stream)
        step(5000, 11_000)
        step.say("writing")
        step(5000, 11_000)
    first, last = (f"{name}: 5,000 of 11,000 tokens, 45 %" for name in ("prefill", "writing"))
    assert stream.getvalue() == f"prefill ...\n{first}{left} ...\nwriting ...\n{last} ...\n"


def test_nothing_is_shown_after_the_end(stderr):
    stream = stderr(terminal=False)
    with Step("reading") as step:
        begun(stream)
        step.end()
        step(1, 2)
    assert stream.getvalue() == "reading ...\n"


@pytest.mark.parametrize(
    ("run", "arguments", "steps"),
    [
        (command, ["-p", ASK, "--max-tokens", "4"], ["loading nano", "prefill"]),
        (command, ["-p", ASK, "--max-tokens", "4", "--json"], ["loading nano", "prefill", "writing"]),
        (chat, ["--max-tokens", "4"], ["loading nano", "prefill"]),
        (doctor, ["--no-check", "--probe"], ["loading nano", "running the text"]),
    ],
)
def test_the_steps_of_a_command_are_shown_and_standard_output_has_none(monkeypatch, capsys, run, arguments, steps):
    for name in ("SOON", "OFTEN", "SELDOM"):
        monkeypatch.setattr(progress, name, 0.0)
    monkeypatch.setattr(sys, "argv", ["mlx_qwen35", "--model", "nano", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(ASK))
    try:
        run()
    except SystemExit as end:
        assert not end.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.endswith(" ...")]
    for step in steps:
        assert any(line.startswith(step) for line in lines), (step, err)
    assert " ...\n" not in out


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loading_tells_the_bytes_read_up_to_all(dtype):
    told = []
    load("nano", dtype=dtype, progress=lambda *counts: told.append(counts))
    assert all(0 < done <= total for done, total in told) and len(told) > 4
    assert sum(done == total for done, total in told) == (2 if dtype == "float16" else 1), "float16 is read twice"


@pytest.mark.full
def test_the_check_and_the_probe_tell_how_far_they_are(nano):
    told = []
    check.measure(nano[0], seconds=0.01, progress=lambda *counts: told.append(counts))
    assert len(told) > 3
    told.clear()
    probe.residual_maxima(nano[0], [5] * 300, lambda *counts: told.append(counts))
    assert told == [(256, 300), (300, 300)]


# --- an answer that was cut ------------------------------------------------------------------------------------------


def _printed(pieces, capsys) -> str:
    print_pieces(pieces, Step("reading"))
    return capsys.readouterr().out


def test_reasoning_that_was_cut_is_closed_on_standard_output(capsys):
    assert _printed([Piece("I wonder", REASONING)], capsys) == "<think>\nI wonder\n</think>\n"
    assert _printed([Piece("so\n", REASONING), Piece("92")], capsys) == "<think>\nso\n</think>\n\n92\n"


def test_reasoning_that_was_broken_off_by_an_error_is_closed_too(capsys):
    def broken():
        yield Piece("I wonder", REASONING)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        print_pieces(broken(), Step("reading"))
    assert capsys.readouterr().out == "<think>\nI wonder\n</think>\n"


@pytest.mark.parametrize(("run", "more"), [(command, []), (command, ["--json"]), (chat, [])])
@pytest.mark.parametrize(("most", "cut"), [("5", True), ("400", False)])
def test_an_answer_that_was_cut_while_thinking_says_so_and_names_the_option(monkeypatch, capsys, run, more, most, cut):
    arguments = ["--model", "nano", "--max-tokens", most, "--temp", "0", *more]
    monkeypatch.setattr(sys, "argv", ["mlx_qwen35", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(ASK))
    try:
        run()
    except SystemExit as end:
        assert not end.code
    out, err = capsys.readouterr()
    assert ("--max-tokens" in err) is cut
    if more:
        result = json.loads(out)
        assert (result["in_reasoning"], result["finish_reason"], result["text"] == "") == (
            cut, "length" if cut else "stop", cut,
        )  # fmt: skip
    else:
        assert out.count("<think>") == out.count("</think>") == 1
