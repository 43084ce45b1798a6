"""DIR/report.md and DIR/scores.png, from a summary and lines that are written by hand."""

import copy
import sys
from dataclasses import asdict

import pytest
from PIL import Image

from mlx_qwen35.evaluate.compare import paired
from mlx_qwen35.evaluate.report import CHANGED, report, write_report
from mlx_qwen35.evaluate.summary import described, entry, outcome
from mlx_qwen35.evaluate.task import Published

SETTINGS = {"enable_thinking": True, "max_tokens": 1024, "temp": 1.0}


def lines_of(scores, cut=0, seen=0):
    return [
        {"key": f"n{number}", "seed": number, "prompt_tokens": 10, "tokens": 5, "image_tokens": seen,
         "cut_at_limit": number < cut, "answer": f"a|{score}\nline", "score": score, "expected": "92"}
        for number, score in enumerate(scores)
    ]  # fmt: skip


def summary_of(ours, theirs=None, **more):
    """Of the task "mmmu", of one model or two."""
    published = Published(0.776, "the card", "what differs")
    own = entry(outcome(ours, 61.0, "v1", SETTINGS, published))
    if theirs:
        own["against"] = entry(outcome(theirs, 40.0, "v1", SETTINGS, published))
        own["paired"] = asdict(paired(ours, theirs))
    return {
        "model": "me/pack-4bit", "against": "me/source" if theirs else None, "machine": "Apple M1",
        "loaded": {"model": {"name": "me/pack-4bit", "weights": "1f", "kv_bits": "8"},
                   "against": {"name": "me/source", "weights": "2e"} if theirs else None},
        "versions": {"mlx-qwen35": "0.1.0", "mlx": "0.32.4"}, "tasks": {"mmmu": own} | more,
    }  # fmt: skip


def told(ours, theirs=None, drawn=True, **more) -> str:
    summary = summary_of(ours, theirs, **more)
    return report(summary, {"mmmu": ours}, {"mmmu": theirs} if theirs else {}, "out", drawn)


def test_the_report_tells_scores_errors_versions_settings_and_the_published_figure():
    text = told(lines_of([1.0, 0.0, 1.0, 1.0], seen=16))
    assert "| mmmu | 4 | 75.0 ± 25.0 % | 0 | 40 | 64 | 20 | 61 s | 77.6 |" in text
    facts = ("me/pack-4bit", "mlx 0.32.4", "Apple M1", "max_tokens 1024", "(v1)", "the card; what differs", "kv_bits 8")
    for fact in facts:
        assert fact in text
    assert "judged by rules" in text
    assert not any(word in text for word in ("no certainty", "Warning", "## Against"))


def test_answers_that_were_cut_are_warned_of_above_two_percent():
    scores = [1.0] * 100
    assert "--max-tokens" not in told(lines_of(scores, cut=2))
    assert "3 of 100 answers (3 %) were cut at 1024 tokens" in told(lines_of(scores, cut=3))


def test_two_models_are_compared_question_by_question_and_what_changed_is_shown():
    text = told(lines_of([1.0, 0.0, 1.0, 0.0]), lines_of([1.0, 1.0, 0.0, 1.0]))
    assert "| mmmu | 4 | -25.0 ± 47.9 points | 1 | 2 | 75.0 |" in text
    assert [row.split(" | ")[0] for row in text.splitlines() if row.startswith("| n")] == ["| n1", "| n3", "| n2"]
    assert r"`a\|0.0⏎line`" in text and "| mmmu | me/source | 4 |" in text


def test_of_many_changes_the_first_are_shown_and_the_rest_counted():
    text = told(lines_of([0.0] * 30), lines_of([1.0] * 30))
    assert text.count("\n| n") == CHANGED and "10 more" in text


def test_kl_has_a_section_of_its_own():
    kl = {"kl": 0.0043, "kl_error": 0.0009, "top1": 0.9915, "top1_error": 0.003, "positions": 708, "text": "a book",
          "seconds": 3.0, "settings": {"dtype": "float32"}, "versions": {"task": "8 sequences"}, "n": 8}  # fmt: skip
    assert "| 0.00430 ± 0.00090 | 99.15 ± 0.30 | 708 | a book | 3 s |" in told(lines_of([1.0]), lines_of([1.0]), kl=kl)
    alone = kl | {"kl_error": None, "top1_error": None}
    assert "| 0.00430 | 99.15 | 708 |" in told(lines_of([1.0]), lines_of([1.0]), kl=alone)


