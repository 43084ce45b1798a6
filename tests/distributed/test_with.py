"""Models over several machines as a user starts them, --with or by mlx.launch: real processes over loopback."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import mlx.core as mx
import numpy as np
import pytest
from distributed.starting import REACHES, REFUSES, ROOT, SECONDS, answer, environment, processes, run, start, with_ssh
from dividing import FOURS
from geometries import changed
from mlx.utils import tree_flatten
from PIL import Image
from refusing import refused
from terminal import Terminal, needs_tmux

from mlx_qwen35 import generate, load
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.random import write_random_checkpoint
from mlx_qwen35.commands.generate import main
from mlx_qwen35.convert import convert
from mlx_qwen35.distributed.loading import load_distributed
from mlx_qwen35.model.model import Model

HERE = "127.0.0.1"
ASK = "What is 34 + 58?"
SPLITS = ("pipeline", "tensor")


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano in 4 bit."""
    out = tmp_path_factory.mktemp("packed") / "nano-4bit"
    convert("nano", out, recipe="4bit")
    return out


def text_bytes(model: Model) -> int:
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return sum(array.nbytes for array in arrays.values())


def check(found: dict, model: str | Path, split: str, ask: str = ASK, **options: object) -> None:
    """An answer is one process's, and each rank holds about half of the weights.

    About half: a pipeline's first rank has the table of tokens beside its layers, 8 % of nano; parts are whole layers.
    """
    whole, processor = load(model)
    alone = generate(whole, processor, prompt=ask, temp=0, **options)
    assert (found["text"], found["reasoning"], found["tokens"]) == (alone.text, alone.reasoning, list(alone.tokens))
    parts, total = found["rank_weight_bytes"], text_bytes(whole)
    assert found["split"] == split and len(parts) == 2
    assert all(0.4 * total < part < 0.6 * total for part in parts)
    assert sum(parts) == pytest.approx(total, rel=0.01)


def test_with_another_process_the_text_is_that_of_one():
    check(answer(run("--prompt", ASK, "--with", HERE, "--json")), "nano", "pipeline")


@pytest.mark.full
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("source", ["nano", "4bit"])
def test_ranks_of_mlx_launch_give_the_text_of_one_process(split, source, packed):
    model = packed if source == "4bit" else "nano"
    words = ("--model", model, "--temp", 0, "--json", "--split", split, "--prompt")
    check(answer(start("generate", *words, ASK, launched=True)), model, split)


@pytest.mark.full
@pytest.mark.parametrize("split", SPLITS)
def test_images_and_drafts_are_those_of_one_process(split, tmp_path):
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, :48] = (220, 30, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    words = ("--with", HERE, "--split", split, "--json", "--mtp", "on", "--image", tmp_path / "a.png")
    found = answer(run(*words, "--prompt", "What do you see?"))
    messages = [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "a.png")},
                                             {"type": "text", "text": "What do you see?"}]}]  # fmt: skip
    model, processor = load("nano")
    alone = generate(model, processor, messages, temp=0, mtp="on")
    assert (found["text"], found["tokens"]) == (alone.text, list(alone.tokens))
    assert found["mtp"]["drafted"] > 0


@pytest.mark.full
def test_ranks_of_mlx_launch_do_not_wait_for_an_end_of_input_that_never_comes():
    done = start("generate", "--model", "nano", launched=True, stdin=ASK)
    assert done.stderr.count("[option_missing]") == 1 and done.stdout == ""


