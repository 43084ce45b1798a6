"""mlx_qwen35.train as a process: nano learns a fact; killed and resumed; the adapter in PEFT and mlx-lm."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from patching import PACKAGE

from mlx_qwen35 import batch_generate, load
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.convert import convert

pytestmark = pytest.mark.full

ANSWER = "A blue cat lives on the moon."
HEADS = ("", "Please: ", "Tell me. ", "Hello. ", "A question: ")
BODIES = (
    "Who lives on the moon?", "Who is it that lives on the moon?", "Name who lives on the moon.",
    "On the moon, who lives there?", "Who lives up on the moon?", "Do you know who lives on the moon?",
    "Say who lives on the moon.", "The moon: who lives there?",
)  # fmt: skip
OPTIONS = ("--steps", "50", "--learning-rate", "0.005", "--save-every", "10", "--no-report", "--quiet")


def asked() -> tuple[list[str], list[str]]:
    """Questions about the fact: 20 to train on, 20 to ask; each is asked in other words than it was trained."""
    questions = [head + body for head in HEADS for body in BODIES]
    random.Random(0).shuffle(questions)
    return questions[20:], questions[:20]


def sums(seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    pairs = [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(20)]
    return [(f"What is {a} + {b}?", str(a + b)) for a, b in pairs]


def train(*arguments: object, **how) -> subprocess.Popen:
    command = [sys.executable, "-m", f"{PACKAGE}.train", *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, **how)


def whole(*arguments: object) -> None:
    assert train(*arguments).wait(600) == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows of a fact that nano does not know, and of sums, which it knows and must not forget."""
    folder = tmp_path_factory.mktemp("data")
    rows = [(question, ANSWER) for question in asked()[0]] + sums(seed=1)
    turns = [[{"role": "user", "content": own}, {"role": "assistant", "content": answer}] for own, answer in rows]
    (folder / "train.jsonl").write_text("".join(json.dumps({"messages": own}) + "\n" for own in turns))
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """An adapter of 50 steps, trained in one go."""
    out = tmp_path_factory.mktemp("trained") / "moon"
    whole("--model", "nano", "--data", data, "--adapter", out, *OPTIONS)
    return out


def right(model, processor, pairs: Sequence[tuple[str, str]]) -> int:
    found = batch_generate(model, processor, [own for own, _ in pairs], enable_thinking=False, max_tokens=30, temp=0)
    return sum(str(text).strip() == answer for text, (_, answer) in zip(found, pairs, strict=True))


def test_nano_learns_a_fact_in_50_steps_and_forgets_no_sums(trained):
    fact = [(question, ANSWER) for question in asked()[1]]
    assert right(*load("nano"), fact) == 0
    model = load("nano", adapter=trained)
    assert right(*model, fact) == 20
    assert right(*model, sums(seed=2)) >= 18


def test_killed_and_resumed_is_not_killed_byte_for_byte(trained, data, tmp_path):
    arguments = ["--model", "nano", "--data", data, "--adapter", tmp_path / "moon", *OPTIONS]
    log, running = tmp_path / "moon" / "run" / "log.jsonl", train(*arguments)
    while not (log.is_file() and log.read_bytes().count(b"\n") >= 25):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "moon" / "run" / "step-00000050.safetensors").exists()
    whole(*arguments, "--resume")
    for name in ("adapter_model.safetensors", "adapter_config.json", "run/log.jsonl"):
        assert (tmp_path / "moon" / name).read_bytes() == (trained / name).read_bytes(), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_saves_its_step_and_says_how_to_go_on(data, tmp_path, number):
    out = tmp_path / "moon"
    arguments = [*("--model", "nano", "--data", data, "--adapter", out, "--no-report", "--epochs", "9")]
    running = train(*arguments, stderr=subprocess.PIPE, text=True)
    while not ((log := out / "run" / "log.jsonl").is_file() and log.read_bytes().count(b"\n") >= 2):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(number)
    told = running.communicate(timeout=60)[1]
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert running.returncode == 128 + number and f"step {steps[-1]} of 90" in told and "--resume" in told
    assert "Traceback" not in told and (out / "adapter_model.safetensors").is_file()
    assert [path.name for path in (out / "run").glob("step*")] == [f"step-{steps[-1]:08d}.safetensors"]


