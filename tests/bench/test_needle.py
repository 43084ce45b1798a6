"""mlx_qwen35.bench --needle: its texts, what it asks of them, and what it says of the answers."""

import json
import random

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from refusing import refused

from mlx_qwen35 import Model, generate, load
from mlx_qwen35.bench import main
from mlx_qwen35.bench.haystack import CHAIN, Haystack, needles, written
from mlx_qwen35.bench.heatmap import draw, format_table, summarize
from mlx_qwen35.bench.needle import ANSWER, DEPTHS, KINDS, Answer, answers, common, measure
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.console.plot import NONE_AND_ALL


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def answer(kind: str, length: int, depth: float, said: str = "no", round: int = 0) -> Answer:
    return Answer(kind, length, length - 2, depth, round, 47, said, 2.0)


# --- the texts -------------------------------------------------------------------------------------------------------


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(("kind", "texts", "lines"), [("single", 5, 1), ("several", 1, 5), ("chain", 1, 5 * CHAIN)])
def test_each_number_stands_at_its_depth_and_is_asked_for_by_its_key(kind, texts, lines):
    found = needles(random.Random(0), kind, DEPTHS)
    assert len(found) == texts and sum(len(needle.lines) for needle in found[0]) == lines
    asked = [needle for text in found for needle in text]
    assert [needle.depth for needle in asked] == list(DEPTHS)
    assert len({needle.number for needle in asked}) == len({needle.key for needle in asked}) == len(DEPTHS)
    filler = [f"line {i}." for i in range(1000)]
    for text in found:
        whole = written(filler, text)
        for needle in text:
            place, said = needle.lines[0]
            assert place == needle.depth and said.endswith(f"{needle.number}.")
            assert needle.lines[-1][1].startswith(f"{needle.key}:") and needle.key in needle.question
            assert whole.index(said) / len(whole) == pytest.approx(needle.depth, abs=0.03)
        assert [line for line in filler if line not in whole] == []


def test_a_chain_leads_from_the_key_that_is_asked_for_to_the_number():
    (text,) = needles(random.Random(0), "chain", DEPTHS)
    said = dict(line[:-1].split(": ") for needle in text for _, line in needle.lines)
    for needle in text:
        value = said[needle.key]
        for _ in range(CHAIN - 1):
            value = said[value.removeprefix("as ")]
        assert value == str(needle.number)


@pytest.mark.parametrize("tokens", [0, 7, 500, 501, 502])
def test_a_haystack_fills_its_room_and_begins_alike_at_every_length(tokens):
    haystack = Haystack(3, words)
    filled = haystack.fill(tokens)
    assert tokens - 4 <= words(" ".join(filled)) <= tokens
    alike = max(0, len(filled) - 3)
    assert filled[:alike] == haystack.fill(900)[:alike] == Haystack(3, words).fill(900)[:alike]
    assert Haystack(4, words).fill(900) != haystack.fill(900)


# --- the questions ---------------------------------------------------------------------------------------------------


def test_an_answer_is_right_where_the_number_stands_in_it_by_itself():
    said = {"47": True, "It is 47.": True, "147": False, "4 7": False, "": False}
    assert {text: answer("single", 9, 0, text).right for text in said} == said


@pytest.mark.full
def test_what_prompts_share_is_read_once_and_the_answers_are_those_of_whole_prompts(nano):
    generator = random.Random(1)
    text = [generator.randrange(5, 300) for _ in range(150)]
    prompts = [text, [*text[:120], 7, 8, 9], [*text[:120], 11, 12], [*text[:40], 30, 31], [*text[:40], 32]]
    told: list[tuple[int, int]] = []
    said = answers(*nano, prompts, lambda *counts: told.append(counts))
    assert said == [generate(*nano, prompt, temp=0, max_tokens=ANSWER).text for prompt in prompts]
    read = 150 + 3 + 2 + 2 + 1
    assert told[-1] == (read, read) and [done for done, _ in told] == sorted({done for done, _ in told})


def test_common_beginnings():
    assert [common(*pair) for pair in ([[], [1]], [[1, 2], [1, 2]], [[1, 2], [1, 3]], [[1], [1, 2]])] == [0, 2, 1, 1]


@pytest.mark.full
def test_prompts_have_the_length_that_was_asked_for_and_every_depth_is_asked(nano):
    found = [one for some in measure(*nano, [160], 1) for one in some]
    assert [(one.kind, one.depth) for one in found] == [(kind, depth) for kind in KINDS for depth in DEPTHS]
    for kind in KINDS:
        lengths = [one.tokens for one in found if one.kind == kind]
        assert max(lengths) <= 160 and min(lengths) >= 160 - 8
    assert any(one.right for one in found if one.kind == "single"), "nano was trained to look numbers up"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_length_that_the_window_has_no_room_for_is_refused_before_anything_is_read(nano):
    window = nano[0].config.max_position_embeddings
    with refused("context_length_exceeded", f"{window - ANSWER:,}", f"{window:,}", "rope_scaling"):
        measure(*nano, [200, window - ANSWER + 1], 1)


def test_a_length_that_memory_has_no_room_for_is_refused(nano, monkeypatch):
    monkeypatch.setattr(nano[0], "memory_limit", mx.get_active_memory() + 3_000_000)
    with refused("memory_exceeded", "20,032"):
        measure(*nano, [200, 20_000], 1)


