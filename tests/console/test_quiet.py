"""--quiet: standard error stays empty but for errors, in every command."""

import importlib
import io
import json
import sys
import time
import warnings
from pathlib import Path

import pytest
from tasks.tools import WEATHER_TOOLS

from mlx_qwen35.commands import chat, generate
from mlx_qwen35.commands.chat.orders import help_text
from mlx_qwen35.commands.umbrella import COMMANDS
from mlx_qwen35.console import progress
from mlx_qwen35.console.notices import be_quiet, quiet, tell
from mlx_qwen35.console.progress import Step
from mlx_qwen35.console.run import as_command
from mlx_qwen35.convert.progress import bytes_bar
from mlx_qwen35.errors import InputError

PICTURE = str(Path(__file__).parents[2] / "examples/pictures/shapes.png")


@pytest.fixture(params=[False, True], ids=["told", "quiet"])
def given(request):
    be_quiet(request.param)
    yield request.param
    be_quiet(False)


def test_notices_are_told_without_it_alone(given, capsys):
    tell("a notice")
    assert capsys.readouterr().err == ("" if given else "a notice\n")


def test_progress_is_shown_without_it_alone(given, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SELDOM", 0.0)
    shown, end = "", time.monotonic() + (0.2 if given else 60)  # nothing comes soon, or something does
    with Step("a step"):
        while not shown and time.monotonic() < end:
            shown = capsys.readouterr().err
            time.sleep(0.001)
    assert bool(shown) is not given
    bar = bytes_bar("writing", 10)
    bar.update(10)
    bar.close()
    assert bool(capsys.readouterr().err) is not given


def test_warnings_are_told_without_it_alone(capsys, given):
    with as_command("mlx_qwen35.a", tuned=False):
        warnings.simplefilter("always")
        warnings.warn("slow", stacklevel=1)
    assert bool(capsys.readouterr().err) is not given


def test_errors_are_always_told(capsys, given):
    with pytest.raises(SystemExit), as_command("mlx_qwen35.a", tuned=False):
        raise InputError("option_missing", "x")
    assert capsys.readouterr().err == "mlx_qwen35.a: error: x [option_missing]\n"


def test_it_belongs_to_one_command():
    with as_command("mlx_qwen35.a", tuned=False):
        be_quiet(True)
    assert not quiet()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_it(name):
    words = ["--quiet", "zsh"] if name == "completion" else ["--quiet"]
    try:
        assert importlib.import_module(COMMANDS[name][0]).parser().parse(words).quiet and quiet()
    finally:
        be_quiet(False)


def run(command, monkeypatch, capsys, *words: str, stdin: str = "") -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["mlx_qwen35", *words])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    try:
        command.main()
    except SystemExit as ended:
        assert not ended.code
    out = capsys.readouterr()
    return out.out, out.err


def test_generate_leaves_standard_error_empty(monkeypatch, capsys):
    words = ("--model", "nano", "--prompt", "What is 34 + 58?", "--max-tokens", "4", "--image", PICTURE)
    assert run(generate, monkeypatch, capsys, *words)[1]
    out, err = run(generate, monkeypatch, capsys, *words, "-q")
    assert out and not err


def test_chat_answers_a_command_and_asks_for_a_result(monkeypatch, capsys, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(WEATHER_TOOLS[:1]))
    call = json.dumps({"city": "Paris"})
    words = ("--model", "nano", "--temp", "0", "--no-enable-thinking", "-q")
    lines = ("/help", "/set seed 7", f"/tools {tools}", "What is the weather in Paris?")
    _, err = run(chat, monkeypatch, capsys, *words, stdin="\n".join(lines))
    assert err.startswith(f"{help_text()}\nseed: 7\n") and f"result of get_weather({call})?" in err
    assert err.count("\n") == help_text().count("\n") + 4  # and nothing else


def test_chat_leaves_standard_error_empty(monkeypatch, capsys):
    words = ("--model", "nano", "--max-tokens", "4")
    assert run(chat, monkeypatch, capsys, *words, stdin="Hi\n")[1]
    out, err = run(chat, monkeypatch, capsys, *words, "-q", stdin="Hi\n")
    assert out and not err
