"""mlx_qwen35.generate as a user runs it."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_qwen35.commands.generate import main
from mlx_qwen35.engine.generation import Generation

ASK = "What is 34 + 58?"


@pytest.fixture
def run(monkeypatch, capsys):
    """(arguments, standard input) -> (exit status, stdout, stderr), in this process."""

    def command(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlx_qwen35.generate", *arguments])
        stream = io.StringIO(stdin or "")
        stream.isatty = lambda: stdin is None  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(SystemExit) as ended:
            main()
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    return command


def test_text_on_stdout_statistics_on_stderr(run):
    status, out, err = run("--model", "nano", "--prompt", ASK)
    assert status == 0
    assert out.startswith("<think>\n") and "</think>\n" in out
    assert "Prompt: " in err and "tokens per second" in err and "Peak memory: " in err
    assert "tokens per second" not in out


def test_json_is_one_object_with_text_tokens_counts_and_speeds(run):
    status, out, _ = run("--model", "nano", "--prompt", ASK, "--json")
    result = json.loads(out)
    assert status == 0
    assert set(result) == {
        "text", "reasoning", "tokens", "finish_reason", "in_reasoning", "prompt_tokens", "generation_tokens",
        "vision_seconds", "prompt_tps", "generation_tps", "peak_memory", "seed", "mtp", "error", "logprobs",
        "tool_calls", "cut", "loop", "limited_by", "cached_tokens", "reasoning_tokens", "stop", "adapter",
    }  # fmt: skip
    assert len(result["tokens"]) == result["generation_tokens"]


def test_json_has_the_log_probabilities_that_were_asked_for(run):
    base = ("--model", "nano", "--json", "--prompt", ASK, "--max-tokens", "4", "--seed", "0")
    assert json.loads(run(*base)[1])["logprobs"] is None
    result = json.loads(run(*base, "--logprobs", "--top-logprobs", "2")[1])
    assert [told["token"] for told in result["logprobs"]] == result["tokens"]
    for told in result["logprobs"]:
        assert set(told) == {"token", "text", "bytes", "logprob", "top"} and len(told["top"]) == 2
        for one in (told, *told["top"]):
            assert bytes(one["bytes"]).decode(errors="replace") == one["text"] and one["logprob"] <= 0


def test_the_prompt_comes_from_an_option_a_file_or_a_pipe(run, tmp_path: Path):
    (tmp_path / "prompt.txt").write_text(ASK)
    ways = [
        run("--model", "nano", "--json", "--prompt", ASK),
        run("--model", "nano", "--json", "--prompt-file", str(tmp_path / "prompt.txt")),
        run("--model", "nano", "--json", stdin=ASK),
        run("--model", "nano", "--json", "--prompt", "-", stdin=ASK),
    ]
    assert len({tuple(json.loads(out)["tokens"]) for _, out, _ in ways}) == 1


def test_every_option_has_an_effect(run, monkeypatch):
    """Each changes the plan of the generation: its sampling, limits, stop strings, chunk length, or prompt."""
    planned = []

    results = Generation.results

    def spy(generation: Generation):
        (request,) = generation.requests
        sampler = request.sampler
        plan = (sampler.sampling, sampler.seed, request.limit, request.prefill_step_size, request.stream.stop)
        planned.append((request.prompt, plan))
        return results(generation)

    monkeypatch.setattr(Generation, "results", spy)
    base = ("--model", "nano", "--json", "--prompt", ASK, "--seed", "3", "--preset", "reasoning", "--max-tokens", "9")
    run(*base)
    for options in (
        ("--temp", "0"), ("--top-k", "1"), ("--top-p", "0.05"), ("--min-p", "0.99"), ("--presence-penalty", "-2"),
        ("--frequency-penalty", "2"), ("--repetition-penalty", "3"), ("--seed", "4"), ("--max-tokens", "2"),
        ("--stop", "x"), ("--prefill-step-size", "3"), ("--preset", "coding"), ("--preset", "instruct"),
        ("--system-prompt", "Be brief."), ("--ignore-chat-template",),
    ):  # fmt: skip
        run(*base, *options)
        assert planned[-1] != planned[0], options


def test_no_prompt_at_a_terminal_is_an_error(run):
    status, _, err = run("--model", "nano")
    assert status == 2 and "--prompt-file" in err and "[option_missing]" in err


def test_no_model_is_an_error_that_lists_the_choices(run):
    status, _, err = run("--prompt", ASK)
    assert status == 2 and "[option_missing]" in err
    assert "--model" in err and "Qwen/Qwen3.5-4B" in err and "nano" in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--model", "nano", "--prompt", " "), "prompt_empty"),
        (("--model", "/nowhere/at/all", "--prompt", "x"), "model_not_found"),
        (("--model", "nano", "--prompt", "x", "--temp", "-1"), "option_invalid"),
        (("--model", "nano", "--prompt", "x", "--max-tokens", "0"), "option_invalid"),
        (("--model", "nano", "--prompt-file", "/nowhere.txt"), "text_unreadable"),
        (("--model", "/nowhere/at/all", "--prompt", "x", "--logprobs"), "option_no_effect"),
        (("--model", "nano", "--prompt", "x", "--json", "--top-logprobs", "3"), "option_no_effect"),
        (("--model", "nano", "--prompt", "x", "--json", "--logprobs", "--top-logprobs", "21"), "option_invalid"),
        (
            ("--model", "nano", "--prompt", "x", "--ignore-chat-template", "--system-prompt", "s"),
            "option_no_effect",
        ),
    ],
)
def test_an_error_is_one_message_without_a_traceback(run, arguments, code):
    status, out, err = run(*arguments)
    assert status == 2
    assert err.endswith(f" [{code}]\n") and "Traceback" not in err
    assert out == ""


def test_python_m_runs_it_without_a_warning():
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::RuntimeWarning",
            "-m",
            "mlx_qwen35.generate",
            "--model",
            "nano",
            "--prompt",
            ASK,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "Generation: " in done.stderr


SLOW = """
import sys, time
from mlx_qwen35.generate import __main__ as command
from mlx_qwen35.model.model import Model
hidden = Model.hidden
def slow(*given, **options):
    print("a pass", file=sys.stderr, flush=True)
    time.sleep(0.5)
    return hidden(*given, **options)
Model.hidden = slow
sys.argv = ["mlx_qwen35.generate", "--model", "nano", "--prompt", "What is 34 + 58?", "--mtp", "off", *sys.argv[1:]]
command.main()
"""


@pytest.mark.parametrize("options", [(), pytest.param(("--json",), marks=pytest.mark.full)])
def test_ctrl_c_ends_cleanly_with_what_was_written(options):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said = (line for line in process.stderr if not line.endswith(" ...\n"))  # progress, on a slow machine
    for _ in range(4):  # over the prompt, and three tokens: the last begins after the first token was written
        assert next(said) == "a pass\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    if options:
        assert json.loads(out)["finish_reason"] == "interrupted"
        assert json.loads(out)["tokens"]
    else:
        assert out.startswith("<think>\n")
        assert "interrupted" in err and "Generation: " in err
