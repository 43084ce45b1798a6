"""python -m tests.dispatches.count: which options it takes, what it shows, and what it writes."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from dispatches.count.__main__ import main, write_whole
from dispatches.count.byte_rule import Bytes
from dispatches.count.dispatches import AROUND, ROOT, CountError, Dispatches, Place, count_program, format_dispatches

from mlx_qwen35.checkpoint.config import LINEAR
from mlx_qwen35.checkpoint.random import geometry


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a module of a name in front of the installed one, which cannot be imported."""

    def module(name: str) -> None:
        (tmp_path / f"{name}.py").write_text("raise ImportError('out of paper')\n")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    return module


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "--geometry"),
        (["--geometry", "tiny", "--recipe", "3bit"], "'uniform', 'mixed'"),
        (["--geometry", "tiny", "--compare", "mlx-lm,transformers"], "got transformers"),
        (["--geometry", "tiny", "--json", "nowhere/counts.json"], "nowhere/counts.json"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_counted(given, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(given)
    shown = capsys.readouterr()
    assert said in shown.err and shown.out == ""


def test_it_runs_from_the_root_of_the_repository_and_writes_what_it_prints(tmp_path: Path):
    file = tmp_path / "counts.json"
    command = [sys.executable, "-m", "tests.dispatches.count", "--geometry", "tiny", "--json", str(file)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    content = json.loads(file.read_text())
    assert set(content) == {"dispatches_per_token", "geometry", "recipe", "programs"}
    (found,) = content["programs"].values()
    assert content["dispatches_per_token"] == found["dispatches_per_token"]
    assert found["dispatches_per_token"] == sum(place["dispatches"] for place in found["places"].values()) > 0
    assert re.search(rf"^mlx_qwen35 .* {found['dispatches_per_token']} +\d+$", printed, re.MULTILINE)
    assert re.search(rf"^mlx_qwen35 .* {found['device_bytes_per_token'] / 1e6:.3f}$", printed, re.MULTILINE)
    for part in ("read", "written", "matrices"):
        assert found["device_bytes"][part] == sum(place["device_bytes"][part] for place in found["places"].values()) > 0
    assert found["device_bytes_per_token"] == found["device_bytes"]["read"] + found["device_bytes"]["written"]
    assert [path.name for path in tmp_path.iterdir()] == ["counts.json"]


def test_the_recipe_is_in_the_title_and_in_the_json(tmp_path: Path, capsys):
    file = tmp_path / "counts.json"
    for given, recipe in (([], "uniform"), (["--recipe", "mixed"], "mixed")):
        main(["--geometry", "tiny", *given, "--json", str(file)])
        assert f"geometry tiny, {recipe} recipe" in capsys.readouterr().out
        assert json.loads(file.read_text())["recipe"] == recipe


def test_a_program_that_fails_is_named_and_the_others_are_shown_and_written(tmp_path: Path, broken, capsys):
    broken("mlx_lm")
    file = tmp_path / "counts.json"
    with pytest.raises(SystemExit) as ended:
        main(["--geometry", "tiny", "--compare", "mlx-lm", "--json", str(file)])
    assert "mlx-lm could not be counted: ImportError: out of paper" in str(ended.value.code)
    assert re.search(r"^mlx_qwen35 ", capsys.readouterr().out, re.MULTILINE)
    assert list(json.loads(file.read_text())["programs"]) == ["mlx_qwen35"]


def test_ours_that_fails_ends_it_and_leaves_the_file_as_it_was(tmp_path: Path, broken, capsys):
    broken("mlx")
    file = tmp_path / "counts.json"
    file.write_text("of before")
    with pytest.raises(SystemExit) as ended:
        main(["--geometry", "tiny", "--json", str(file)])
    assert "mlx_qwen35 could not be counted: ImportError: out of paper" in str(ended.value.code)
    assert capsys.readouterr().out == "" and file.read_text() == "of before"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path):
    file = tmp_path / "counts.json"
    file.write_text("of before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "cannot be encoded: \ud800")
    assert file.read_text() == "of before" and list(tmp_path.iterdir()) == [file]
    write_whole(file, "whole")
    assert file.read_text() == "whole" and list(tmp_path.iterdir()) == [file]


def test_the_reason_of_a_failure_is_the_last_line_that_the_program_said():
    with pytest.raises(CountError, match=r"KeyError: 'nothing' \(ended with code 1\)"):
        count_program("nothing", geometry("tiny"))


def test_the_table_shows_figures_of_one_layer():
    places = {
        LINEAR: Place(3, Counter(Exp=6), Bytes(6_000_000, 3_000_000, 4_500_000)),
        AROUND: Place(1, Counter(Exp=1, Add=1), Bytes(1000, 2000, 0)),
    }
    table = format_dispatches("title", {"ours": Dispatches(places, Counter(rope=2))}).splitlines()
    assert table[0] == "title" and [line.split() for line in table[11:14]] == [
        ["ours", "linear_attention", "layer", "around", "token"], ["Exp", "2", "1", "7"], ["Add", "1", "1"],
    ]  # fmt: skip
    assert [line.split() for line in table[5:10]] == [
        ["MB", "of", "device", "memory", "linear_attention", "layer", "around", "token"],
        ["ours", "3.000", "0.003", "9.003"], ["read", "2.000", "0.001", "6.001"],
        ["written", "1.000", "0.002", "3.002"], ["beside", "matrices", "1.500", "0.003", "4.503"],
    ]  # fmt: skip
    assert table[-1] == "ours: MLX launches 2 more, which the rule leaves out: 2 of rope"
