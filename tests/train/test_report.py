"""The report of a training run: questions of rows, answers and drafts before and after, tables, and the picture."""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import load
from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.train import plot
from mlx_qwen35.train.options import TrainOptions
from mlx_qwen35.train.record import Counts, Run, Step, Validation
from mlx_qwen35.train.report import PICTURE, after, before, report
from mlx_qwen35.train.rows import Row
from mlx_qwen35.train.samples import Answers, answers, questions

PICTURES = Path(__file__).parents[2] / "examples/pictures"
SHAPES = ({"type": "image", "image": str(PICTURES / "shapes.png")}, {"type": "text", "text": "What do you see?"})
UP = "model.language_model.layers.7.mlp.up_proj.weight"
HEAD = "mtp.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def row(processor: Processor, asked, answer: str, line: int = 1, cut: int = 0) -> Row:
    """A row of one turn without thinking."""
    prompt = processor.encode_messages([{"role": "user", "content": asked}], enable_thinking=False)
    said = processor.encode_text(f"{answer}<|im_end|>").tokens
    targets = (False,) * len(prompt.tokens) + (True,) * len(said)
    return Row((*prompt.tokens, *said), targets, prompt.media, line, cut)


def pair(seed: int = 0, size: float = 1.0) -> Pair:
    """For a map from 128 to 256 dimensions."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 128**-0.5, (4, 128)), rng.normal(0, size, (256, 4))
    return Pair(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)), 1.0)


def run(steps: int = 40, validations: Sequence[Validation] = (), **more) -> Run:
    made = [Step(n, 4.0 / n, 1e-3 * n / steps, 10, 100, 0.5) for n in range(1, steps + 1)]
    counts = {"train": Counts(40, 4000, 400, 2, 0, 1)}
    return Run("nano", "lessons", TrainOptions(rank=4), counts, made, validations, **more)


def told(which: Run, now: Sequence[str] = (), along: Answers | None = None, **pairs: Pair) -> str:
    """The report of a run whose answers are all wrong before."""
    from mlx_qwen35.prompt.prompt import Prompt
    from mlx_qwen35.train.report import Before
    from mlx_qwen35.train.samples import Question

    asked = tuple(Question(Prompt((1,), False), f"question {i}", f"right {i}", i) for i in range(len(now)))
    earlier = Before(asked, Answers(("wrong",) * len(now), 20, 19))
    given = {UP: pair(), HEAD: pair()} if along else {UP: pair()}
    return report(earlier, Answers(tuple(now), 20, 6), along, which, given, "lessons-adapter", False)


# --- questions -------------------------------------------------------------------------------------------------------


def test_a_row_asks_what_stands_before_its_last_answer(nano):
    processor = nano[1]
    first = row(processor, "What is 12 + 30?", "42")
    more = processor.encode_text("<|im_start|>user\nAnd 2 + 2?<|im_end|>\n<|im_start|>assistant\n").tokens
    said = processor.encode_text("4<|im_end|>").tokens
    both = Row((*first.tokens, *more, *said), (*first.targets, *(False,) * len(more), *(True,) * len(said)), line=7)
    (asked,) = questions([both], processor)
    assert (asked.shown, asked.right, asked.line) == ("And 2 + 2?", "4", 7)
    assert asked.prompt.tokens == (*first.tokens, *more) and not asked.prompt.thinking


def test_a_row_with_a_picture_asks_with_it(nano):
    (asked,) = questions([row(nano[1], SHAPES, "A red circle and a blue square.")], nano[1])
    assert asked.shown == "(image) What do you see?" and len(asked.prompt.media) == 1


def test_a_text_asks_for_its_second_half(nano):
    tokens = nano[1].encode_text("one two three four five six").tokens
    (asked,) = questions([Row(tokens, (False, *(True,) * (len(tokens) - 1)))], nano[1])
    assert asked.prompt.tokens == tokens[: len(tokens) // 2]
    assert asked.shown + asked.right.rjust(len(asked.right) + 1) == "one two three four five six"


def test_rows_are_asked_that_are_spread_and_whole(nano):
    rows = [row(nano[1], f"What is {n} + 1?", str(n + 1), line=n, cut=n % 4 == 0) for n in range(40)]
    lines = [asked.line for asked in questions(rows, nano[1], 8)]
    assert len(lines) == 8 and min(lines) < 8 and max(lines) > 32 and not any(line % 4 == 0 for line in lines)
    assert len(questions([replace(own, cut=1) for own in rows], nano[1], 8)) == 8  # where all are cut, they are asked
    assert not questions([Row((1, 2), (False, False))], nano[1])


def test_few_rows_of_many_are_rendered(nano):
    class Rows(list):
        asked = 0

        def __getitem__(self, index):
            self.asked += 1
            return super().__getitem__(index)

    rows = Rows(row(nano[1], "What is 1 + 1?", "2") for _ in range(300))
    assert len(questions(rows, nano[1], 8)) == 8 and rows.asked == 8
    cut = Rows(replace(own, cut=1) for own in rows)
    assert len(questions(cut, nano[1], 8)) == 8 and cut.asked == 32


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_model_and_drafts_are_counted(nano):
    rows = [row(nano[1], SHAPES, "?"), row(nano[1], "What is 34 + 58?", "92")]
    found = answers(*nano, questions(rows, nano[1]))
    assert found.texts == ("A red circle and a blue square.", "92")
    assert found.drafted and found.accepted is not None and 0.5 < found.acceptance <= 1


def test_an_adapter_answers_only_while_it_is_asked(nano):
    model, processor = nano
    asked, adapters = questions([row(processor, "What is 34 + 58?", "92")], processor), model.adapters
    assert answers(model, processor, asked).texts == ("92",)
    assert answers(model, processor, asked, {UP: pair(size=9)}).texts != ("92",)
    assert model.adapters is adapters and not adapters and answers(model, processor, asked).texts == ("92",)


def test_a_changed_head_changes_drafts_and_no_answer(nano):
    asked = questions([row(nano[1], SHAPES, "?")], nano[1])
    plain, changed = answers(*nano, asked), answers(*nano, asked, {HEAD: pair(size=9)})
    assert changed.texts == plain.texts and changed.acceptance < plain.acceptance


def test_a_model_without_a_draft_head_has_no_statistics(nano):
    model, processor = nano
    head, model.mtp = model.mtp, None
    try:
        found = answers(model, processor, questions([row(processor, "What is 34 + 58?", "92")], processor))
    finally:
        model.mtp = head
    assert found == Answers(("92",)) and found.acceptance is None


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_files_of_a_report(nano, tmp_path):
    pytest.importorskip("matplotlib")
    model, processor = nano
    earlier = before(model, processor, [row(processor, "What is 34 + 58?", "92")])
    file = after(earlier, run(), model, processor, {UP: pair(), HEAD: pair()}, tmp_path)
    text = file.read_text()
    assert file == tmp_path / "report.md" and f"]({PICTURE})" in text and (tmp_path / PICTURE).stat().st_size > 10_000
    assert "2 maps, 1 of them in the draft head: 3,072 numbers" in text and "after, draft head trained along" in text
    assert str(tmp_path) not in text


def test_without_matplotlib_the_report_says_how_to_get_the_picture(nano, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    earlier = before(*nano, [])
    text = after(earlier, run(), *nano, {}, tmp_path).read_text()
    assert "pip install 'mlx-qwen35[plot]'" in text and not (tmp_path / PICTURE).exists()


def test_losses_have_a_row_for_each_validation_and_mark_what_was_kept():
    validations = [Validation(0, 4.0), Validation(10, 1.0), Validation(20, 0.5), Validation(30, 0.75)]
    text = told(run(30, validations, best=20))
    assert "Validation loss fell from 4.00 to 0.500 in 20 steps" in text
    losses = [0.1 * sum(4.0 / n for n in range(first, first + 10)) for first in (1, 11, 21)]
    assert f"| 10 | {losses[0]:#.3g} | 1.00 |  |\n| 20 | {losses[1]:#.3g} | 0.500 | kept |" in text
    assert f"| 30 | {losses[2]:#.3g} | 0.750 |  |" in text


def test_what_did_not_fall_is_said():
    which = run(20, [Validation(0, 1.0), Validation(20, 2.0)], best=0)
    assert which.claim == "Validation loss did not fall below the 1.00 before the first step"


def test_without_validation_the_first_and_the_last_tenth_of_the_steps_are_told():
    assert run(20).claim == "Training loss: 3.00 in the first 2 of 20 steps, 0.205 in the last 2"
    assert run(3).claim == "Training loss: 4.00 in the first of 3 steps, 1.33 in the last"
    assert run(1).claim == "Training loss: 4.00 in the only step"


def test_losses_that_differ_a_little_are_told_apart():
    which = run(1, [Validation(0, 6.0341), Validation(1, 6.0312)], best=1)
    assert which.claim == "Validation loss fell from 6.0341 to 6.0312 in 1 step"


def test_cut_rows_options_and_their_costs_are_told():
    text = told(run(peak=3_210_000_000, planned=3_100_000_000, ended="All steps are done."))
    assert "`--max-length`: 2 cut, whose last tokens were not learnt; 1 left out" in text and "`--rank 4`" in text
    assert "40 steps in 20 s: 200 tokens a second. Memory at its highest: 3.2 GB; the plan was 3.1 GB." in text
    assert "All steps are done." in text and "| train | 40 | 4,000 | 400 | 0 | 2 | 1 |" in text


def test_answers_and_drafts_are_counted_before_and_after():
    text = told(run(), ["right 0", "right 1", "wrong"], along=Answers(("",) * 3, 20, 18))
    assert "0 of 3 before, 2 after" in text and "- after: `right 1`" in text
    assert "| before | 19 of 20 | 95 % |" in text and "| after, draft head as it was | 6 of 20 | 30 % |" in text
    assert "| after, draft head trained along | 18 of 20 | 90 % |" in text


def test_what_an_answer_holds_cannot_break_the_report():
    text = told(run(), ["a `tick`\n| b |"])
    assert "- after: `` a `tick`⏎| b | ``" in text


def test_commands_of_the_report_use_the_adapter():
    commands = re.findall(r"^mlx_qwen35.\w+ .*", told(run()), re.MULTILINE)
    assert len(commands) == 3 and all("--adapter lessons-adapter" in command for command in commands)


def test_the_report_of_a_quantized_model_does_not_fuse_into_it():
    text = told(run(quantized=True))
    assert "convert" not in text and 'from_pretrained("ORIGINAL")' in text


# --- the picture -----------------------------------------------------------------------------------------------------


def test_the_picture_claims_what_the_losses_say(tmp_path):
    pytest.importorskip("matplotlib")
    which = run(60, [Validation(0, 4.0), Validation(30, 0.2), Validation(60, 0.3)], best=30)
    figure = plot.draw(tmp_path / "a.png", which, "nano")
    assert figure.get_suptitle() == which.claim == "Validation loss fell from 4.00 to 0.200 in 30 steps"
    losses, rates = figure.axes
    assert losses.get_yscale() == "log" and rates.get_ylim()[0] == 0
    kept = next(line for line in losses.lines if line.get_label() == "kept")
    assert list(kept.get_xydata()[0]) == [30, 0.2]


@pytest.mark.full
@pytest.mark.parametrize("steps", [1, 2, 5, 2000])
def test_a_picture_of_any_number_of_steps(tmp_path, steps):
    pytest.importorskip("matplotlib")
    plot.draw(tmp_path / "a.png", run(steps), "nano")
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.full
def test_a_single_step_far_off_does_not_flatten_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    which = run(200)
    steps = [own._replace(loss=1.0 + 1e-3 * own.step) for own in which.steps]
    steps[150] = steps[150]._replace(loss=90.0)
    figure = plot.draw(tmp_path / "a.png", replace(which, steps=steps), "nano")
    assert figure.axes[0].get_ylim()[1] < 12


def test_losses_are_smoothed_by_their_targets():
    made = [(1.0, 1)] * 50 + [(3.0, 3)] * 50
    steps = [Step(n, loss, 1e-3, targets, 10, 1.0) for n, (loss, targets) in enumerate(made, 1)]
    line = plot.smoothed(replace(run(), steps=steps))
    assert line[:40] == [1.0] * 40 and line[60:] == [3.0] * 40 and line[50] == pytest.approx((4 * 1 + 5 * 3 * 3) / 19)
