"""A new folder takes the target's name in one step, and a run that is killed at any point is recovered from."""

import json
import os
import sys
import warnings
from pathlib import Path
from random import Random

import pytest
from converting import cannot_exchange
from refusing import refused

from mlx_qwen35.convert import convert
from mlx_qwen35.convert.exchange import exchange
from mlx_qwen35.convert.target import appearing_whole, target_path, written

ACTS = ("open", "os.", "shutil.", "ctypes.")


def fill(folder: Path, text: str) -> None:
    """Something that counts as a checkpoint."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(text)


def replace(out: Path, text: str, resume: bool = False) -> None:
    with appearing_whole(out, True, resume) as folder:
        fill(folder, text)


def contents(folder: Path) -> set[str]:
    return {f"{path.name} {path.read_text()}" for path in folder.iterdir() if not path.name.startswith(".")}


def whole(text: str) -> set[str]:
    return {f"config.json {text}", f"model.safetensors {text}"}


def killed(out: Path, act: int) -> bool:
    """Whether a replacement was killed, in a process of its own, before its nth step that touches the disk."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    count = 0

    def die(event: str, _: tuple) -> None:
        nonlocal count
        count += event.startswith(ACTS)
        if count == act:
            os._exit(9)

    with open(os.devnull, "w") as null:
        sys.stderr = null
        sys.addaudithook(die)
        try:
            replace(out, "new")
        finally:
            os._exit(0)


@pytest.mark.core(1)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork beside threads
@pytest.mark.parametrize("one_step", [True, False], ids=["in one step", "in two"])
@pytest.mark.parametrize("exhaustive", [False, pytest.param(True, marks=pytest.mark.full)], ids=["some", "all"])
def test_a_replacement_killed_at_any_step_leaves_one_whole_folder_and_is_recovered_from(
    tmp_path, monkeypatch, one_step, exhaustive
):
    if not one_step:
        cannot_exchange(monkeypatch)
    act, seen, tried = 0, set(), Random(7)
    while True:
        act += 1 if exhaustive else tried.randrange(1, 5)
        out = tmp_path / str(act) / "out"
        out.parent.mkdir()
        fill(out, "old")
        if not killed(out, act):
            break
        if one_step or out.exists():
            seen |= {frozenset(contents(out))}
            assert contents(out) in (whole("old"), whole("new")), act
        replace(out, "newer", resume=bool(act % 2))
        assert contents(out) == whole("newer"), act
        assert [path.name for path in out.parent.iterdir()] == ["out"], act
    assert act > 30 and seen == {frozenset(whole("old")), frozenset(whole("new"))}


def test_the_names_of_two_folders_are_exchanged(tmp_path):
    fill(tmp_path / "one", "1")
    fill(tmp_path / "other", "2")
    if not exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this system or file system cannot")
    assert contents(tmp_path / "one") == whole("2") and contents(tmp_path / "other") == whole("1")


def test_an_exchange_that_is_not_allowed_raises(tmp_path):
    fill(tmp_path / "one", "1")
    with pytest.raises(OSError, match="absent"):
        exchange(tmp_path / "one", tmp_path / "absent")


def test_two_renames_of_which_the_second_fails_put_the_old_folder_back(tmp_path, monkeypatch):
    fill(tmp_path / "out", "old")
    rename = os.rename

    def fail(source, to):
        if source.name == ".out.converting":
            raise OSError("no more renames")
        rename(source, to)

    cannot_exchange(monkeypatch)
    monkeypatch.setattr(os, "rename", fail)
    with refused("output_unwritable", "no more renames"):
        replace(tmp_path / "out", "new")
    assert contents(tmp_path / "out") == whole("old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_came_to_the_target_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with refused("target_refused"), appearing_whole(out, False) as folder:
        fill(folder, "new")
        fill(out, "mine")
    assert contents(out) == whole("mine")


def test_a_run_killed_after_the_exchange_is_brought_to_its_end_by_the_next_even_if_that_is_refused(tmp_path):
    out, work, _ = written(tmp_path / "out")
    fill(out, "new")
    fill(work, "old")
    (out / ".conversion.jsonl").write_text(json.dumps({"replaces": [work.stat().st_ino]}) + "\n")
    with refused("target_refused", out):
        convert("nano", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}


def test_what_an_exchange_left_is_not_removed_while_it_is_the_source(tmp_path):
    out, work, _ = written(tmp_path / "out")
    fill(out, "new")
    fill(work, "old")
    (out / ".conversion.jsonl").write_text(json.dumps({"replaces": [work.stat().st_ino]}) + "\n")
    with refused("target_overlaps_source", work):
        convert(work, out, overwrite=True)
    assert contents(work) == whole("old")


def test_what_could_be_resumed_stays_when_the_target_is_refused(tmp_path):
    out, work, _ = written(tmp_path / "out")
    fill(out, "old")
    fill(work, "half")
    (work / ".conversion.jsonl").write_text("noted")
    with refused("target_refused"), appearing_whole(out, False, resume=True):
        pass
    assert contents(work) == whole("half")


def test_a_killed_run_whose_target_was_made_by_hand_since_is_not_taken_for_placed(tmp_path):
    """The journal of a copy of a hidden folder names what it would have replaced; only that very folder is removed."""
    out, work, _ = written(tmp_path / "out")
    fill(out, "new")
    (out / ".conversion.jsonl").write_text('{"replaces": [1]}\n')
    fill(work, "mine")
    with refused("target_refused", work):
        replace(out, "newer")
    assert contents(work) == whole("mine")


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file/out", "x" * 300, "x" * 250, "a\0b", "/", "~nobody-of-this-name/out", "\udce9"])
def test_a_name_that_no_folder_can_have_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with refused("output_unwritable"):
        target_path(name)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_none(name):
    with refused("option_missing", "--mlx-path"):
        target_path(name)


def test_a_current_folder_that_is_gone_is_told_of(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with refused("output_unwritable", "out"):
        target_path("out")
    assert target_path(tmp_path / "out") == tmp_path / "out"


def test_what_cannot_be_removed_is_warned_of_and_the_new_folder_is_whole(tmp_path, monkeypatch):
    fill(tmp_path / "out", "old")

    def fail(*_, **__):
        raise OSError("held")

    with monkeypatch.context() as patched, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patched.setattr("shutil.rmtree", fail)
        replace(tmp_path / "out", "new")
    assert contents(tmp_path / "out") == whole("new") and "held" in str(caught[-1].message)
