"""What a run has saved: whole states, the log, and what is refused to be gone on with."""

import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from refusing import refused

from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.train.state import KEPT, Best, Lines, RunFolder, RunState

IDENTITY = {"options": {"rank": 8, "seed": 0}, "data": {"train.jsonl": "ab"}, "adapter": None}
NAME = "model.language_model.layers.0.mlp.up_proj.weight"


def state(step: int = 1, best: bool = True) -> RunState:
    def pairs(value: float) -> dict[str, Pair]:
        value = float(value)
        return {NAME: Pair(mx.full((2, 3), value), mx.full((4, 2), -value), 0.1 + 0.2)}

    moments = {NAME: {part: {"m": mx.full(shape, 0.5), "v": mx.full(shape, 0.25)}
                      for part, shape in (("a", (2, 3)), ("b", (4, 2)))}}  # fmt: skip
    return RunState(step, pairs(step), moments, Best(0, 1.5, pairs(9)) if best else None, 1, 12.5)


def saved(out: Path, *states: RunState) -> RunFolder:
    folder = RunFolder(out)
    with folder.held():
        for own in states:
            folder.save(own, IDENTITY)
    return folder


def assert_same(one: RunState, other: RunState) -> None:
    for own, theirs in ((one.parameters, other.parameters), (one.best.parameters, other.best.parameters)):
        assert own.keys() == theirs.keys() and own[NAME].scale == theirs[NAME].scale
        assert mx.array_equal(own[NAME].a, theirs[NAME].a) and mx.array_equal(own[NAME].b, theirs[NAME].b)
    for part in "ab":
        kinds = zip(one.moments[NAME][part].values(), other.moments[NAME][part].values(), strict=True)
        assert all(mx.array_equal(*both) for both in kinds)
    kept = (one.step, one.best[:2], one.stale, one.seconds)
    assert kept == (other.step, other.best[:2], other.stale, other.seconds)


def test_a_state_is_read_as_it_was_saved(tmp_path):
    assert_same(saved(tmp_path, state()).read(IDENTITY), state())


def test_the_best_parameters_are_the_last_ones_where_they_were_saved_so(tmp_path):
    own = state()
    folder = saved(tmp_path, replace(own, best=Best(1, 0.5, own.parameters)))
    found = folder.read(IDENTITY)
    assert found.chosen is found.parameters and found.best.loss == 0.5
    assert folder.states[0].stat().st_size < saved(tmp_path / "other", own).states[0].stat().st_size


def test_a_state_before_the_first_step_has_no_moments(tmp_path):
    found = saved(tmp_path, RunState(0, state().parameters)).read(IDENTITY)
    assert found.moments == {} and found.best is None and found.chosen is found.parameters


def test_only_the_last_states_are_kept(tmp_path):
    folder = saved(tmp_path, *(state(step) for step in (1, 2, 3, 12)))
    assert [path.name for path in folder.states] == ["step-00000003.safetensors", "step-00000012.safetensors"]
    assert len(folder.states) == KEPT and folder.read(IDENTITY).step == 12
    assert sorted(os.listdir(folder.folder)) == [path.name for path in folder.states]  # nothing hidden is left


@pytest.mark.parametrize("damage", ["cut", "changed", "other file", "other json"])
def test_a_damaged_state_is_refused_and_the_one_before_it_is_there(tmp_path, damage):
    folder = saved(tmp_path, state(1), state(2))
    path = folder.states[-1]
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-3]
    elif damage == "changed":
        data[-3] ^= 1
    elif damage == "other json":
        data = data.replace(b'\\"stale\\"', b'\\"stole\\"')
    else:
        data = bytearray(b"x" * 200)
    path.write_bytes(data)
    with refused("run_invalid", path):
        folder.read(IDENTITY)
    path.unlink()
    assert folder.read(IDENTITY).step == 1


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"options": {"rank": 4, "seed": 0}}, ("rank was 8 and is 4",)),
        ({"data": {"train.jsonl": "cd"}}, ("data", "train.jsonl")),
        ({"data": {"train.jsonl": "ab", "valid.jsonl": "cd"}}, ("valid.jsonl",)),
        ({"adapter": "ab"}, ("adapter",)),
    ],
)
def test_another_run_is_told_by_what_differs(tmp_path, change, facts):
    with refused("resume_differs", *facts):
        saved(tmp_path, state()).read(IDENTITY | change)


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_gone_on_with_and_not_written_over(tmp_path):
    folder = saved(tmp_path / "out", state(7))
    assert folder.check(resume=True)
    with refused("target_refused", "step 7"):
        folder.check(resume=False)


def test_a_folder_that_is_absent_or_empty_or_without_a_saved_state_is_written(tmp_path):
    folder = RunFolder(tmp_path / "out")
    for _ in range(2):
        assert not folder.check(resume=False) and not folder.check(resume=True)
        (tmp_path / "out").mkdir(exist_ok=True)
    with folder.held(), Lines(folder.folder / "log.jsonl", -1) as log:
        log.append({"step": 1})
    assert not folder.check(resume=False)


@pytest.mark.parametrize("file", ["notes.txt", "run/notes.txt"])
def test_a_folder_with_something_else_is_left_alone(tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    for resume in (False, True):
        with refused("target_refused", "notes.txt"):
            RunFolder(tmp_path).check(resume)
    with refused("target_refused", "file"):
        RunFolder(tmp_path / file).check(False)


def test_one_process_at_a_time_trains_into_a_folder(tmp_path):
    with RunFolder(tmp_path).held(), refused("target_busy"), RunFolder(tmp_path).held():
        pass
    with RunFolder(tmp_path).held():
        pass


# --- the log ---------------------------------------------------------------------------------------------------------


def test_lines_behind_a_state_and_cut_lines_are_taken_off(tmp_path):
    path = tmp_path / "log.jsonl"
    with Lines(path, -1) as log:
        for step in range(5):
            log.append({"step": step})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 5')
    with Lines(path, 3) as log:
        log.append({"step": 4, "loss": 0.5})
        assert path.read_bytes() == whole.replace(b'{"step": 4}', b'{"step": 4, "loss": 0.5}')
        assert [line["step"] for line in log.read()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""), ('{"step": 1}\n', '{"step": 1}\n'), ('{"step": 0}\n[]\n{"step": 2}\n', '{"step": 0}\n{"step": 2}\n'),
        ('{"step": 2}\n{"step": 1}\n', '{"step": 2}\n'), ("{\n", ""), ('{"step": "1"}\n', ""),
    ],
)  # fmt: skip
def test_of_a_log_that_was_damaged_the_whole_lines_are_kept(tmp_path, text, kept):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with Lines(path, 2) as log:
        assert path.read_text() == kept
        log.append({"step": 3})
    assert path.read_text() == kept + '{"step": 3}\n'


def test_a_log_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with refused("output_unwritable", "log.jsonl"):
        Lines(tmp_path / "log.jsonl", -1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Lines(tmp_path / "short.jsonl", -1) as log:
            log.append({"step": 1})
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
            with refused("disk_full", "short.jsonl"):
                log.append({"step": 2})
            with refused("output_unwritable", "short.jsonl"):
                log.append({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    with Lines(tmp_path / "short.jsonl", 1) as log:
        assert log.read() == [{"step": 1}]
