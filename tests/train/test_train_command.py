"""The command mlx_qwen35.train: what it prints, writes and refuses; in a terminal too."""

import json
import math
import os
from pathlib import Path

import mlx.core as mx
import pytest
from refusing import refused
from terminal import Terminal, needs_tmux, ours

from mlx_qwen35.budget.roofline import PREFILL
from mlx_qwen35.load import LoadOptions
from mlx_qwen35.machine.chip import parse_chip
from mlx_qwen35.train.command import main
from mlx_qwen35.train.dry_run import look_ahead, seconds
from mlx_qwen35.train.options import TrainOptions
from mlx_qwen35.train.training import prepared


@pytest.fixture
def data(tmp_path) -> Path:
    """Four rows of text, of which one is long, and one is of no use."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"text": "one two"}, {"text": "three", "source": "here"}, {"text": " ".join(["four"] * 30)}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "valid.jsonl").write_text(json.dumps({"text": "one three"}) + "\n")
    return folder


def refused_by_the_command(capsys, code: str, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.err.endswith(f"[{code}]\n") and told.out == ""
    return told.err


def test_a_dry_run_counts_rows_tokens_and_steps_and_reads_no_weights(data, tmp_path, capsys):
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    arguments = ["--model", "nano", "--data", str(data), "--dry-run", "--max-length", "20", "--epochs", "3"]
    main(arguments)
    told = capsys.readouterr().out
    assert mx.get_peak_memory() - before < 1e5
    main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    train = found["rows"]["train"]
    assert (train["rows"], train["cut"], found["rows"]["valid"]["rows"]) == (3, 1, 1)
    assert found["steps"] == 3 and len(found["maps"]) == 62 and train["tokens"] < 3 * 20
    assert found["maps"]["model.language_model.layers.0.mlp.up_proj.weight"] == {"out": 256, "width": 128, "rank": 8}
    for fact in (f"{train['tokens']:,}", "62 maps", "153,984 numbers", "source", "1 of 3 rows"):
        assert fact in told
    assert os.listdir(tmp_path) == ["data"]


def test_the_time_of_a_known_chip_is_computed_from_operations(data):
    options = TrainOptions(steps=5, validate_every=2)
    found = prepared(LoadOptions("nano"), data, options)
    assert look_ahead(found).seconds is None and seconds(found, None) is None
    tokens, targets = sum(found.rows.lengths), sum(found.rows.targets)
    one = seconds(found, parse_chip("Apple M1"))
    maps = 1_442_304  # weights of nano's matrices in layers
    layers = 3 * 2 * maps * tokens
    head = 4 * 1024 * 128 * targets
    assert one * PREFILL * 2.3e12 / 5 == pytest.approx(layers + head, rel=0.2)  # validation and the rules beside it
    assert seconds(found, parse_chip("Apple M1 Max")) == pytest.approx(one / 3.4)
    assert seconds(found, parse_chip("Apple M99")) is None
    along = prepared(LoadOptions("nano"), data, TrainOptions(steps=5, validate_every=2, draft_head=True))
    drafts = seconds(along, parse_chip("Apple M1")) - one
    own = sum(part.out * part.width for name, part in along.parts.items() if name.startswith("mtp."))
    assert drafts * PREFILL * 2.3e12 / 5 == pytest.approx(3 * 2 * own * tokens + head, rel=0.02)


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("option_missing", ["--data", "DATA", "--adapter", "OUT"]),
        ("option_missing", ["--model", "nano", "--adapter", "OUT"]),
        ("option_missing", ["--model", "nano", "--data", "DATA"]),
        ("option_no_effect", ["--model", "nano", "--data", "DATA", "--dry-run", "--resume"]),
        ("option_conflict", ["--model", "nano", "--data", "DATA", "--adapter", "OUT", "--steps", "3", "--epochs", "1"]),
        ("option_invalid", ["--model", "nano", "--data", "DATA", "--adapter", "OUT", "--rank", "0"]),
        ("option_invalid", ["--model", "nano", "--data", "DATA", "--adapter", "OUT", "--targets", "q_prj"]),
        ("option_unknown", ["--model", "nano", "--data", "DATA", "--adapter", "OUT", "--iters", "3"]),
        ("model_not_found", ["--model", "none/", "--data", "DATA", "--adapter", "OUT"]),
        ("data_missing", ["--model", "nano", "--data", "OUT", "--adapter", "OUT"]),
        ("target_refused", ["--model", "nano", "--data", "DATA", "--adapter", "DATA"]),
        ("target_refused", ["--model", "nano", "--data", "DATA", "--adapter", "DATA", "--dry-run"]),
    ],
)
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_written(data, tmp_path, capsys, code, arguments):
    words = [{"DATA": data, "OUT": tmp_path / "out"}.get(word, word) for word in arguments]
    told = refused_by_the_command(capsys, code, *words)
    assert told.count("\n") == 1 and sorted(os.listdir(data)) == ["train.jsonl", "valid.jsonl"]
    assert not (tmp_path / "out").exists()


def test_the_json_of_a_run_has_its_losses_and_figures(data, tmp_path, capsys):
    out = tmp_path / "out"
    main(["--model", "nano", "--data", str(data), "--adapter", str(out), "--steps", "1", "--no-report", "--json"])
    told = capsys.readouterr()
    found = json.loads(told.out)
    lines = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1] and found["loss"]["last"] == lines[1]["loss"]
    assert found["validation"] == {str(line["step"]): line["validation"] for line in lines}
    assert found["targets"] == lines[1]["targets"] and found["rows"]["train"]["rows"] == 3 and found["steps"] == 1
    assert found["peak_memory"] > 0 and found["versions"].keys() == {"mlx-qwen35", "mlx"}
    assert "validation loss" in told.err and "nothing reads the columns source" in told.err
    assert math.isfinite(found["tokens_per_second"])


@pytest.mark.full
@needs_tmux
def test_in_a_terminal_a_run_shows_how_far_it_is_and_goes_on_behind_ctrl_c(data, tmp_path):
    out = tmp_path / "out"
    command = ours("mlx_qwen35.train", "--model", "nano", "--data", data, "--adapter", out, "--steps", 400)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    with Terminal([*command, "--validate-every", 400, "--no-report"], tmp_path, (80, 24), environment) as terminal:
        terminal.wait("step 0 of 400: validation loss", "of 400 steps", "tokens/s", "left")
        terminal.keys("C-c")
        assert terminal.ended() == 130
        screen = terminal.joined()
        assert "--resume goes on" in screen and "Traceback" not in screen and "step 0 of 400" in screen
    again = [*command, "--validate-every", 400, "--no-report", "--resume"]
    with Terminal(again, tmp_path, (80, 24), environment) as terminal:
        terminal.wait("going on behind step", "of 400 steps")
        terminal.keys("C-c")
        assert terminal.ended() == 130


def test_options_are_named_as_they_are_typed(data, tmp_path, capsys):
    told = refused_by_the_command(
        capsys, "option_conflict", "--model", "nano", "--data", data, "--adapter", tmp_path / "out", "--from-adapter",
        tmp_path, "--rank", 4, "--layers", 2,
    )  # fmt: skip
    assert "--rank, --layers" in told and "--from-adapter" in told
    with refused("option_conflict", "rank, layers", "from_adapter"):
        TrainOptions(from_adapter="a", rank=4, layers=2)
