"""Standard streams that are closed, full or begin with a mark; a folder that is gone; Ctrl-C during imports; a fork."""

import importlib
import io
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from refusing import refused

from mlx_qwen35 import load
from mlx_qwen35.console.run import as_command
from mlx_qwen35.console.streams import read_file

FULL = Path("/dev/full")
HERE = "from mlx_qwen35.console.run import as_command\nwith as_command('a'): "


def run(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, **options)


@pytest.fixture
def ends(capsys):
    """(what to run, code) -> it ended with 2 and one line on stderr, which ends with the code."""

    def ended(act, code: str) -> None:
        with pytest.raises(SystemExit) as end:
            act()
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and error.endswith(f"[{code}]\n"), error

    return ended


def printing(*words: str, flush: bool = False) -> None:
    with as_command("a", tuned=False):
        print(*words, flush=flush)


@contextmanager
def full_disk(monkeypatch):
    """Standard output is full, and given up afterwards."""
    if not FULL.exists():
        pytest.skip("there is no full disk here")
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        yield
        assert os.fstat(full.fileno()).st_rdev == os.stat(os.devnull).st_rdev, "the interpreter's last flush would fail"


COMMANDS = (
    "commands.generate", "commands.chat", "doctor.command", "bench.command", "convert.__main__", "train.command",
)  # fmt: skip


@pytest.mark.parametrize("module", COMMANDS)
def test_a_full_disk_that_the_last_flush_meets_is_one_line_of_every_command(ends, monkeypatch, module):
    """--help is written by the flush at the end alone."""
    monkeypatch.setattr(sys, "argv", ["mlx_qwen35", "--help"])
    with full_disk(monkeypatch):
        ends(importlib.import_module(f"mlx_qwen35.{module}").main, "output_unwritable")


def test_a_full_disk_met_while_text_is_written_is_one_line(ends, monkeypatch):
    with full_disk(monkeypatch):
        ends(partial(printing, "x", flush=True), "output_unwritable")


def test_text_that_standard_output_cannot_encode_is_one_line(ends, monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        ends(partial(printing, "ä"), "output_unwritable")


def test_standard_output_that_is_closed_is_one_line(ends, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    ends(partial(printing, "x"), "output_unwritable")


def test_text_for_a_closed_standard_error_does_not_go_to_standard_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    with as_command("a", tuned=False):
        print("x")
        print("y", file=sys.stderr)
    sys.stderr.close()
    assert capsys.readouterr().out == "x\n"


@pytest.mark.parametrize("module", ["commands.generate", "commands.chat"])
def test_a_closed_standard_input_is_one_line_where_it_is_read(ends, monkeypatch, module):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "argv", ["mlx_qwen35", "--model", "nano"])
    ends(importlib.import_module(f"mlx_qwen35.{module}").main, "text_unreadable")


def test_no_file_takes_the_place_of_a_closed_standard_input(tmp_path):
    """MLX reads no file whose descriptor is 0."""
    mx.save(str(tmp_path / "a.npy"), mx.ones(1))
    done = run(HERE + f"import mlx.core as mx; mx.load('{tmp_path}/a.npy')", preexec_fn=lambda: os.close(0))
    assert done.returncode == 0, done.stderr


def test_a_current_folder_that_is_gone_is_one_line(tmp_path, monkeypatch, ends):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    ends(printing, "current_folder_missing")
    with refused("current_folder_missing"):
        load("nano")


def test_an_unreadable_file_of_a_checkpoint_is_refused_by_name(checkpoint_folder, monkeypatch):
    """Simulated: the tests may run as a user that may read everything."""
    monkeypatch.setattr(os, "access", lambda file, *_: not str(file).endswith("config.json"))
    with refused("file_unreadable", checkpoint_folder() / "config.json"):
        load(checkpoint_folder())


# --- marks -----------------------------------------------------------------------------------------------------------


def test_a_mark_at_the_beginning_of_a_text_file_is_no_text(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfHello \xef\xbb\xbf")
    assert read_file("--text", tmp_path / "text") == "Hello \ufeff"


def test_a_mark_at_the_beginning_of_standard_input_is_no_text(monkeypatch):
    from mlx_qwen35.commands.generate import parser, read_prompt

    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffHello"))
    assert read_prompt(parser().parse([])) == "Hello"


@pytest.mark.parametrize("name", ["", "text/x", "~nobody-of-this-name/x", "x" * 5000])
def test_a_text_file_that_cannot_be_read_is_refused_with_its_option(tmp_path, name):
    (tmp_path / "text").write_text("")
    file = Path(name) if name.startswith("~") else tmp_path / name
    with refused("text_unreadable", "--prompt-file"):
        read_file("--prompt-file", file)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [["-m", "mlx_qwen35.generate"], ["mlx_qwen35.generate"]])
def test_ctrl_c_while_a_command_is_imported_ends_in_silence(tmp_path, start):
    """Python tells of each module that it has imported: after MLX's there are many more."""
    script = tmp_path / "mlx_qwen35.generate"
    script.write_text("from mlx_qwen35.commands.generate import main\nmain()\n")
    command = [sys.executable, "-X", "importtime", *(start if start[0] == "-m" else [str(script)]), "--help"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    for line in process.stderr:
        if line.split()[-1] == "mlx.core":
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=100)
    told = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, out, told) == (130, "", [])


def test_a_program_of_one_s_own_keeps_its_ctrl_c_and_may_fork_before_it_computes():
    code = """
import os, signal, mlx.core as mx, mlx_qwen35
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
child = os.fork()
if child == 0:
    from mlx_qwen35.machine.process import refuse_fork
    refuse_fork()
    mx.eval(mx.ones(3) + 1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = run(code, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert done.returncode == 0, done.stderr


def test_a_forked_child_of_a_process_that_has_computed_is_refused_and_does_not_hang():
    code = """
import os, mlx.core as mx
from mlx_qwen35 import InputError, generate, load
mx.eval(mx.ones(3) + 1)
child = os.fork()
if child == 0:
    codes = []
    for act in (lambda: load("nano"), lambda: generate(None, None, "hi")):
        try:
            act()
        except InputError as error:
            codes.append(error.code)
    os._exit(codes != ["process_forked"] * 2)
assert os.waitpid(child, 0)[1] == 0
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
