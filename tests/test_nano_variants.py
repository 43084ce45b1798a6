"""examples/nano/variants.py: what it converts, what it measures it on, and what it prints."""

from pathlib import Path
from random import Random

import pytest
from encoding import Encoder
from tasks import draw, is_held_out, items_of
from variants import (
    CALIBRATION,
    LESSONS,
    MODES,
    QUESTIONS,
    ROUNDS,
    VARIANTS,
    Held,
    Row,
    calibration_text,
    footnote,
    lessons,
    measure,
    table,
)

from mlx_qwen35.convert.recipes import RECIPES

BF16, CALIBRATED, SEARCHED, NEAREST = (
    next(v for v in VARIANTS if v.label == label)
    for label in ("--recipe bf16", "--recipe 4bit --calibration", "--recipe 4bit", "--recipe 4bit --rounding nearest")
)
HELD = Held(1, ("add_3",), ("add_1",))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variants")


@pytest.fixture(scope="module")
def rows(out: Path) -> dict[str, Row]:
    """Label -> row, of three variants."""
    return {variant.label: measure(variant, out, HELD) for variant in (BF16, SEARCHED, NEAREST)}


def test_every_recipe_is_a_variant_with_the_default_rounding():
    plain = [v.options["recipe"] for v in VARIANTS if set(v.options) == {"recipe"} and not v.calibrated]
    assert plain == list(RECIPES)


def test_a_label_is_the_options_of_the_command():
    for variant in VARIANTS:
        words = ["-q" if name == "quantize" else f"--{name} {value}" for name, value in variant.options.items()]
        assert variant.label == " ".join(words + ["--calibration"] * variant.calibrated)


def test_some_questions_show_pictures_and_no_lesson_does():
    def shown(task: str) -> bool:
        return bool(encoder.prompt(items_of(task, False, 1, 0)[0]).patches)

    encoder = Encoder()
    pictured = {"describe", "count", "colour", "shape", "nth_picture", "digits"}
    assert {task for task in QUESTIONS if shown(task)} == pictured
    assert not any(map(shown, LESSONS))


def test_a_lesson_counts_from_the_first_token_of_its_completion():
    tokens, first = lessons(HELD)
    item = items_of("add_3", MODES[0], 1, 0)[0]
    assert len(tokens) == len(first) == len(MODES)
    rest = Encoder().tokenizer.decode(tokens[0][first[0] :], skip_special_tokens=False)
    assert rest == f"{item.completion}<|im_end|>\n"


def test_no_lesson_is_in_the_calibration_text():
    text, encoder = calibration_text(), Encoder()
    keys = [(task, thinking, i) for i in range(ROUNDS) for task in CALIBRATION for thinking in MODES]
    for task, thinking, i in keys:
        item = draw(task, Random(f"calibration {(task, thinking, i)}"), held_out=False, thinking=thinking)
        assert f"{encoder.text(item)}{item.completion}<|im_end|>" in text
        assert item.key and not is_held_out(item.key)
    held = [item for task in LESSONS for thinking in MODES for item in items_of(task, thinking, 5, 0)]
    assert not any(encoder.text(item) in text for item in held)


def test_bf16_is_the_source(rows):
    row = rows[BF16.label]
    assert row.evaluation.top1 == 1 and abs(row.evaluation.kl) < 1e-6 and round(row.bits) == 16


def test_bytes_are_those_of_the_files(rows, out):
    for folder, row in (("recipe-bf16", rows[BF16.label]), ("recipe-4bit", rows[SEARCHED.label])):
        files = [file.read_bytes() for file in (out / folder).glob("*.safetensors")]
        headers = [8 + int.from_bytes(data[:8], "little") for data in files]
        assert row.nbytes == sum(map(len, files)) - sum(headers) and row.text_nbytes < row.nbytes


def test_rounding_changes_the_weights_and_not_their_size(rows):
    one, other = rows[SEARCHED.label], rows[NEAREST.label]
    assert (one.nbytes, one.bits) == (other.nbytes, other.bits)
    assert one.evaluation.kl != other.evaluation.kl


def test_questions_are_answered(rows):
    assert [(row.right, row.asked) for row in rows.values()] == [(2, 2)] * 3


def test_a_second_run_measures_the_same(rows, out):
    assert measure(SEARCHED, out, HELD) == rows[SEARCHED.label]


@pytest.mark.full
def test_calibration_changes_the_weights_and_not_their_size(rows, out):
    measure(CALIBRATED, out, HELD)
    plain, weighted = (
        next((out / name).glob("*.safetensors")).read_bytes() for name in ("recipe-4bit", "recipe-4bit-calibration")
    )
    assert len(plain) == len(weighted) and plain != weighted


def test_the_table_has_a_line_for_each_row_and_as_many_cells(rows):
    lines = table(list(rows.values())).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("`")[1] for line in lines[2:]] == list(rows)
    assert "| 16.00 | 0.00 ± 0.00 | 100.00 % |" in lines[2] and lines[2].endswith("| 2 of 2 |")


def test_the_footnote_says_what_was_counted_and_where(rows):
    text = footnote(list(rows.values()), 1)
    row = rows[BF16.label]
    assert f"{row.evaluation.positions} answer tokens of 2 text items" in text and "2 questions" in text
    assert "cores" in text and "mlx 0." in text
