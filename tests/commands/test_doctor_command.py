"""mlx_qwen35.doctor: every section is there on any machine, and says what does not apply."""

import functools
import json
import re
import sys
import time
import warnings

import mlx.core as mx
import pytest

from mlx_qwen35.backend import CUDA, METAL, TF32, assume
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.console.run import as_command
from mlx_qwen35.doctor import check, facts, main
from mlx_qwen35.doctor.check import PROMPTS, SAMPLE_LAYERS, Speed, measure, sample_model
from mlx_qwen35.machine.chip import MEGABYTES, OPERATIONS
from mlx_qwen35.model.enabled import EnabledLayers
from mlx_qwen35.model.model import Model

TINY = parse_config(geometry("tiny")).text


@pytest.fixture
def run(monkeypatch, capsys):
    """(arguments) -> (exit status, stdout, stderr), in this process; without --model a tiny model stands for the 4B."""
    monkeypatch.setattr(check, "sample_model", lambda _, dtype, limit: sample_model(TINY, dtype, limit))
    monkeypatch.setattr(check, "measure", functools.partial(measure, seconds=0.0))

    def doctor(*arguments: str) -> tuple[int, str, str]:
        try:
            main(arguments)
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        out = capsys.readouterr()
        return status, out.out, out.err

    return doctor


def sections(out: str) -> dict[str, dict[str, str]]:
    """The printed report, read back."""
    verdict, begin, *blocks = out.strip().split("\n\n")
    assert begin == "mlx_qwen35.doctor, paste from here" and blocks[0].startswith("verdict\n")
    assert all(line in blocks[0] for line in verdict.splitlines())
    parts = [block.split("\n") for block in blocks]
    return {title: dict(re.fullmatch(r"  (.+?): (.*)", line).groups() for line in rest) for title, *rest in parts}


SAMPLE = "no --model: 4 layers and the head of the 4B, random weights in 4 bit"