def test_the_picture_is_drawn_beside_the_report_or_said_to_be_missing(tmp_path, monkeypatch):
    ours, theirs = lines_of([1.0, 0.0, 1.0, 0.0]), lines_of([1.0, 1.0, 0.0, 1.0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "mlx-qwen35[plot]" in told(ours, drawn=False)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    write_report(tmp_path, summary_of(ours, theirs), {"mmmu": ours}, {"mmmu": theirs})
    assert "![Scores](scores.png)" in (tmp_path / "report.md").read_text()
    with Image.open(tmp_path / "scores.png") as image:
        assert image.size[0] > 1000


def test_the_picture_shows_both_models_errors_and_published_figures(tmp_path):
    pytest.importorskip("matplotlib")
    from mlx_qwen35.evaluate.plot import draw

    ours, theirs = lines_of([1.0, 0.0, 1.0, 0.0]), lines_of([1.0, 1.0, 0.0, 1.0])
    summary = summary_of(ours, theirs, second=copy.deepcopy(summary_of(ours)["tasks"]["mmmu"]) | {"published": None})
    figure = draw(tmp_path / "scores.png", summary)
    (axes,) = figure.axes
    named = {text.get_text() for text in axes.get_legend().get_texts()}
    assert named == {"me/pack-4bit", "me/source", "published"}
    assert figure.get_suptitle() == "me/pack-4bit: -25.0 points against me/source"
    (published,) = [line for line in axes.lines if line.get_label() == "published"]
    assert list(published.get_xdata()) == pytest.approx([77.6]) and list(published.get_ydata()) == [0]
    first, second = axes.containers
    assert list(first.lines[0].get_xdata()) == [50.0, 50.0] and list(second.lines[0].get_xdata()) == [75.0]


def test_two_models_of_one_name_are_two_series(tmp_path):
    pytest.importorskip("matplotlib")
    from mlx_qwen35.evaluate.plot import draw

    summary = summary_of(lines_of([1.0, 0.0]), lines_of([1.0, 1.0])) | {"model": "nano", "against": "nano"}
    summary["loaded"] = {"model": {"name": "nano + house"}, "against": {"name": "nano"}}
    (axes,) = draw(tmp_path / "scores.png", summary).axes
    assert [own.get_label() for own in axes.containers] == ["nano + house", "nano"]
    assert [list(own.lines[0].get_xdata()) for own in axes.containers] == [[50.0], [100.0]]


def test_a_unit_is_named_and_lower_is_said_to_be_better():
    summary = summary_of(lines_of([4.0, 2.0]), lines_of([3.0, 2.0]))
    summary["tasks"]["mmmu"]["unit"] = summary["tasks"]["mmmu"]["against"]["unit"] = "bits_per_byte"
    text = report(summary, {"mmmu": lines_of([4.0, 2.0])}, {"mmmu": lines_of([3.0, 2.0])}, "out", False)
    shown = described(summary)
    for fact in ("3 ± 1 bits per byte", "+0.5 ± 0.5 bits per byte", "mmmu: lower is better, in bits per byte"):
        assert fact in text and fact in shown
    assert "%" not in text.split("## Scores")[1].split("\n")[4].split("published")[0]  # of the row of the model


def test_questions_that_were_too_long_are_counted_and_told():
    ours = [line | {"finish_reason": "too_long"} for line in lines_of([0.0])] + lines_of([1.0, 1.0])[1:]
    summary = summary_of(ours)
    assert summary["tasks"]["mmmu"]["too_long"] == 1
    fact = "mmmu: 1 of 2 questions did not fit into the model's context. They were not asked, and count as wrong"
    assert fact in described(summary) and fact in told(ours)


def test_an_evaluation_without_scores_has_a_report_and_no_picture(tmp_path):
    summary = summary_of(lines_of([1.0])) | {"tasks": {}}
    write_report(tmp_path, summary, {}, {})
    assert (tmp_path / "report.md").is_file() and not (tmp_path / "scores.png").exists()


def test_an_error_of_nothing_is_said_to_be_no_certainty():
    alike, mixed = lines_of([1.0, 1.0]), lines_of([1.0, 0.0])
    assert "no certainty" in told(alike) and "no certainty" in told(mixed, mixed) and "no certainty" not in told(mixed)