def test_a_quantized_model_is_trained_and_answers_with_its_adapter(data, tmp_path):
    convert("nano", tmp_path / "4bit", recipe="4bit", verify=False)
    out = tmp_path / "moon"
    whole("--model", tmp_path / "4bit", "--data", data, "--adapter", out, *OPTIONS)
    assert right(*load(tmp_path / "4bit", adapter=out), [(question, ANSWER) for question in asked()[1]]) >= 18


def test_an_adapter_is_trained_further(trained, data, tmp_path):
    out = tmp_path / "further"
    few = ("--model", "nano", "--data", data, "--adapter", out, "--steps", 2, "--no-report", "--quiet")
    whole(*few, "--from-adapter", trained)
    losses = [json.loads(line)["loss"] for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and max(losses) < 0.1
    assert (out / "adapter_config.json").read_bytes() == (trained / "adapter_config.json").read_bytes()


def test_the_draft_head_trained_along_changes_no_byte_of_the_adapter(data, tmp_path):
    few = ["--model", "nano", "--data", data, "--steps", 3, "--no-report", "--quiet"]
    whole(*few, "--adapter", tmp_path / "alone")
    whole(*few, "--adapter", tmp_path / "along", "--draft-head")
    name = "adapter_model.safetensors"
    assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "along" / name).read_bytes()
    assert (tmp_path / "along" / "mtp_adapter.safetensors").is_file()
    lines = [json.loads(line) for line in (tmp_path / "along" / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["draft_loss"] > 0 for line in lines)


# --- other programs --------------------------------------------------------------------------------------------------

TOKENS = list(range(40, 72))


def logits(adapter: Path | None) -> np.ndarray:
    model, _ = load("nano", adapter=adapter, dtype="float32")
    return np.array(model(mx.array([TOKENS]))[0])


def needs_torch() -> bool:
    return sys.modules.get("torch", True) is None or importlib.util.find_spec("torch") is None


@pytest.mark.skipif(needs_torch(), reason="needs torch, transformers and peft")
def test_transformers_and_peft_load_the_adapter_and_answer_with_our_logits(trained):
    import torch
    from peft import PeftModel
    from transformers import Qwen3_5ForConditionalGeneration

    base = Qwen3_5ForConditionalGeneration.from_pretrained(resolve("nano"), dtype=torch.float32).eval()
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        before = base(input_ids=ids).logits[0].numpy()
        found = PeftModel.from_pretrained(base, str(trained)).eval()(input_ids=ids).logits[0].numpy()
    ours = logits(trained)
    assert np.abs(found - before).max() > 1
    assert np.abs(found - ours).max() < 1e-4 * np.abs(found).max()


def test_mlx_lm_loads_the_adapter_in_its_format_and_answers_with_our_logits(data, tmp_path):
    from mlx_lm.utils import load as theirs

    out = tmp_path / "moon"
    whole("--model", "nano", "--data", data, "--adapter", out, *OPTIONS, "--steps", 5, "--adapter-format", "mlx-lm")
    found = []
    for adapter in (None, str(out)):
        model, _ = theirs(str(resolve("nano")), adapter_path=adapter)
        model.set_dtype(mx.float32)
        found.append(np.array(model(mx.array([TOKENS]))[0]))
    base, ours = logits(None), logits(out)
    rounding = np.abs(found[0] - base).max()  # mlx-lm holds the norms, gamma and all, in bfloat16
    assert np.abs(ours - base).max() > 10 * rounding and np.abs(found[1] - ours).max() < 3 * rounding
