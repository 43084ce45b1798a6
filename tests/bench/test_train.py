"""mlx_qwen35.bench --train: what it runs in which order and what it says of it. No timing is asserted."""

import importlib.util
import json
from pathlib import Path

import pytest

from mlx_qwen35.bench import main
from mlx_qwen35.bench.measure import OURS, ProgramError
from mlx_qwen35.bench.train import PEERS, Run, Settings, format_table, measure, summarize

SETTINGS = Settings((5, 9), repeats=2, dtype="float32")


class FakeWorker:
    """Answers like a worker, and notes in a list that all share what it was asked.

    fails_at: the length of which it fails at the second row.
    """

    def __init__(self, name: str, asked: list[tuple[str, int]], fails_at: int | None):
        self.name, self.asked, self.fails_at = name, asked, fails_at

    def ask(self, tokens: int, steps: int) -> dict:
        self.asked.append((self.name, tokens))
        if tokens == self.fails_at and self.asked.count((self.name, tokens)) == 2:
            raise ProgramError(self.name, "out of paper")
        size = 100 if self.name == OURS else 700
        return {"seconds": 0.5 if self.name == OURS else 2.0, "cpu_seconds": 1.0, "loss": 7.0, "mlx_peak_bytes": size,
                "weight_bytes": 40, "max_rss_bytes": 10**9}  # fmt: skip


def measured(*names: str, **fails_at: int) -> tuple[list[Run], list[tuple[str, int]], dict[str, str]]:
    asked: list[tuple[str, int]] = []
    failures: dict[str, str] = {}
    workers = [FakeWorker(name, asked, fails_at.get(name)) for name in names]
    return measure(workers, SETTINGS, failures, lambda line: None), asked, failures  # type: ignore[arg-type]


def test_every_program_makes_a_step_a_round_in_turn():
    runs, asked, failures = measured(OURS, "a", "b")
    assert [name for name, tokens in asked if tokens == 5] == [OURS, "a", "b", "b", "a", OURS]
    assert len(runs) == 12 and not failures


def test_a_program_that_fails_keeps_its_shorter_rows_and_the_others_go_on():
    runs, _, failures = measured(OURS, "a", "b", a=9)
    assert failures == {"a": "out of paper, at 9 tokens"}
    assert {(run.program, run.tokens) for run in runs} == {(OURS, 5), ("a", 5), ("b", 5), (OURS, 9), ("b", 9)}
    assert measured(OURS, "a", **{OURS: 5})[0] == []


def test_ratios_compare_speed_and_memory_with_weights_and_beside_them():
    ours, theirs, *_ = summarize(measured(OURS, "a")[0])
    assert (ours.ours_speed, ours.ours_memory, ours.ours_beside) == (1, 1, 1)
    assert (theirs.ours_speed, theirs.ours_memory, theirs.ours_beside) == (4, 7, 11)
    assert (ours.speed, ours.beside, theirs.speed) == (10, 60, 2.5)


def test_the_table_names_machine_settings_and_every_program():
    text = format_table({"chip": "abacus"}, "some model", SETTINGS, summarize(measured(OURS, "a")[0]))
    for part in ("abacus", "some model, float32; 2 rounds", "rank 8", "CPU seconds", "beside weights", "4.00x", "11.0"):
        assert part in text
    assert ["a", "9", "4.5"] in [line.split()[:3] for line in text.splitlines()]


def test_our_training_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--geometry", "tiny", "--train", "--prompt-lengths", "4", "--repeats", "1", "--json", str(tmp_path / "all")])
    written = json.loads((tmp_path / "all").read_text())
    (run,), (row,) = written["runs"], written["rows"]
    assert run["tokens"] == 4 and run["mlx_peak_bytes"] > run["weight_bytes"] > 0 and run["loss"] > 5
    assert row["program"] == OURS and row["beside"] == run["mlx_peak_bytes"] - run["weight_bytes"]
    assert "geometry tiny" in capsys.readouterr().out


@pytest.mark.full
def test_mlx_lm_begins_with_the_same_loss_and_can_be_checkpointed(tmp_path: Path):
    if importlib.util.find_spec("mlx_lm") is None:
        pytest.skip("mlx-lm is not installed")
    arguments = ["--geometry", "tiny", "--train", "--compare", "mlx-lm", "--prompt-lengths", "33", "--repeats", "1"]
    main([*arguments, "--json", str(tmp_path / "all")])
    written = json.loads((tmp_path / "all").read_text())
    assert written["failures"] == {}
    losses = {run["program"]: run["loss"] for run in written["runs"]}
    assert tuple(losses) == (OURS, *PEERS["mlx-lm"])
    assert max(losses.values()) - min(losses.values()) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decode-tokens", "5"], "--decode-tokens must be given without --train"),
        (["--adapter", "a"], "--adapter must be given without --train"),
        (["--serve"], "not allowed with argument"),
        (["--compare", "transformers"], "--compare mlx-lm alone"),
    ],
)
def test_what_would_have_no_effect_is_refused(arguments, message, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--geometry", "tiny", "--train", *arguments])
    assert message in capsys.readouterr().err
