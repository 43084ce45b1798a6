"""What takes more than a moment shows how far it is; a cap is refused before, and what was measured is printed."""

import pytest
from converting import converted
from watching import when_shown

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.convert import sensitivity as measuring
from mlx_qwen35.convert.__main__ import main
from mlx_qwen35.convert.calibrate import statistics
from mlx_qwen35.convert.evaluate import evaluate
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import find_recipe, save_recipe
from mlx_qwen35.convert.stream import write


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("What is 34 + 58?")
    return file


def ends(err, what):
    """Whether a bar of this name came to its end, having stood somewhere before."""
    bars = [line for line in err.replace("\n", "\r").split("\r") if line.startswith(what)]
    return " 0%" in bars[0] and "100%" in bars[-1]


def test_calibration_evaluation_and_writing_show_how_far_they_are(raw, tmp_path, capfd):
    converted(raw, tmp_path / "out", dtype="float16")
    checkpoint, tokens = open_checkpoint(raw), [[1, 2, 3, 4]]
    statistics(checkpoint, tokens)
    evaluate(checkpoint, checkpoint, tokens)
    out, err = capfd.readouterr()
    steps = ("looking what fits float16", "writing", "reading again", "calibrating", "evaluating")
    assert [what for what in steps if not ends(err, what)] == []
    assert out == ""


def test_what_is_resumed_is_compared_with_a_bar(raw, tmp_path, capfd):
    folder, plan = tmp_path / "out", make_plan(raw)
    folder.mkdir()
    write(plan, folder, verify=False)
    capfd.readouterr()
    write(plan, folder, verify=False)
    assert ends(capfd.readouterr().err, "comparing")


def test_a_cap_that_nothing_fits_under_is_refused_before_anything_is_measured(text, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["--hf-path", "nano", "--sensitivity", str(text), "--cap", "0.001"])
    err = capfd.readouterr().err
    assert stop.value.code == 2 and "[option_invalid]" in err and "0.001 GB" in err and "measuring" not in err


@pytest.mark.parametrize("name", ["absent/recipe.json", "", "text.txt/recipe.json", "x" * 300])
def test_a_place_where_no_recipe_can_be_saved_is_refused_before_anything_is_measured(text, tmp_path, capfd, name):
    with pytest.raises(SystemExit):
        save = str(tmp_path / name)
        main(["--hf-path", "nano", "--sensitivity", str(text), "--cap", "1", "--save-recipe", save])
    err = capfd.readouterr().err
    assert "[output_unwritable]" in err and "measuring" not in err


@pytest.mark.full
def test_what_was_measured_is_printed_though_the_recipe_cannot_be_saved(text, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    drawn = []
    err = when_shown("measuring", lambda: drawn or drawn.append(folder.rmdir()), monkeypatch)
    with pytest.raises(SystemExit):
        main(["--hf-path", "nano", "--sensitivity", str(text), "--cap", "1", "--save-recipe", str(folder / "r.json")])
    out = capsys.readouterr().out
    assert "| DeltaNet out |" in out and "proposed: " in out and "[output_unwritable]" in err.getvalue()
    assert ends(err.getvalue(), "measuring")


def test_a_recipe_is_written_whole_beside_what_its_name_links_to(tmp_path):
    (tmp_path / "other.txt").write_text("mine")
    (tmp_path / "recipe.json").symlink_to(tmp_path / "other.txt")
    save_recipe(tmp_path / "recipe.json", {}, measuring.CANDIDATES[0], "a reason")
    assert (tmp_path / "other.txt").read_text() == "mine"
    assert find_recipe(str(tmp_path / "recipe.json")).bulk == measuring.CANDIDATES[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "recipe.json"]
