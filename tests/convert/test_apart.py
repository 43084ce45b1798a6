"""What is read is never removed, renamed or written over, by whatever name it is reached; nor is what is not ours."""

import json
import os
import shutil

import pytest
from refusing import refused

from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.__main__ import main
from mlx_qwen35.convert.journal import JOURNAL


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("apart") / "raw", geometry("tiny"), vision=False, mtp=False)


def copied(master, place):
    """A source of its own, which may be lost."""
    return shutil.copytree(master, place)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [".out.converting", ".out.replaced"])
@pytest.mark.parametrize("marked", [False, True], ids=["plain", "with a journal"])
def test_a_source_in_the_place_of_a_hidden_folder_is_refused_and_stays(master, tmp_path, name, marked):
    source = copied(master, tmp_path / name)
    if marked:
        (source / JOURNAL).write_text("")
    before = contents(source)
    with refused("target_overlaps_source", source):
        convert(source, tmp_path / "out", quantize=True, resume=marked)
    assert contents(source) == before


def test_a_source_within_a_hidden_folder_is_refused_and_stays(master, tmp_path):
    source = copied(master, tmp_path / ".out.converting" / "deep" / "raw")
    (tmp_path / ".out.converting" / JOURNAL).write_text("")
    with refused("target_overlaps_source"):
        convert(source, tmp_path / "out", quantize=True)
    assert contents(source) == contents(master)


@pytest.mark.parametrize("name", ["out", ".out.converting", ".out.replaced"])
def test_a_folder_that_holds_a_hard_link_to_the_source_is_refused(master, tmp_path, name):
    source = copied(master, tmp_path / "raw")
    copied(master, tmp_path / name)
    weights = next((tmp_path / name).glob("*.safetensors"))
    weights.unlink()
    os.link(source / weights.name, weights)
    with refused("target_overlaps_source", weights.name):
        convert(source, tmp_path / "out", quantize=True, overwrite=True)
    assert contents(source) == contents(tmp_path / name) == contents(master)


def test_a_source_of_links_into_the_target_is_refused(master, tmp_path):
    target = copied(master, tmp_path / "out")
    (tmp_path / "raw").mkdir()
    for file in target.iterdir():
        (tmp_path / "raw" / file.name).symlink_to(file)
    with refused("target_overlaps_source"):
        convert(tmp_path / "raw", target, quantize=True, overwrite=True)
    assert contents(target) == contents(master)


def test_a_target_under_a_linked_parent_is_the_source(master, tmp_path):
    source = copied(master, tmp_path / "real" / "raw")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with refused("target_overlaps_source"):
        convert(source, tmp_path / "link" / "raw", quantize=True, overwrite=True)
    assert contents(source) == contents(master)


def test_a_hidden_folder_that_is_a_link_is_not_followed(master, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "mine" / JOURNAL).write_text("")
    (tmp_path / ".out.converting").symlink_to(tmp_path / "mine")
    with refused("output_unwritable"):
        convert(master, tmp_path / "out", quantize=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", [".out.converting", ".out.replaced"])
def test_a_hidden_folder_that_is_not_ours_is_refused_and_stays(master, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("mine")
    with refused("target_refused", tmp_path / name):
        convert(master, tmp_path / "out", quantize=True)
    assert contents(tmp_path / name) == {"thesis.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_a_killed_run_left_is_not_written_through_its_links(master, tmp_path):
    """A link in the place of the weights that are written on."""
    name = "model-00001-of-00001.safetensors"
    work = tmp_path / ".out.converting"
    work.mkdir()
    (work / JOURNAL).write_text("{")  # cut off
    (tmp_path / "thesis").write_text("mine")
    (work / name).symlink_to(tmp_path / "thesis")
    (work / "config.json").symlink_to(tmp_path / "thesis")
    convert(master, tmp_path / "out", quantize=True, resume=True, rounding="nearest")
    assert (tmp_path / "thesis").read_text() == "mine"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("option", ["evaluation", "calibration", "recipe"])
def test_a_text_in_the_folder_that_is_replaced_is_refused(master, tmp_path, option):
    target = copied(master, tmp_path / "out")
    file = target / ("mine.json" if option == "recipe" else "text.txt")
    file.write_text("mine")
    with refused("target_overlaps_source", file):
        convert(master, target, overwrite=True, **{option: str(file)})
    assert file.read_text() == "mine"


def test_a_recipe_of_the_targets_name_is_no_file_in_it(master, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copied(master, tmp_path / "4bit")
    convert(master, "4bit", recipe="4bit", rounding="nearest", overwrite=True)
    assert json.loads((tmp_path / "4bit" / "quality.json").read_text())["recipe"] == "4bit"


@pytest.mark.parametrize("name", ["config.json", "text.txt"])
def test_a_recipe_is_not_saved_over_what_is_read(master, tmp_path, capsys, name):
    source = copied(master, tmp_path / "raw")
    (source / "text.txt").write_text("a text")
    before = contents(source)
    options = ["--sensitivity", str(source / "text.txt"), "--cap", "9"]
    with pytest.raises(SystemExit):
        main(["--hf-path", str(source), *options, "--save-recipe", str(tmp_path / "raw" / ".." / "raw" / name)])
    assert "[target_overlaps_source]" in capsys.readouterr().err
    assert contents(source) == before


# --- links that lead out of the source -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "generation_config.json"])
def test_a_file_behind_a_link_out_of_the_source_is_not_copied_and_is_named(master, tmp_path, name):
    source = copied(master, tmp_path / "raw")
    (tmp_path / "secret").write_text('{"token": "sesame"}')
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match=name):
        out = convert(source, tmp_path / "out", quantize=True, rounding="nearest")
    assert not any(b"sesame" in content for content in contents(out).values())
    assert not any(path.is_symlink() for path in out.iterdir())


def test_links_within_the_source_and_weights_from_anywhere_are_read(master, tmp_path):
    source = copied(master, tmp_path / "raw")
    (source / "texts").mkdir()
    (source / "texts" / "licence").write_text("a licence")
    (source / "LICENSE").symlink_to("texts/licence")
    weights = next(source.glob("*.safetensors"))
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    out = convert(source, tmp_path / "out", quantize=True, rounding="nearest")
    assert (out / "LICENSE").read_text() == "a licence"


def test_the_links_of_the_hubs_cache_are_its_own(master, tmp_path):
    home = tmp_path / "models--name--model"
    snapshot, blobs = home / "snapshots" / "0123", home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate([*master.iterdir(), master / "LICENSE"]):
        (blobs / str(number)).write_bytes(file.read_bytes() if file.is_file() else b"a licence")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    out = convert(snapshot, tmp_path / "out", quantize=True, rounding="nearest")
    assert (out / "LICENSE").read_text() == "a licence"
