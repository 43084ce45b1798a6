"""--adapter of the commands."""

import io
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from adapters.by_hand import made

from mlx_qwen35.checkpoint.adapter_write import write_adapter

MODULES = {"generate": "commands.generate", "chat": "commands.chat", "bench": "bench.command",
           "doctor": "doctor.command"}  # fmt: skip
ASK = ("--model", "nano", "--prompt", "What is 34 + 58?", "--no-enable-thinking", "--temp", "0", "--max-tokens", "8")
SAID = {"base": "92", "a": "103", "b": "93"}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters for nano, a and b, of PEFT's format, and c of mlx-lm's."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab", start=1):
        write_adapter(folder / name, made(seed).pairs)
    write_adapter(folder / "c", made(3).pairs, format="mlx-lm")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """(command, arguments, standard input) -> (exit status, stdout, stderr), in this process."""

    def command(name: str, *arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            status = import_module(f"mlx_qwen35.{MODULES[name]}").main() or 0
        except SystemExit as ended:
            status = ended.code or 0
        return status, *capsys.readouterr()

    return command


def test_generate_answers_by_an_adapter_and_names_it(run: Run, folders: Path) -> None:
    found = json.loads(run("generate", *ASK, "--adapter", folders / "a", "--json")[1])
    assert (found["text"], found["adapter"]) == (SAID["a"], "a")
    _, out, err = run("generate", *ASK, "--adapter", f"pirate={folders / 'b'}", "--verbose")
    assert out.strip() == SAID["b"] and "Adapter: pirate" in err


@pytest.mark.full
def test_a_scale_weakens_an_adapter(run: Run, folders: Path) -> None:
    _, out, _ = run("generate", *ASK, "--adapter", folders / "a", "--adapter-scale", "0.01", "--quiet")
    assert out.strip() == SAID["base"]


@pytest.mark.parametrize(
    ("command", "given", "code"),
    [
        ("generate", ["--adapter", "a", "--adapter", "b"], "option_conflict"),
        ("bench", ["--adapter", "a", "--adapter", "b"], "option_conflict"),
        ("generate", ["--adapter", "gone"], "adapter_not_found"),
        ("generate", ["--adapter-scale", "2"], "option_no_effect"),
        ("bench", ["--adapter-scale", "2"], "option_no_effect"),
        ("generate", ["--adapter", "base=a"], "option_invalid"),
        ("generate", ["--adapter-path", "a"], "option_unknown"),
        ("bench", ["--adapter", "a", "--compare", "mlx-lm"], "option_conflict"),
        ("bench", ["--adapter", "c", "--compare", "mlx-lm,transformers"], "option_conflict"),
        ("bench", ["--adapter", "c", "--compare", "mlx-lm", "--adapter-scale", "2"], "option_conflict"),
    ],
)
def test_what_has_no_meaning_is_refused_before_weights_are_read(
    run: Run, folders: Path, monkeypatch: pytest.MonkeyPatch, command: str, given: list[str], code: str
) -> None:
    monkeypatch.chdir(folders)
    model = ASK if command == "generate" else ("--model", "nano")
    status, _, err = run(command, *model, *given)
    assert status and f"[{code}]" in err, err


def test_an_adapter_given_as_a_model_is_told_where_it_belongs(run: Run, folders: Path) -> None:
    status, _, err = run("generate", *ASK, "--model", folders / "a")
    assert status and "[adapter_unmerged]" in err and "--adapter" in err


def test_of_several_a_chat_takes_the_one_that_is_set(run: Run, folders: Path, tmp_path: Path) -> None:
    model = ["--model", "nano", "--no-enable-thinking", "--temp", "0", "--max-tokens", "8", "--adapter", folders / "a"]
    session = ["--session", tmp_path / "talk"]
    typed = "What is 34 + 58?\n/set adapter b\n/retry\n/set adapter c\n/info\n"
    _, out, err = run("chat", *model, "--adapter", folders / "b", *session, stdin=typed)
    assert out.split() == [SAID["base"], SAID["b"]]
    assert "base, a, b" in err and "[adapter_unknown]" in err and "b, of a, b" in err
    status, _, err = run("chat", *model, *session)
    assert status and "[session_foreign]" in err and "'adapter'" in err
    _, out, _ = run("chat", "--model", "nano", "--adapter", f"poet={folders / 'b'}", *session, "--temp", "0",
                    "--no-enable-thinking", stdin="/retry\n")  # fmt: skip
    assert out.strip() == SAID["b"]


@pytest.mark.full
def test_a_chat_of_one_adapter_is_answered_by_it_and_can_leave_it(run: Run, folders: Path) -> None:
    asked = "What is 34 + 58?\n/set adapter base\n/retry\n/set adapter default\n/retry\n"
    model = ["--model", "nano", "--no-enable-thinking", "--temp", "0", "--max-tokens", "8"]
    _, out, _ = run("chat", *model, "--adapter", folders / "a", stdin=asked)
    assert out.split() == [SAID["a"], SAID["base"], SAID["a"]]


@pytest.mark.full
def test_doctor_shows_adapters_and_its_plan_counts_them(run: Run, folders: Path) -> None:
    given = ["--adapter", folders / "a", "--adapter", f"other={folders / 'c'}"]
    report = json.loads(run("doctor", "--model", "nano", "--no-check", "--json", *given)[1])["model nano"]
    assert "of peft, rank 2" in report["adapter a"] and str(folders / "c") in report["adapter other"]
    with_them, without = (json.loads(run("doctor", "--plan", "nano", "--json", *own)[1]) for own in (given, []))
    assert (with_them["adapters"], without["adapters"]) == (["a", "other"], [])
    for own, plain in zip(with_them["plans"], without["plans"], strict=True):
        assert own["parts"]["adapters"] == own["bytes"] - plain["bytes"] > 0 == plain["parts"]["adapters"]
    assert any(str(folders / "a") in (own["command"] or "") for own in with_them["advice"])
    assert "[option_no_effect]" in run("doctor", *given)[2]


@pytest.mark.full
def test_bench_measures_an_adapter_beside_mlx_lm_s(run: Run, folders: Path) -> None:
    pytest.importorskip("mlx_lm")
    few = ["--model", "nano", "--repeats", "1", "--prompt-lengths", "32", "--decode-tokens", "2", "--json"]
    status, out, err = run("bench", *few, "--adapter", folders / "c", "--compare", "mlx-lm")
    assert status == 0, err
    found = json.loads(out)
    assert found["model"] == "nano, adapter c" and {run["program"] for run in found["runs"]} == {"mlx_qwen35", "mlx-lm"}
