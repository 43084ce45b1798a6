"""Faults that a review found by using the commands: each stays mended."""

import json

import mlx.core as mx
import pytest
from refusing import refused
from watching import when_shown

from mlx_qwen35 import load
from mlx_qwen35.budget.plan import SHORT, plan_memory, this_machine
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.convert import convert, target
from mlx_qwen35.convert import journal as journals
from mlx_qwen35.doctor import main
from mlx_qwen35.doctor.plan import machines


@pytest.fixture
def doctor(capsys, monkeypatch):
    """Runs the command without its half minute: (status, stdout, stderr)."""
    def run(*arguments):
        status = 0
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


# --- the converter ---------------------------------------------------------------------------------------------------


def test_text_too_short_to_evaluate_on_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("")
    monkeypatch.setattr("os.pwrite", lambda *_, **__: pytest.fail("weights were written"))
    with refused("text_too_short", "2"):
        convert("nano", tmp_path / "out", recipe="4bit", evaluation=tmp_path / "text.txt")


def test_conversion_killed_in_the_evaluation_is_resumed_without_writing_the_weights_again(tmp_path, monkeypatch, capfd):
    class Killed(BaseException):
        pass

    def killed():
        raise Killed

    (tmp_path / "text.txt").write_text("What is 34 + 58?")
    options = {"recipe": "4bit", "evaluation": tmp_path / "text.txt"}
    with monkeypatch.context() as patched:
        when_shown("evaluating", killed, patched)
        patched.setattr(target, "remove", lambda *_: None)  # a killed process tidies nothing
        with pytest.raises(Killed):
            convert("nano", tmp_path / "out", **options)
    capfd.readouterr()
    out = convert("nano", tmp_path / "out", resume=True, **options)
    resumed = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("resuming: "))
    done, whole = resumed.split()[1], resumed.split()[3]
    assert done == whole != "0"
    assert not (out / journals.JOURNAL).exists()


# --- the memory plan -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plan_for_macs_is_in_the_dtype_that_was_asked_for(dtype):
    found = machines(open_checkpoint(resolve("nano")), dtype, 10**9)
    assert {str(machine.dtype) for machine in found} == {f"mlx.core.{dtype}"}


def test_conversion_is_not_advised_where_4_bit_would_not_fit_either():
    checkpoint = open_checkpoint(resolve("nano"))
    plan = plan_memory(checkpoint, this_machine(checkpoint.config.text, mx.float32, 10**9), SHORT)
    with refused("memory_exceeded"):
        load("nano", memory_limit=(plan.text - 0.9 * plan.weights) / 1e9)
    with refused("memory_exceeded", "--recipe", "4bit"):
        load("nano", memory_limit=(plan.text - 0.3 * plan.weights) / 1e9)


# --- the doctor ------------------------------------------------------------------------------------------------------


def test_memory_limit_holds_for_the_doctor_from_its_first_line(doctor):
    status, out, _ = doctor("--model", "nano", "--no-check", "--memory-limit", "3")
    assert status == 0 and "a model may use 3.0 GB" in out


def test_probe_reads_special_tokens_of_a_text_that_has_them(doctor, tmp_path):
    (tmp_path / "text.txt").write_text("`<|image_pad|>` stays text")
    status, out, err = doctor("--model", "nano", "--no-check", "--probe", "--text", str(tmp_path / "text.txt"))
    assert status == 0 and "residual stream" in out, err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--model", "nano", "--context", "0"], "option_no_effect"),
        (["--plan", "nano", "--context", "0"], "option_invalid"),
        (["--plan", "nano", "--context", "40000"], "option_invalid"),
        (["--plan", "nano", "--no-check"], "option_conflict"),
        (["--model", "nano", "--verbose"], "option_no_effect"),
        (["--model", "nano", "--json", "."], "output_unwritable"),
        (["--model", "nano", "--probe", "--text", "/dev/null"], "text_too_short"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_message(doctor, arguments, code):
    status, out, err = doctor(*arguments)
    assert (status, out) == (2, "") and f"[{code}]" in err


def test_a_file_that_is_there_is_written_over(doctor, tmp_path):
    file = tmp_path / "report.json"
    file.write_text("old")
    assert doctor("--model", "nano", "--no-check", "--json", str(file))[0] == 0
    assert "machine" in json.loads(file.read_text())
