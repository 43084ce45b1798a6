"""mlx_qwen35.bench --dispatches: which options the command takes, and what it shows."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from mlx_qwen35.bench import dispatches, main
from mlx_qwen35.bench.byte_rule import Bytes
from mlx_qwen35.bench.dispatches import AROUND, Dispatches, Place, count_program, format_dispatches
from mlx_qwen35.bench.measure import ProgramError
from mlx_qwen35.checkpoint.config import LINEAR
from mlx_qwen35.checkpoint.random import geometry


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code
    return capsys.readouterr().err or str(stopped.value.code)


@pytest.mark.parametrize(
    "given",
    [
        ["--vision"], ["--prompt-lengths", "5"], ["--decode-tokens", "32"], ["--repeats", "5"], ["--plot", "x.png"],
        ["--image-megapixels", "1"], ["--clip-frames", "8"], ["--clip-size", "512x512"], ["--revision", "main"],
        ["--dtype", "bfloat16"], ["--prefill-step-size", "1024"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_other_options_are_refused(given, capsys):
    said = refused(["--geometry", "tiny", "--dispatches", *given], capsys)
    assert "[option_conflict]" in said or "[option_no_effect]" in said
    assert given[0] in said


def test_a_recipe_is_refused_without_dispatches(capsys):
    for given in ([], ["--vision"]):
        said = refused(["--geometry", "tiny", "--recipe", "mixed", *given], capsys)
        assert "[option_no_effect]" in said and "--recipe" in said


def test_an_unknown_recipe_is_refused(capsys):
    assert "'uniform', 'mixed'" in refused(["--geometry", "tiny", "--dispatches", "--recipe", "3bit"], capsys)


def test_a_model_is_refused(capsys):
    assert "[option_conflict]" in refused(["--model", "nano", "--dispatches"], capsys)


def test_a_program_without_metal_is_refused(capsys):
    said = refused(["--geometry", "tiny", "--dispatches", "--compare", "mlx-lm,transformers"], capsys)
    assert "[option_invalid]" in said and "transformers" in said


def test_json_holds_the_table(tmp_path: Path, capsys):
    file = tmp_path / "counts.json"
    main(["--geometry", "tiny", "--dispatches", "--json", str(file)])
    content = json.loads(file.read_text())
    assert list(content) == ["mlx_qwen35"]
    found = content["mlx_qwen35"]
    assert found["dispatches_per_token"] == sum(place["dispatches"] for place in found["places"].values())
    printed = capsys.readouterr().out
    assert re.search(rf"^mlx_qwen35 .* {found['dispatches_per_token']} +\d+$", printed, re.MULTILINE)
    assert re.search(rf"^mlx_qwen35 .* {found['device_bytes_per_token'] / 1e6:.3f}$", printed, re.MULTILINE)


def test_json_holds_the_bytes_by_place(tmp_path: Path):
    file = tmp_path / "counts.json"
    main(["--geometry", "tiny", "--dispatches", "--json", str(file)])
    found = json.loads(file.read_text())["mlx_qwen35"]
    for part in ("read", "written", "matrices"):
        assert found["device_bytes"][part] == sum(place["device_bytes"][part] for place in found["places"].values()) > 0
    assert found["device_bytes_per_token"] == found["device_bytes"]["read"] + found["device_bytes"]["written"]


def test_the_recipe_is_in_the_title_and_in_the_json(tmp_path: Path, capsys):
    file = tmp_path / "counts.json"
    for given, recipe in (([], "uniform"), (["--recipe", "mixed"], "mixed")):
        main(["--geometry", "tiny", "--dispatches", *given, "--json", str(file)])
        assert f"geometry tiny, {recipe} recipe" in capsys.readouterr().out
        assert json.loads(file.read_text())["mlx_qwen35"]["recipe"] == recipe


def test_a_program_that_fails_is_named_and_the_others_are_shown(monkeypatch, capsys):
    def count_or_fail(program: str, config: dict, recipe: str) -> Dispatches:
        if program == "mlx-lm":
            raise ProgramError(program, "out of paper")
        return Dispatches({AROUND: Place(1, Counter(Exp=3), Bytes())}, Counter(rope=2))

    monkeypatch.setattr(dispatches, "count_program", count_or_fail)
    said = refused(["--geometry", "tiny", "--dispatches", "--compare", "mlx-lm,mlx-vlm"], capsys)
    assert "mlx-lm could not run: out of paper" in said and "mlx-vlm" not in said


def test_ours_that_fails_ends_it(monkeypatch, capsys):
    monkeypatch.setattr(dispatches, "count_program", lambda *_: (_ for _ in ()).throw(ProgramError("x", "no paper")))
    assert "mlx_qwen35 could not be counted: no paper" in refused(["--geometry", "tiny", "--dispatches"], capsys)


def test_the_reason_of_a_failure_is_the_last_line_that_the_program_said():
    with pytest.raises(ProgramError, match=r"KeyError: 'nothing' \(ended with code 1\)"):
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
