"""--mtp: launches of a step with drafts."""

import json
from collections import Counter
from pathlib import Path

import pytest
from dispatches.count.__main__ import main
from dispatches.count.draft_dispatches import count_drafts, format_drafts
from dispatches.count.draft_step import DRAFT_LOGITS, HEAD, LOGITS, ROWS, SAMPLING, SETTLING

from mlx_qwen35.checkpoint.random import geometry

DEPTH_1 = {HEAD: 40, DRAFT_LOGITS: 1, SETTLING: 1, SAMPLING: 2}  # 44 more than without drafts


@pytest.fixture(
    scope="module",
    params=[("uniform", 298), pytest.param(("mixed", 322), marks=pytest.mark.full)],
    ids=["uniform", "mixed"],
)
def steps(request):
    recipe, token = request.param
    return token, count_drafts(geometry("4b"), recipe, 1)


def test_without_drafts_a_step_is_a_token_and_its_sampling(steps):
    token, found = steps
    assert found[0] == {ROWS: token - 1, LOGITS: 1, SAMPLING: 5}


def test_depth_1_adds_what_is_pinned(steps):
    _, found = steps
    assert found[1] - found[0] == DEPTH_1 and found[1].total() - found[0].total() == 44


def test_two_rows_of_the_model_take_as_many_launches_as_one(steps):
    _, found = steps
    assert (found[1][ROWS], found[1][LOGITS]) == (found[0][ROWS], found[0][LOGITS])


def test_the_table_shows_what_depth_1_adds():
    plain, drafted = Counter({ROWS: 9, SAMPLING: 2}), Counter({HEAD: 4, ROWS: 9, SAMPLING: 3})
    lines = format_drafts({0: plain, 1: drafted}).splitlines()
    assert lines[0].split("  ")[-1].strip() == "depth 1 adds"
    assert lines[1].split() == ["head", "4", "4"] and lines[3].split() == ["rows", "of", "the", "model", "9", "9"]
    assert lines[6].split() == ["sampling", "2", "3", "1"] and lines[7].split() == ["step", "11", "16", "5"]


def test_the_command_shows_and_writes_them(tmp_path: Path, capsys):
    file = tmp_path / "counts.json"
    main(["--geometry", "tiny", "--mtp", "--json", str(file)])
    found = json.loads(file.read_text())
    steps = found["steps_with_drafts"]
    assert list(steps) == ["0", "1", "2", "3"] and steps["0"][ROWS] + 1 == found["dispatches_per_token"]
    assert "depth 1 adds" in capsys.readouterr().out
