"""The example that fine-tunes nano: its data, its run, and what docs/finetune.md computes."""

import importlib.util
import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/finetune"


@pytest.fixture
def animals(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    spec = importlib.util.spec_from_file_location("animals_of_the_example", EXAMPLE / "animals.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers(file: Path) -> list[tuple[str, str]]:
    """(animal or shape, colour) of each row."""
    rows = (json.loads(line)["messages"][1]["content"] for line in file.read_text().splitlines())
    return [(thing, colour) for _, colour, thing in (text.removesuffix(".").split() for text in rows)]


def test_the_same_seed_draws_the_same_files(animals, tmp_path):
    rows = {"train": 6, "test": 6}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        animals.write(tmp_path / name, rows, seed)
    files = [file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 14
    same = [[(tmp_path / "a" / file).read_bytes() == (tmp_path / other / file).read_bytes() for file in files]
            for other in "bc"]  # fmt: skip
    assert all(same[0]) and not any(same[1])


def test_colours_that_count_as_never_shown_are_not_trained_on(animals):
    from random import Random

    trained, tested = (Counter(animals.things(split, 300, Random(split))) for split in ("train", "test"))
    assert not set(trained) & animals.UNSEEN and all(tested[pair] > 10 for pair in animals.UNSEEN)
    assert len(trained) == 18 - 3 + 18  # every other animal and shape in every colour


@pytest.mark.full
def test_the_example_teaches_animals_and_keeps_what_nano_knew(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(tmp_path / "made")])
    runpy.run_path(str(EXAMPLE / "finetune.py"), run_name="__main__")
    said = capsys.readouterr().out
    found = {name: (int(before), int(after)) for name, before, after in re.findall(
        r"^\d+ (\S.*?) {2,}(\d+) +(\d+)$", said, re.MULTILINE)}  # fmt: skip
    assert found["animals"][0] == 0 and found["animals"][1] >= 28
    assert found["shapes, known before"][1] >= 29 and found["sums of two numbers"][1] >= 18
    report = (tmp_path / "made/adapter/report.md").read_text()
    along = int(re.search(r"after, draft head trained along \|.*\| (\d+) % \|", report)[1])
    assert along > int(re.search(r"after, draft head as it was \|.*\| (\d+) % \|", report)[1]) and along >= 85


@pytest.mark.full
def test_hours_of_training_are_those_that_are_computed():
    table = runpy.run_path(str(ROOT / "tests/docs/training_table.py"))["table"]()
    text = (ROOT / "docs/finetune.md").read_text()
    assert all(line in text for line in table if "---" not in line), "\n".join(table)
