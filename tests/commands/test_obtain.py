"""From a hub's id to an answer where the original does not fit: --recipe, the offer, the conversion that is kept."""

import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from refusing import refused
from serving_hub import Repository, hub
from sharding import split
from terminal import Terminal, needs_tmux, ours

from mlx_qwen35.checkpoint.converted import folder_of, hidden
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.commands import chat, generate, serve
from mlx_qwen35.commands.obtain import RecipeOptions, load_model, settle
from mlx_qwen35.console.notices import be_quiet
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.cached import KEPT, convert_cached
from mlx_qwen35.options import options_of

LIMIT = ("--memory-limit", "0.014")  # GB: nano fits in 4 bit and not as published
ASKED = ("--prompt", "What is 34 + 58?", "--temperature", "0")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The place of conversions, of this process and of those that are started."""
    monkeypatch.setenv("MLX_QWEN35_HOME", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def kept(home) -> Path:
    """A conversion of it/nano by 4bit."""
    return convert(resolve("nano"), folder_of("it/nano", "4bit"), recipe="4bit", rounding="nearest")


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [generate, chat, serve])
def test_each_command_has_the_option(command):
    assert command.parser().parse(["--model", "it/nano", "--recipe", "8bit"]).recipe == "8bit"


def test_the_option_takes_the_recipes_that_its_help_names():
    declared = options_of(RecipeOptions)["recipe"]
    assert all(declared.checked("--recipe", name) == name and name in declared.help for name in KEPT)
    with refused("option_invalid", "bf16"):
        declared.checked("--recipe", "bf16")


def test_a_local_model_is_refused_with_the_way_to_convert_it(tmp_path, home):
    args = generate.parser().parse(["--model", "nano", "--recipe", "4bit"])
    with refused("option_no_effect", "mlx_qwen35.convert --hf-path nano"):
        load_model(args, "mlx_qwen35.generate")
    with refused("option_no_effect", str(tmp_path)):
        convert_cached(str(tmp_path))


@pytest.mark.parametrize("place", ["file/kept", "x" * 300, "~nobody of this name/kept"])
def test_a_place_for_conversions_that_cannot_be_made_is_told(place, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_QWEN35_HOME", place if place[0] == "~" else str(tmp_path / place))
    with refused("output_unwritable", "MLX_QWEN35_HOME"):
        convert_cached("it/nano")


# --- what is kept, without the network -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "why"), [(LIMIT, "does not fit"), (("--recipe", "4bit"), "using"), ((), "could not be had")]
)
def test_a_conversion_that_is_kept_is_used_and_told(kept, capfd, option, why):
    load_model(generate.parser().parse(["--model", "it/nano", *option]), "mlx_qwen35.generate")
    told = capfd.readouterr().err
    assert why in told and str(kept) in told


def test_a_damaged_conversion_is_told_of_and_neither_used_nor_in_the_way(kept, capfd):
    whole = convert(resolve("nano"), folder_of("it/nano", "mxfp4"), recipe="mxfp4", rounding="nearest")
    next(kept.glob("*.safetensors")).write_bytes(b"")
    with pytest.warns(UserWarning, match=re.escape(str(kept))):
        load_model(generate.parser().parse(["--model", "it/nano", *LIMIT]), "mlx_qwen35.generate")
    assert str(whole) in capfd.readouterr().err
    next(whole.glob("*.safetensors")).write_bytes(b"")
    with pytest.warns(UserWarning), refused("hub_failed"):  # the original is asked for, as without conversions
        load_model(generate.parser().parse(["--model", "it/nano", *LIMIT]), "mlx_qwen35.generate")


@pytest.mark.parametrize("option", [LIMIT, ("--recipe", "4bit")])
def test_the_hub_is_not_asked_where_a_conversion_that_is_kept_is_used(kept, monkeypatch, option):
    asked = []

    def request(*args, **given):
        asked.append(args)
        raise ConnectionError("down")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", request)
    args = generate.parser().parse(["--model", "it/nano", *option])
    load_model(args, "mlx_qwen35.generate")
    assert settle(args, "mlx_qwen35.serve") == kept
    assert not asked


def test_quiet_tells_nothing_of_it(kept, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # which --quiet sets
    try:
        load_model(generate.parser().parse(["--model", "it/nano", "--quiet", *LIMIT]), "mlx_qwen35.generate")
    finally:
        be_quiet(False)
    assert capfd.readouterr().err == ""


def test_a_conversion_of_another_revision_is_not_used(kept):
    args = generate.parser().parse(["--model", "it/nano", "--revision", "v1", *LIMIT])
    with refused("hub_failed"):
        load_model(args, "mlx_qwen35.generate")


# --- processes against a hub -----------------------------------------------------------------------------------------


class Runs:
    """Commands in processes of their own, against a hub."""

    def __init__(self, address: str, place: Path):
        own = {"HF_ENDPOINT": address, "HF_HOME": str(place / "hub"), "HF_HUB_OFFLINE": "0"}
        own |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        self.own = own
        self.environment = os.environ | own

    def start(self, name: str, *options: str, **given) -> subprocess.Popen:
        command = [sys.executable, "-m", "mlx_qwen35.generate", "--model", name, *ASKED, *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
        return subprocess.Popen(command, env=self.environment | given.pop("env", {}), **pipes | given)

    def __call__(self, name: str, *options: str, **given) -> tuple[int, str, str]:
        process = self.start(name, *options, **given)
        output, errors = process.communicate(timeout=120)
        return process.returncode, output, errors


@pytest.fixture
def nano(tmp_path) -> Repository:
    return Repository(split(resolve("nano"), tmp_path / "repository", 3), checksums=True)


@pytest.fixture
def run(nano, tmp_path, home) -> Iterator[Runs]:
    quantized = Repository(tmp_path / "quantized")
    repositories = {"it/nano": nano, "it/quantized": quantized, "it/gated": Repository(nano.folder, gated=True)}
    with hub(repositories) as address:
        yield Runs(address, tmp_path)


def weights(nano: Repository) -> list[str]:
    return sorted(path for path in nano.files if path.endswith(".safetensors"))


def asked(nano: Repository) -> list[tuple[str, int]]:
    """File and first byte of every request that goes to the end of a file of weights."""
    return [(p, start) for p, start, stop in nano.asked if p in weights(nano) and stop == nano.files[p].stat().st_size]


@pytest.mark.full
def test_the_whole_way_from_a_refusal_to_an_answer_and_an_answer_offline(run, nano, home):
    status, _, errors = run("it/nano", *LIMIT)
    assert status == 2 and "--model it/nano --recipe 4bit" in errors and "[memory_exceeded]" in errors
    assert not asked(nano) and not list(home.rglob("*.safetensors"))
    status, output, errors = run("it/nano", *LIMIT, "--recipe", "4bit")
    assert (status, output.split()[-1]) == (0, "92"), errors
    assert asked(nano) == [(path, 0) for path in weights(nano)]
    assert not any(place.exists() for place in hidden(folder_of("it/nano", "4bit")))
    nano.asked.clear()
    status, output, errors = run("it/nano", *LIMIT, env={"HF_HUB_OFFLINE": "1"})
    assert (status, output.split()[-1]) == (0, "92") and "4bit conversion" in errors and not nano.asked


@pytest.mark.full
def test_killed_at_several_points_it_ends_with_the_bytes_of_an_undisturbed_one(run, nano, home, tmp_path):
    first, second, third = weights(nano)
    place, running = hidden(folder_of("it/nano", "4bit"))[1] / "weights", []

    def kill_within(path: str) -> Callable[[str, int], bool]:
        """Kill the process once a part of this file is on its disk."""

        def before(at: str, position: int) -> bool:
            if at != path or position < 1 << 18:
                return False
            deadline, part = time.monotonic() + 60, place / f"{path}.part"
            while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.005)
            running[-1].kill()
            return True

        return before

    for path in (first, second, third):
        nano.before = kill_within(path)
        running.append(run.start("it/nano", "--recipe", "4bit"))
        running[-1].communicate(timeout=120)
        assert running[-1].returncode == -9
    nano.before = lambda path, position: False
    status, output, errors = run("it/nano", "--recipe", "4bit")
    assert (status, output.split()[-1]) == (0, "92"), errors
    requests = asked(nano)
    assert requests[::2] == [(path, 0) for path in (first, second, third)]
    assert [path for path, _ in requests[1::2]] == [first, second, third]
    assert all(start > 0 for _, start in requests[1::2])
    whole = convert(nano.folder, tmp_path / "whole", recipe="4bit")
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (folder_of("it/nano", "4bit") / file.name).read_bytes()


@pytest.mark.full
def test_a_second_process_is_told_which_one_converts(run, nano):
    reached, go = threading.Event(), threading.Event()

    def before(path: str, position: int) -> bool:
        if (path, position) == (weights(nano)[1], 1 << 15):
            reached.set()
            go.wait(60)
        return False

    nano.before = before
    first = run.start("it/nano", "--recipe", "4bit")
    assert reached.wait(60)
    status, _, errors = run("it/nano", "--recipe", "4bit")
    go.set()
    assert status == 2 and "[target_busy]" in errors and str(first.pid) in errors
    assert first.communicate(timeout=120) and first.returncode == 0


@pytest.mark.full
def test_ctrl_c_says_that_it_goes_on_and_ends_with_130(run, nano):
    process: list[subprocess.Popen] = []
    nano.before = lambda path, position: (path, position) == (weights(nano)[1], 1 << 16) and bool(
        process[0].send_signal(2)
    )
    process.append(run.start("it/nano", "--recipe", "4bit"))
    _, errors = process[0].communicate(timeout=120)
    assert process[0].returncode == 130 and "the same command goes on" in errors
    assert hidden(folder_of("it/nano", "4bit"))[0].is_dir()


@pytest.mark.full
def test_a_conversion_that_is_kept_asks_nobody_and_a_revision_is_another_one(run, nano):
    assert run("it/nano", "--recipe", "4bit")[0] == 0
    nano.commit, requests = "f" * 40, nano.requests
    assert run("it/nano", "--recipe", "4bit")[0] == 0
    assert nano.requests == requests and len(asked(nano)) == 3
    assert run("it/nano", "--recipe", "4bit", "--revision", "v1")[0] == 0
    assert len(asked(nano)) == 6 and folder_of("it/nano", "4bit", "v1").is_dir()


def test_a_place_for_the_download_that_cannot_be_made_is_told(run):
    place = hidden(folder_of("it/nano", "4bit"))[1]
    place.parent.mkdir(parents=True)
    place.touch()
    status, _, errors = run("it/nano", "--recipe", "4bit")
    assert status == 2 and "[output_unwritable]" in errors and "MLX_QWEN35_HOME" in errors and str(place) in errors


@pytest.mark.full
def test_what_is_quantized_or_closed_is_refused(run, nano, tmp_path):
    convert(nano.folder, tmp_path / "quantized", recipe="4bit", rounding="nearest")
    status, _, errors = run("it/quantized", "--recipe", "8bit")
    assert status == 2 and "[source_quantized]" in errors
    status, _, errors = run("it/gated", "--recipe", "4bit")
    assert status == 2 and "[hub_failed]" in errors and "hf auth login" in errors


@pytest.mark.parametrize(
    ("options", "answer", "status"),
    [
        pytest.param((), "\n", 0, marks=pytest.mark.full),
        pytest.param((), "n\n", 2, marks=pytest.mark.full),
        (("--quiet",), "", 2),
    ],
)
def test_at_a_terminal_it_is_asked_unless_nothing_may_be_written(run, options, answer, status):
    terminal, end = pty.openpty()
    process = run.start("it/nano", *LIMIT, *options, stdin=end, stderr=end)
    os.close(end)
    text, deadline = "", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.2)[0]:
            continue
        try:
            text += os.read(terminal, 4096).decode()
        except OSError:  # nobody writes to it any more
            break
        if text.rstrip().endswith("[Y/n]"):
            os.write(terminal, answer.encode())
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status and ("[Y/n]" in text) == (not options), text
    assert (output.split() or [""])[-1] == ("92" if status == 0 else "")
    os.close(terminal)


@needs_tmux
def test_the_answer_to_a_chats_offer_is_shown_and_can_be_corrected(run, tmp_path):
    own = {"MLX_QWEN35_HOME": str(tmp_path / "kept")} | run.own
    command = ours("mlx_qwen35.chat", "--model", "it/nano", *LIMIT)
    with Terminal(command, tmp_path / "user", environment=own) as terminal:
        terminal.wait("[Y/n]")
        terminal.type("no", enter=False)
        terminal.wait("[Y/n] no")
        terminal.keys("BSpace", "BSpace")
        terminal.type("y")
        screen = terminal.wait("making the 4bit conversion")
        assert "[Y/n] y\n" in screen
        terminal.keys("C-c")
        assert terminal.ended() == 130