@pytest.mark.skipif(sys.platform == "darwin", reason="says what does not apply off a Mac")
def test_off_a_mac_every_section_is_there_and_says_what_does_not_apply(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    report = sections(out)
    assert list(report) == ["verdict", "machine", "settings of MLX", SAMPLE, "kernels", "check"]
    assert list(report["machine"]) == ["chip", "memory", "system", "MLX computes on", "versions"]
    assert report["machine"]["MLX computes on"] == "the CPU"
    assert f"mlx {mx.__version__}" in report["machine"]["versions"]
    assert report["settings of MLX"].pop(TF32).endswith("products of float32 matrices have full precision")
    assert report["settings of MLX"] == dict.fromkeys((OPERATIONS, MEGABYTES), "does not apply: there is no Apple GPU")
    assert report[SAMPLE]["dtype"].startswith("float32: the CPU computes in 16-bit types 10 to 40 times slower")
    assert "up to a context of 4,096; " in report[SAMPLE]["tokens prefilled at a time"]
    assert "262,144" in report[SAMPLE]["tokens prefilled at a time"]
    assert report[SAMPLE]["attention over many queries"] == "in tiles of queries, by our own code"
    table = report["kernels"].pop("rotary table")
    assert table.startswith("computed on the CPU; ") and "e-08 at 1,048,575" in table
    assert list(report["kernels"]) == ["gated_delta", "norm_rotary", "add_norm", "attention without scores"]
    assert set(report["kernels"].values()) == {
        "does not apply: MLX computes on the CPU, by its own operations"
    }
    assert list(report["check"]) == ["prefill", "decoding", "steps of 2, 3, 4 tokens", "peak memory"]


def test_of_a_model_its_own_dtype_and_contexts_are_shown_and_its_own_speed(run):
    status, out, _ = run("--model", "nano", "--dtype", "float16")
    report = sections(out)
    assert status == 0 and list(report)[3] == "model nano"
    assert report["model nano"]["dtype"] == "float16, as asked for"
    assert "estimate" not in out


def test_the_file_holds_what_is_printed(run, tmp_path):
    _, out, _ = run("--no-check", "--json", str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == sections(out)
    assert "check" not in sections(out)


def test_json_on_standard_output_takes_the_place_of_the_report(run):
    _, out, _ = run("--no-check", "--json")
    assert list(json.loads(out)) == ["verdict", "machine", "settings of MLX", SAMPLE, "kernels"]


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_the_first_lines_say_whether_all_is_well_and_how_fast_it_is(run):
    _, out, _ = run("--model", "nano")
    state, speed = out.splitlines()[:2]
    assert state == "All is well: MLX computes on the CPU." and re.fullmatch(r"Measured: [\d.]+ .* [\d.]+ .*\.", speed)


def test_what_is_not_well_is_named(on_chip):
    ran, off = EnabledLayers(23, 24), EnabledLayers(0, 8)
    with assume(METAL):
        assert facts.verdict({"a": ran, "none of its kind": EnabledLayers(0, 0)}, None, 1)["state"].startswith("All is")
        state = facts.verdict({"a": ran, "b": off}, None, 1)["state"]
        assert state.startswith("Not all is well") and "kernel b " in state and "kernel a " not in state
    on_chip("Apple M1")
    state = facts.verdict({}, None, 1)["state"]
    assert state.startswith("Not all is well") and "CPU" in state


def test_the_speed_of_the_sample_is_called_an_estimate():
    speed = Speed(100, 1.5, layers_seconds=0.02, head_seconds=0.5, peak_bytes=3)
    assert facts.verdict({}, speed, 1)["speed"] == "Measured: 1.9 tokens a second, 50.0 of a prompt."
    assert "estimate" in facts.verdict({}, speed, 8)["speed"]


# --- settings --------------------------------------------------------------------------------------------------------


def test_on_an_m1_the_settings_and_who_set_them_are_shown(run, on_chip, monkeypatch):
    on_chip("Apple M1")
    monkeypatch.setenv(MEGABYTES, "77")
    monkeypatch.delenv(TF32)
    report = sections(run("--no-check")[1])
    assert report["machine"]["chip"].startswith("Apple M1, ")
    assert report["settings of MLX"].pop(TF32).startswith("0, set by mlx_qwen35's commands; ")
    assert report["settings of MLX"] == {
        OPERATIONS: "1000, set by mlx_qwen35's commands on M1 to M4", MEGABYTES: "77, set by you",
    }  # fmt: skip


def test_where_nothing_is_set_mlx_s_own_settings_hold(run, on_chip):
    on_chip("Apple M5")
    settings = sections(run("--no-check")[1])["settings of MLX"]
    assert settings[OPERATIONS] == settings[MEGABYTES] == "MLX's own"


@pytest.mark.parametrize(
    ("chosen", "stored", "asked", "text"),
    [
        (mx.float16, mx.bfloat16, None, "float16: this chip has no arithmetic for bfloat16"),
        (mx.bfloat16, mx.bfloat16, None, "bfloat16, as the weights are stored"),
        (mx.bfloat16, mx.bfloat16, "bfloat16", "bfloat16, as asked for"),
    ],
)
def test_the_dtype_is_shown_with_its_reason(chosen, stored, asked, text):
    with assume(METAL):
        assert facts.dtype(chosen, stored, asked) == text


@pytest.mark.parametrize("gpu", [METAL, CUDA], ids=lambda gpu: gpu.name)
def test_kernels_are_shown_with_their_self_checks_and_layers(gpu):
    with assume(gpu):
        shown = facts.kernels({"a": EnabledLayers(24, 24), "b": EnabledLayers(0, 8), "c": EnabledLayers(7, 8)})
    assert shown == {
        "a": "agrees with its reference; runs in 24 of 24 layers", "b": "switched off; runs in 0 of 8 layers",
        "c": "agrees with its reference; runs in 7 of 8 layers",
    }  # fmt: skip


def test_a_package_that_is_not_there_is_said_to_be_missing():
    assert facts._version("no-such-package-anywhere") == "no-such-package-anywhere not installed"


def test_a_warning_is_one_line_on_standard_error_and_ends_nothing(capsys):
    with as_command("a command"), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("the kernel is off", RuntimeWarning, stacklevel=1)
    assert capsys.readouterr().err == "a command: warning: the kernel is off\n"


# --- the probe -------------------------------------------------------------------------------------------------------


def test_the_probe_shows_the_largest_activation_of_each_layer(run, tmp_path):
    (tmp_path / "text.txt").write_text("Grüße! 1 + 1 = 2", encoding="utf-8")
    status, out, _ = run("--model", "nano", "--no-check", "--probe", "--text", str(tmp_path / "text.txt"))
    stream = sections(out)["residual stream"]
    layers = parse_config(json.loads((resolve("nano") / "config.json").read_text())).text.num_hidden_layers
    (summary,) = (text for name, text in stream.items() if re.fullmatch(r"largest over \d+ tokens", name))
    assert status == 0 and len(stream["after each layer"].split()) == layers
    assert "float16 has room" in summary


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--plot", "a.png"], "option_no_effect"),
        (["--text", "a.txt"], "option_no_effect"),
        (["--model", "nano", "--text", "a.txt"], "option_no_effect"),
        (["--probe"], "option_no_effect"),
        (["--revision", "main"], "option_no_effect"),
        (["--probe", "--revision", "main"], "option_no_effect"),
        (["--model", "nano", "--probe", "--text", "no/such.txt"], "text_unreadable"),
        (["--model", "no/such/folder"], "model_not_found"),
    ],
)
def test_what_has_no_effect_or_cannot_be_read_is_refused(run, arguments, code):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and err.startswith("mlx_qwen35.doctor: error: ") and f"[{code}]" in err


