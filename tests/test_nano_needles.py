"""nano's needles: texts as long as asked for, a number at its depth, a text in one part of the split; and what
examples/nano/retrieval.py makes of them."""

import itertools
import json
import re
from pathlib import Path
from random import Random

import pytest
from encoding import FOLDER, Encoder
from retrieval import DEPTHS, FRAME, TRAINED, Found, scaled, table
from tasks import draw, draw_lesson, is_held_out
from tasks.needles import haystack, needle, spread


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder()


@pytest.mark.parametrize(("tokens", "facts"), [(60, 1), (288, 8), (1000, 1), (4096, 400)])
def test_a_text_has_the_tokens_asked_for(encoder, tokens, facts):
    (text,) = haystack(Random(tokens), tokens, facts, 0.5).intro
    lines = text[text.index(":") + 1 :].rstrip()
    assert tokens - 12 < len(encoder.tokenizer.encode(lines, add_special_tokens=False).ids) <= tokens


@pytest.mark.parametrize("facts", [1, 8, 30])
@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_first_number_asked_for_lies_at_its_depth(facts, depth):
    context = haystack(Random(facts), 800, facts, depth)
    (text,), (values, order) = context.intro, context.data
    lines = text[text.index(":") + 2 :].rstrip(". ").split(". ")
    places = {key: lines.index(f"{key}: {value}") for key, value in values.items()}
    assert len(set(places.values())) == facts
    assert places[next(order)] == round(depth * (len(lines) - 1))


def test_a_number_is_asked_for_as_the_text_has_it():
    item, more = draw_lesson(needle(400, 6), Random(3), thinking=True, more=5)
    text = item.messages[-1]["content"]
    thoughts = [item.completion.partition("\n</think>")[0], *(turn.thought for turn in more)]
    answers = [item.answer, *(turn.answer for turn in more)]
    facts = [re.findall(r"(\w+(?: [A-Z]\w+)?): (\d\d)", thought) for thought in thoughts]
    assert [re.findall(r"\d\d", answer) for answer in answers] == [[value for _, value in some] for some in facts]
    asked = list(itertools.chain(*facts))
    assert len({key for key, _ in asked[:6]}) == 6  # each once before any twice
    assert all(f" {key}: {value}." in text for key, value in asked)


def test_a_text_is_trained_on_or_held_out_with_all_its_questions():
    for held_out in (False, True):
        item, more = draw_lesson(needle(200), Random(5), held_out, thinking=False, more=9)
        assert len(more) == 9 and {item.key} == {turn.key for turn in more}
        assert is_held_out(item.key) == held_out
        assert item.key.removeprefix("needle:") in item.messages[-1]["content"]


@pytest.mark.parametrize("tokens", [256, 1024])
def test_a_prompt_is_no_longer_than_its_length(encoder, tokens):
    lengths = [len(encoder.prompt(draw(needle(tokens - FRAME), Random(i), thinking=False)).ids) for i in range(20)]
    assert tokens - 50 < min(lengths) and max(lengths) <= tokens


def test_lengths_are_spread_by_doublings():
    drawn = [spread(Random(i), 512, 4096) for i in range(600)]
    counts = [sum(low <= length < 2 * low for length in drawn) for low in (512, 1024, 2048)]
    assert min(drawn) >= 512 and max(drawn) <= 4096 and min(counts) > 160


# --- their evaluation ------------------------------------------------------------------------------------------------


def test_a_factor_is_written_into_a_copy():
    before = (FOLDER / "config.json").read_bytes()
    with scaled(FOLDER, 2) as copy:
        rope = json.loads((copy / "config.json").read_text())["text_config"]["rope_parameters"]
        plain = json.loads(before)["text_config"]["rope_parameters"]
        yarn = {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": TRAINED}
        assert rope == plain | yarn and (copy / "model.safetensors").exists()
    with scaled(FOLDER, 1) as same:
        assert same == FOLDER and not Path(copy).exists()
    assert (FOLDER / "config.json").read_bytes() == before


def test_a_row_of_the_table_is_a_length_with_its_facts_and_factor():
    found = [Found(8192, depth, facts, 2, 4, 4 if depth < 1 else 3) for facts in (1, 0) for depth in DEPTHS]
    assert table(found).splitlines()[2:] == [
        "| 8192 | 1 | 2 | 100 % | 100 % | 100 % | 100 % | 75 % | 95 % |",
        "| 8192 | 400 | 2 | 100 % | 100 % | 100 % | 100 % | 75 % | 95 % |",
    ]
