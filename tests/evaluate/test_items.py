"""What a run has saved: whole lines, in the questions' order, of this run alone."""

import errno
import json
import os

import pytest
from refusing import refused

from mlx_qwen35.evaluate.items import Lines, RunFolder, differences

RUN = {"model": {"weights": "a"}, "settings": {"seed": 0}}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "out")


def begin(folder: RunFolder) -> None:
    with folder.held():
        folder.claim(RUN, {"sums": "1"})
        folder.log("sums").append({"key": "1", "score": 1.0})


def test_a_line_that_is_half_written_is_dropped_and_the_next_one_takes_its_place(tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text('{"key": "1"}\n{"key": "2", "ans')
    lines = Lines(file)
    assert lines.read == [{"key": "1"}] and file.read_text().endswith("ans")
    lines.append({"key": "3"})
    assert file.read_text() == '{"key": "1"}\n{"key": "3"}\n' and Lines(file).read == lines.read


def test_a_last_line_of_zeros_which_a_power_cut_leaves_is_dropped(tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_bytes(b'{"key": "1"}\n' + bytes(20) + b"\n")
    assert Lines(file).read == [{"key": "1"}]


@pytest.mark.parametrize("text", ['{"key": "1"}\nno\n{"key": "2"}\n', '[1]\n{"key": "2"}\n'])
def test_a_damaged_line_before_others_is_refused_with_its_number(tmp_path, text):
    file = tmp_path / "sums.jsonl"
    file.write_text(text)
    with refused("run_invalid", file, "line "):
        Lines(file)


def test_a_line_without_a_key_is_refused(folder):
    begin(folder)
    (folder.folder / "sums.jsonl").write_text('{"score": 1}\n')
    with refused("run_invalid", "sums.jsonl", "'key'"):
        folder.log("sums")


def test_lines_end_in_the_order_of_the_questions_with_others_behind(folder):
    begin(folder)
    log = folder.log("sums")
    for key in ("4", "3", "2"):
        log.append({"key": key})
    assert [line["key"] for line in log.arrange(["1", "2", "3"])] == ["1", "2", "3"]
    assert [json.loads(line)["key"] for line in log.path.read_text().splitlines()] == ["1", "2", "3", "4"]
    log.append({"key": "5"})
    assert list(folder.log("sums").lines) == ["1", "2", "3", "4", "5"]


def test_seconds_of_all_processes_add_up_by_task_and_stand_apart(folder):
    begin(folder)
    folder.log("sums").append({"key": "2"}, 1.5)
    folder.log("others").append({"key": "2"}, 7.0)
    again = RunFolder(folder.folder)
    again.log("sums").append({"key": "3"}, 2.0)
    assert again.log("sums").seconds == 3.5 and "seconds" not in (folder.folder / "sums.jsonl").read_text()


@pytest.mark.parametrize(
    ("identity", "tasks", "told"),
    [
        ({**RUN, "model": {"weights": "b"}}, {"sums": "1"}, "model weights was 'a' and is 'b'"),
        ({**RUN, "settings": {"seed": 0, "temp": 1.0}}, {"sums": "1"}, "temp was not given and is 1.0"),
        (RUN, {"sums": "2"}, "task sums was '1' and is '2'"),
    ],
)
def test_another_run_s_folder_is_refused_with_what_differs(folder, identity, tasks, told):
    begin(folder)
    with refused("resume_differs", told):
        folder.claim(identity, tasks)


def test_further_tasks_join_a_run_and_are_held_to_their_versions(folder):
    begin(folder)
    folder.claim(RUN, {"words": "1"})
    with refused("resume_differs", "task words"):
        folder.claim(RUN, {"words": "2"})
    with refused("resume_differs", "task sums"):
        folder.claim(RUN, {"sums": "2"})


def test_a_run_without_an_answer_is_begun_anew(folder):
    with folder.held():
        folder.claim(RUN, {"sums": "1"})
        folder.claim({**RUN, "settings": {"seed": 1}}, {"sums": "2"})
    assert json.loads((folder.folder / "run.json").read_text())["settings"] == {"seed": 1}


def test_a_damaged_record_of_a_run_is_refused(folder):
    begin(folder)
    (folder.folder / "run.json").write_text("{")
    with refused("run_invalid", "run.json"):
        folder.claim(RUN, {"sums": "1"})


def test_a_folder_of_something_else_and_a_file_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with refused("target_refused", "notes.txt"):
        RunFolder(tmp_path).check()
    with refused("target_refused", "is a file"):
        RunFolder(tmp_path / "notes.txt").check()


def test_one_process_at_a_time_has_a_folder(folder):
    with folder.held(), refused("target_busy", folder.folder), RunFolder(folder.folder).held():
        pass


def test_differences_are_told_by_their_place():
    assert list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})) == ["a c was 2 and is 3"]


def test_a_full_disk_is_told_and_what_was_answered_stays(folder, monkeypatch):
    begin(folder)

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (folder.folder / "run.json").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with refused("disk_full", "seconds.jsonl"):
            folder.log("sums").append({"key": "2"})
        with refused("disk_full", "run.json"):
            folder.claim(RUN, {"words": "1"})
    assert list(RunFolder(folder.folder).log("sums").lines) == ["1"]
    assert (folder.folder / "run.json").read_text() == before and not [*folder.folder.glob(".run*")]