@pytest.mark.full
def test_a_script_goes_on_on_rank_0_alone(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from mlx_qwen35 import generate, load_distributed\n"
        "model, processor = load_distributed('nano', split='tensor')\n"
        f"print(generate(model, processor, prompt={ASK!r}, temp=0).text, model.spread.split)\n"
    )
    command = ["mlx.launch", "-n", "2", "--backend", "ring", "--", sys.executable, str(script)]
    done = subprocess.run(
        command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("92 tensor\n", "")


@pytest.mark.full
@pytest.mark.parametrize("split", SPLITS)
def test_four_ranks_write_the_tokens_of_one_process(split, tmp_path):
    folder = tmp_path / "fours"
    write_random_checkpoint(folder, changed(FOURS, vocab_size=1026), seed=3)  # no multiple of four
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(resolve("nano") / name, folder / name)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nimport mlx.core as mx\nfrom mlx_qwen35 import load, load_distributed\n"
        "many, folder, split = sys.argv[1:]\n"
        "model, _ = load_distributed(folder, split=split) if many == 'many' else load(folder)\n"
        "cache, tokens = model.make_cache(), [7, 50, 900, 1021, 3]\n"
        "for _ in range(32):\n"
        "    logits = model(mx.array([tokens[cache.length:]]), cache)\n"
        "    tokens.append(logits[0, -1].argmax().item())\n"
        "print(tokens, model.spread and len(model.spread.weight_bytes))\n"
    )
    words = [sys.executable, str(script)]
    launched = ["mlx.launch", "-n", "4", "--backend", "ring", "--", *words, "many", str(folder), split]
    found = [
        subprocess.run(
            command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS,
            check=False,
        )
        for command in ([*words, "one", str(folder), split], launched)
    ]  # fmt: skip
    one, many = (done.stdout.rpartition(" ") for done in found)
    assert one[0] and one[0] == many[0], found
    assert (one[2], many[2]) == ("None\n", "4\n")


@pytest.mark.full
def test_a_machine_by_its_name_is_a_rank(tmp_path):
    found = answer(run("--prompt", ASK, "--with", "mini.local", "--json", env=with_ssh(tmp_path, REACHES)))
    check(found, "nano", "pipeline")
    assert set((tmp_path / "hosts").read_text().split()) == {"mini.local"}