def test_a_length_too_short_for_the_questions_is_refused(nano):
    with refused("option_invalid", "needle", "20"):
        measure(*nano, [20], 1)


def test_every_length_is_checked_before_the_first_is_measured(nano, monkeypatch):
    monkeypatch.setattr(Model, "hidden", lambda *_: pytest.fail("a length was measured"))
    with refused("option_invalid", "needle", "20"):
        measure(*nano, [200, 20], 1)


@pytest.mark.core(1)
@pytest.mark.parametrize("whole", [0, 2])
def test_what_was_measured_before_ctrl_c_is_shown_and_written(whole, tmp_path, capsys, monkeypatch):
    """whole: kinds of the first length. A snapshot is restored before each of a kind's questions."""
    pytest.importorskip("matplotlib")
    files, calls, restore = [tmp_path / "all.json", tmp_path / "map.png"], [], Cache.restore

    def interrupted(cache, snapshot):
        calls.append(snapshot)
        if len(calls) > len(DEPTHS) * whole + 2:
            raise KeyboardInterrupt
        restore(cache, snapshot)

    monkeypatch.setattr(Cache, "restore", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["--model", "nano", "--needle", "150,160", "--json", str(files[0]), "--plot", str(files[1])])
    assert [file.exists() for file in files] == [whole > 0] * 2
    if whole:
        content = json.loads(files[0].read_text())
        assert len(content["answers"]) == len(DEPTHS) * whole
        assert [(row["kind"], row["length"]) for row in content["rows"]] == [(kind, 150) for kind in KINDS[:whole]]
        assert "several" in capsys.readouterr().out


def test_a_kind_that_was_measured_at_fewer_lengths_has_fewer_rows():
    found = [answer(kind, length, depth) for kind, length in (("single", 5), ("several", 5), ("single", 9))
             for depth in DEPTHS]  # fmt: skip
    assert [(row.kind, row.length) for row in summarize(found)] == [("single", 5), ("single", 9), ("several", 5)]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--geometry", "tiny", "--needle", "1k"), "option_conflict"),
        (("--model", "nano", "--needle", "1k", "--compare", "mlx-lm"), "option_no_effect"),
        (("--model", "nano", "--needle", "1k", "--decode-tokens", "32"), "option_no_effect"),
        (("--model", "nano", "--kv-bits", "8"), "option_no_effect"),
        (("--model", "nano", "--rope-scaling", "yarn", "--compare", "mlx-lm"), "option_conflict"),
    ],
)
def test_options_without_effect_are_refused(arguments, code, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"[{code}]" in capsys.readouterr().err


# --- what is said ----------------------------------------------------------------------------------------------------


def test_the_table_counts_right_answers_by_kind_length_and_depth():
    found = [
        answer(kind, length, depth, "47" if depth <= 0.5 or kind == "single" else "46", round)
        for round in range(2) for length in (500, 4000) for kind in ("single", "several") for depth in DEPTHS
    ]  # fmt: skip
    found[5] = answer("several", 500, 0.0, "none", 0)
    rows = summarize(found)
    assert [(row.kind, row.length, row.right) for row in rows] == [
        ("single", 500, (2, 2, 2, 2, 2)), ("single", 4000, (2, 2, 2, 2, 2)),
        ("several", 500, (1, 2, 2, 0, 0)), ("several", 4000, (2, 2, 2, 0, 0)),
    ]  # fmt: skip
    lines = format_table({"chip": "abacus"}, "some model", rows).splitlines()
    assert "abacus" in lines[0] and "some model" in lines[1]
    (line,) = (line for line in lines if line.startswith("several") and " 500 " in line)
    assert line.split() == ["several", "500", "▒", "1/2", "█", "2/2", "█", "2/2", "0/2", "0/2", "50%", "2.0", "s"]


def test_the_picture_has_a_map_for_each_kind_with_a_colour_for_each_share(tmp_path):
    pytest.importorskip("matplotlib")
    found = [answer(kind, 500, depth, "47" if depth else "no") for kind in ("single", "chain") for depth in DEPTHS]
    draw(tmp_path / "map.png", "nano", "a note", summarize(found))
    pixels = np.asarray(Image.open(tmp_path / "map.png").convert("RGB"), int)
    none, every = (np.sum(abs(pixels - [*bytes.fromhex(colour[1:])]).max(-1) < 8) for colour in NONE_AND_ALL)
    assert every > 3 * none > 3 * 1000
    with refused("output_unwritable"):
        draw(tmp_path / "none" / "map.png", "nano", "a note", summarize(found))


@pytest.mark.full
def test_the_command_prints_a_table_and_writes_every_answer(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "all.json", tmp_path / "map.png"]
    main(["--model", "nano", "--needle", "150", "--json", str(files[0]), "--plot", str(files[1])])
    out = capsys.readouterr().out
    assert "mlx " in out and "nano" in out and all(kind in out for kind in KINDS)
    content = json.loads(files[0].read_text())
    assert set(content) == {"machine", "model", "depths", "rows", "answers"}
    assert len(content["answers"]) == len(KINDS) * len(DEPTHS) and files[1].stat().st_size > 1000