def test_a_text_that_is_not_utf_8_is_refused(run, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    status, _, err = run("--model", "nano", "--no-check", "--probe", "--text", str(tmp_path / "text.txt"))
    assert status == 2 and "[text_unreadable]" in err


# --- the check -------------------------------------------------------------------------------------------------------


def test_the_sample_is_the_first_layers_and_the_whole_head_of_a_model_of_finite_activations():
    model = sample_model(TINY, mx.float16, 10**9)
    assert len(model.layers) == SAMPLE_LAYERS and model.dtype == mx.float16
    assert model.config.vocab_size == TINY.vocab_size
    packed = [p for layer in model.layers for p in layer.mlp.gate_up.products] + [model.embed_tokens]
    assert all((p.quantization.bits, p.scales.dtype) == (4, mx.float16) for p in packed)
    logits = model(mx.array([list(range(40))]))
    assert logits.dtype == mx.float16 and mx.isfinite(logits).all().item()
    assert logits.astype(mx.float32).var().item() > 0


class Clock:
    """A clock that a model's passes advance: a second for each 64 tokens read, a quarter for each step that decodes.

    Of that quarter the head takes a fifth. read: tokens of each prompt; done: when the last of them was read.
    """

    def __init__(self, monkeypatch):
        self.now, self.done, self.read = 0.0, 0.0, []
        hidden, logits = Model.hidden, Model.logits

        def layers(model, tokens, *given, **options):
            if tokens.shape[1] >= PROMPTS[0]:
                self.read.append(tokens.shape[1])
                self.now += tokens.shape[1] / 64
                self.done = self.now
            else:
                self.now += 0.2
            return hidden(model, tokens, *given, **options)

        def head(model, *given):
            self.now += 0.05
            return logits(model, *given)

        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(Model, "hidden", layers)
        monkeypatch.setattr(Model, "logits", head)


@pytest.mark.parametrize(
    ("seconds", "longest"),
    # each takes twice as long as the one before
    [(0.0, 32), (1.4, 32), (2.5, 64),
     *(pytest.param(s, n, marks=pytest.mark.full) for s, n in ((10.0, 256), (1000.0, PROMPTS[-1])))],
)
def test_prompts_grow_as_long_as_the_time_allows(monkeypatch, seconds, longest):
    model, clock = sample_model(TINY, mx.float32, 10**9), Clock(monkeypatch)
    speed = measure(model, seconds)
    assert clock.read == [n for n in PROMPTS if n <= longest]
    assert (speed.prompt, speed.prompt_seconds) == (longest, longest / 64)
    step = (speed.layers_seconds, speed.head_seconds)
    assert all(found == pytest.approx((0.2, 0.05)) for found in (step, *speed.several)) and len(speed.several) == 3
    assert clock.done <= max(seconds, 0.5)


def test_a_check_that_takes_longer_than_its_time_never_says_that_it_is_done_before_its_last_part(monkeypatch):
    model, told = sample_model(TINY, mx.float32, 10**9), []
    Clock(monkeypatch)
    measure(model, 3.0, progress=lambda done, total: told.append((done, total)))
    assert all(done < total for done, total in told[:-8]) and told[-1][0] == told[-1][1] > 0
    assert sorted(told) == told


def test_a_measured_model_has_all_figures():
    model = sample_model(TINY, mx.float32, 10**9)  # stays in memory
    speed = measure(model, seconds=0.0)
    assert speed.prompt == 32 and min(speed.prompt_seconds, speed.layers_seconds, speed.head_seconds) > 0
    assert speed.peak_bytes >= mx.get_active_memory() > 0


def test_a_whole_model_takes_as_many_times_the_layers_and_one_head():
    several = ((0.03, 0.6), (0.04, 0.8), (0.06, 1.0))
    speed = Speed(100, 1.5, layers_seconds=0.02, head_seconds=0.5, peak_bytes=3_000_000_000, several=several)
    assert speed.wide(8) == pytest.approx([0.84 / 0.66, 1.12 / 0.66, 1.48 / 0.66])
    assert speed.per_second() == pytest.approx((100 / 2, 1 / 0.52))
    assert speed.per_second(8) == pytest.approx((100 / 12.5, 1 / 0.66))
    assert facts.speed(speed, 1) == {
        "prefill": "50.0 tokens a second, of a prompt of 100", "decoding": "1.9 tokens a second",
        "steps of 2, 3, 4 tokens": (
            "1.21, 1.62, 2.04 times a step of one; with drafts a step must give more tokens than that"
        ),
        "peak memory": "3.000 GB by MLX's count",
    }  # fmt: skip
    scaled = facts.speed(speed, 8)
    assert scaled["prefill"].startswith("8.0 tokens a second, of a prompt of 100 for a model of 8 times these layers")
    assert scaled["decoding"].startswith("1.5 tokens a second for a model of 8 times")


def test_only_the_sample_is_scaled_to_the_whole_model(run, monkeypatch):
    scales = []
    monkeypatch.setattr(facts, "speed", lambda found, scale: scales.append(scale) or {})
    run()
    run("--model", "nano")
    assert scales == [8, 1]  # the 4B has 32 layers, the sample 4
