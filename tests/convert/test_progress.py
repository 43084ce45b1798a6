"""What takes more than a moment shows how far it is; a cap is refused before, and what was measured is printed."""

import pytest

from mlx_qwen35.convert import convert
from mlx_qwen35.convert import sensitivity as measuring
from mlx_qwen35.convert.__main__ import main


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("What is 34 + 58?")
    return file


def test_calibration_evaluation_and_reading_again_show_how_far_they_are(text, tmp_path, capfd):
    convert("nano", tmp_path / "out", calibration=text, evaluation=text, rounding="search")
    out, err = capfd.readouterr()
    for what in ("calibrating", "writing", "reading again", "evaluating"):
        last = next(line for line in reversed(err.replace("\n", "\r").split("\r")) if line.startswith(what))
        assert "100%" in last, what
    assert out == ""


def test_sensitivity_shows_how_far_it_is_and_ends_at_the_whole(text, capfd):
    main(["--hf-path", "nano", "--sensitivity", str(text)])
    out, err = capfd.readouterr()
    bars = [line for line in err.replace("\n", "\r").split("\r") if line.startswith("measuring")]
    assert len(bars) > 2 and "100%" in bars[-1]
    assert "| DeltaNet out |" in out


def test_the_first_look_of_a_float16_conversion_shows_how_far_it_is(raw, tmp_path, capfd):
    convert(raw, tmp_path / "out", dtype="float16", rounding="nearest", verify=False)
    assert "looking what fits float16" in capfd.readouterr().err


def test_a_cap_that_nothing_fits_under_is_refused_before_anything_is_measured(text, capfd, monkeypatch):
    monkeypatch.setattr(measuring, "make_batches", lambda *_: pytest.fail("measured"))
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


def test_what_was_measured_is_printed_though_the_recipe_cannot_be_saved(text, tmp_path, capfd, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    measure = measuring.sensitivity

    def then_gone(*rest):
        rows = measure(*rest)
        folder.rmdir()
        return rows

    monkeypatch.setattr("mlx_qwen35.convert.__main__.sensitivity", then_gone)
    with pytest.raises(SystemExit):
        main(["--hf-path", "nano", "--sensitivity", str(text), "--cap", "1", "--save-recipe", str(folder / "r.json")])
    out, err = capfd.readouterr()
    assert "| DeltaNet out |" in out and "proposed: " in out and "[output_unwritable]" in err


def test_a_recipe_is_written_whole_beside_what_has_its_name(text, tmp_path):
    (tmp_path / "other.txt").write_text("mine")
    (tmp_path / "recipe.json").symlink_to(tmp_path / "other.txt")
    save = str(tmp_path / "recipe.json")
    main(["--hf-path", "nano", "--sensitivity", str(text), "--cap", "1", "--save-recipe", save])
    assert (tmp_path / "other.txt").read_text() == "mine" and not (tmp_path / "recipe.json").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "recipe.json", "text.txt"]