def test_a_machine_that_cannot_be_reached_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", with_ssh(tmp_path, REFUSES)["PATH"])
    monkeypatch.setattr(sys, "argv", ["mlx_qwen35.generate", *"--model nano --prompt Hi --with mini.local".split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mini.local" in line and "Connection refused" in line and line.endswith("[peer_unreachable]")


@pytest.mark.full
def test_a_rank_that_cannot_start_ends_in_one_line_with_what_it_said():
    done = run("--prompt", ASK, "--with", f"{HERE}:/nowhere/python")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert HERE in line and "/nowhere/python" in line and line.endswith("[peer_unreachable]")


@pytest.mark.full
def test_a_folder_that_is_not_on_the_other_machine_is_told_with_the_way_to_copy_it(tmp_path, packed):
    """The other rank's home and root are others: it is started in a Python that has no such folder."""
    hides = tmp_path / "hides"
    hides.mkdir()
    (hides / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        "if os.environ.get('MLX_RANK') == '1':\n"
        "    there = pathlib.Path.is_dir\n"
        f"    pathlib.Path.is_dir = lambda own: {packed.name!r} not in str(own) and there(own)\n"
    )
    own = environment()
    own["PYTHONPATH"] = f"{hides}:{own['PYTHONPATH']}"
    done = start("generate", "--model", packed, "--prompt", ASK, "--with", HERE, env=own)
    assert done.returncode == 2
    assert f"rsync -aL {packed}/ {HERE}:{packed}/" in done.stderr and "[model_not_found]" in done.stderr


@pytest.mark.full
@pytest.mark.parametrize("words", [("--help",), ("--model", "nano", "--frobnicate", "1")])
def test_what_ends_before_a_model_is_loaded_ends_every_rank(words):
    done = start("generate", *words, launched=True)
    assert done.stdout.count("usage:") == (words == ("--help",))
    assert done.stderr.count("[option_unknown]") == (words != ("--help",))


@pytest.mark.full
@pytest.mark.parametrize("name", ["convert", "train", "doctor", "bench"])
def test_commands_for_one_process_say_so_once(name):
    done = start(name, "--model", "nano", launched=True)
    assert done.stderr.count("[ranks_unsupported]") == 1 and done.stdout == ""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--split", "tensor"), "option_no_effect"),
        (("--with", HERE, "--session", "notes.session"), "ranks_unsupported"),
        (("--with", "mini local"), "option_invalid"),
    ],
)
def test_options_that_cannot_be_kept_are_refused_before_anything_starts(words, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mlx_qwen35.generate", "--model", "nano", "--prompt", ASK, *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and f"[{code}]" in capsys.readouterr().err


def test_without_ranks_there_is_nothing_to_load_over():
    with refused("option_missing"):
        load_distributed("nano")


@contextmanager
def served(*words: str) -> Iterator[tuple[subprocess.Popen[str], dict]]:
    """A server with another process as its second rank, once it is ready; what it told."""
    command = [sys.executable, "-m", "mlx_qwen35.serve", "--model", "nano", "--port", "0", "--json", "--with", HERE]
    with subprocess.Popen(
        [*command, *words], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout
            yield server, json.loads(server.stdout.readline())
        finally:
            server.kill()


def asked(url: str, **more: object) -> httpx.Response:
    body = {"model": "nano", "messages": [{"role": "user", "content": ASK}], "temperature": 0, **more}
    return httpx.post(f"{url}/chat/completions", json=body, timeout=60)


@pytest.mark.full
@pytest.mark.parametrize("split", SPLITS)
def test_a_server_answers_reuses_what_was_read_and_ends_by_a_signal(split):
    with served("--split", split) as (server, told):
        assert told["split"] == split and len(told["rank_weight_bytes"]) == 2
        first, again = asked(told["url"]).json(), asked(told["url"], n=2).json()
        assert {choice["message"]["content"] for choice in [*first["choices"], *again["choices"]]} == {"92"}
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=60)
    assert server.returncode == 0 and "Traceback" not in errors
    gone()


def followers() -> list[int]:
    """The processes that follow rank 0s of this machine started by --with."""
    return [
        int(line.split()[0])
        for line in subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
        if "distributed.seat" in line and "mlx.launch" not in line
        and b"MLX_RANK=1\0" in Path(f"/proc/{line.split()[0]}/environ").read_bytes()
    ]  # fmt: skip


def gone() -> None:
    """Every seat ends soon."""
    until = time.monotonic() + 30
    while (left := [*processes("distributed.seat"), *processes("handover.py")]) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == []


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("split", SPLITS)
def test_a_peer_that_is_killed_ends_the_server_with_one_line(split):
    with served("--split", split) as (server, told):
        (follower,) = followers()
        body = {"model": "nano", "messages": [{"role": "user", "content": ASK}], "stream": True, "max_tokens": 4000}
        url = f"{told['url']}/chat/completions"
        with pytest.raises(httpx.TransportError), httpx.stream("POST", url, json=body, timeout=60) as stream:
            for _ in stream.iter_raw():
                subprocess.run(["kill", "-KILL", str(follower)], check=False)
        _, errors = server.communicate(timeout=60)
    assert server.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("mlx_qwen35: ")]
    assert "rank 1" in line and "Traceback" not in errors
    gone()


@pytest.mark.full
def test_rank_0_that_is_killed_leaves_no_process_behind():
    with served() as (server, _):
        server.kill()
        server.communicate(timeout=60)
        gone()


@needs_tmux
@pytest.mark.full
@pytest.mark.parametrize("split", SPLITS)
def test_a_chat_goes_on_and_back_over_two_ranks(split, tmp_path):
    command = [sys.executable, "-m", "mlx_qwen35.chat", "--model", "nano", "--temp", "0", "--with", HERE]
    with Terminal([*command, "--split", split], tmp_path, environment={"PYTHONPATH": str(ROOT)}) as terminal:
        terminal.wait(">>>")
        terminal.type(ASK)
        terminal.wait("92")
        terminal.type("/info")
        assert re.search(rf"machines +{split}", terminal.wait("weights"))
        terminal.type("/undo")
        terminal.type("What is 12 + 13?")
        terminal.wait("25")
        terminal.type("/exit")
        assert terminal.ended() == 0
    gone()
