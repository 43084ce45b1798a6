"""Questions through nano: neighbours change no answer, a run goes on where it was ended, options reach the sampler."""

from dataclasses import replace

import mlx.core as mx
import pytest
from asking import OPTIONS, Scripted, Sums, by_key
from refusing import refused

from mlx_qwen35 import InputError, load
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.presets import PRESETS
from mlx_qwen35.evaluate.asking import Asker, Question, merged, seed_of
from mlx_qwen35.evaluate.run import chosen
from mlx_qwen35.evaluate.subject import Subject
from mlx_qwen35.evaluate.task import Asked
from mlx_qwen35.load import LoadOptions


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def questions(task, seed: int = 0):
    return [Question(item.key, seed_of(task.name, item.key, seed), task.ask(item)) for item in task.items()]


def subject(out, **more) -> Subject:
    return Subject(LoadOptions("nano"), more.pop("given", {}), more.pop("rows", 4), more.pop("seed", 0), out)


@pytest.mark.parametrize("temp", [4.0, pytest.param(0.0, marks=pytest.mark.full)])
def test_the_batch_size_changes_no_answer(nano, temp):
    task = Sums(4, thinks=True, temp=temp, presence_penalty=1.0, max_tokens=16)
    alone, together = ([*Asker(*nano, {}, rows).answers(questions(task, 3))] for rows in (1, 3))
    assert by_key(alone) == by_key(together) and [line["key"] for line in alone] == [f"sum{i}" for i in range(4)]
    others = Asker(*nano, {}, 4).answers(questions(task, 4))
    same = {line["answer"] for line in others} == {line["answer"] for line in alone}
    assert same == (temp == 0.0)  # by other seeds others come, where answers are sampled


def test_seeds_differ_by_question_task_and_run():
    seeds = {seed_of(*given) for given in (("a", "1", 0), ("a", "2", 0), ("b", "1", 0), ("a", "1", 1))}
    assert len(seeds) == 4 and seed_of("a", "1", 0) == seed_of("a", "1", 0)


def test_a_run_that_was_ended_behind_seven_answers_ends_with_the_same_file(tmp_path):
    task = Sums(8, temp=1.0)
    full, ended = tmp_path / "full", tmp_path / "ended"
    full.mkdir(), ended.mkdir()
    lines, whole = subject(full).run(task)
    text = (full / "sums.jsonl").read_bytes()
    (ended / "sums.jsonl").write_bytes(b"".join(text.splitlines(keepends=True)[:7][::-1]) + b'{"key": "su')
    again, found = subject(ended, rows=1).run(task)
    assert again == lines and replace(found, seconds=whole.seconds) == whole
    assert (ended / "sums.jsonl").read_bytes() == text


def test_a_whole_run_asks_nothing_again_and_loads_no_model(tmp_path, monkeypatch):
    task = Sums(3)
    lines, _ = subject(tmp_path).run(task)
    monkeypatch.setattr(Engine, "step", None)
    assert subject(tmp_path).run(task)[0] == lines


def test_an_answer_is_judged_on_the_text_behind_the_reasoning(nano, tmp_path):
    _, processor = nano
    said = processor.tokenizer.encode("Question: which? The answer is (A)\n</think>\n\n(B)<|im_end|>")
    (line,), found = subject(tmp_path).run(Scripted(said, "(B)"))
    assert (line["answer"], line["score"], line["finish_reason"], line["cut_at_limit"]) == ("(B)", 1.0, "stop", False)
    assert found.cut_at_limit == 0 and 0 < line["reasoning_tokens"] < line["tokens"]


def test_one_that_never_stops_thinking_is_counted_as_cut(nano, tmp_path):
    _, processor = nano
    said = processor.tokenizer.encode("The answer is (A) ")
    (line,), found = subject(tmp_path).run(Scripted(said, "(A)", endless=True, max_tokens=12))
    assert (line["answer"], line["score"], line["tokens"], line["cut_at_limit"]) == ("", 0.0, 12, True)
    assert (found.score, found.cut_at_limit, found.settings["max_tokens"]) == (0.0, 1, 12)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_s_settings_reach_the_sampler_and_the_summary(nano, preset, tmp_path, monkeypatch):
    reached = []
    monkeypatch.setattr(Engine, "add", lambda self, own: reached.append(own))
    asker = Asker(*nano, {"preset": preset}, 1)
    with pytest.raises(IndexError):  # nothing is running
        monkeypatch.setattr(Engine, "step", lambda self: [][0])
        next(asker.answers(questions(Sums(1, top_k=3))))
    published = PRESETS[preset]
    assert reached[0].sampler.sampling == published.sampling and reached[0].limit > 32_000  # of its context
    told = subject(tmp_path, given={"preset": preset}).settings(Sums(1, top_k=3))
    assert (told["temp"], told["top_k"], told["top_p"]) == (
        published.sampling.temp, published.sampling.top_k, published.sampling.top_p,
    )  # fmt: skip
    assert (told["max_tokens"], told["enable_thinking"], told["seed"]) == (published.max_tokens, published.thinking, 0)


def test_what_the_user_gives_wins_over_a_task_s_options():
    own = {**OPTIONS, "preset": "coding", "top_k": 3, "stop": ["x"]}
    asked = Asked("Who?", own)
    assert merged(asked, {}) == own
    assert merged(asked, {"max_tokens": 9}) == own | {"max_tokens": 9}
    assert merged(asked, {"preset": "instruct"}) == {"preset": "instruct", "stop": ["x"]}
    assert merged(asked, {"enable_thinking": False}) == OPTIONS | {"enable_thinking": False, "top_k": 3, "stop": ["x"]}


def test_sizes_of_images_hold_for_the_questions_that_show_one():
    given, part = {"max_pixels": 4096}, {"type": "image", "image": "a.png"}
    shown = [Asked("Who?", {"images": ["a.png"]}), Asked([{"role": "user", "content": [part]}])]
    assert all(merged(asked, given)["max_pixels"] == 4096 for asked in shown)
    assert merged(Asked("Who?", given), given) == {}


def test_the_most_probable_of_the_choices_is_the_answer(nano):
    sums = {"6": (2, 4), "7": (3, 4), "8": (5, 3)}
    given = [Question(right, 1, Asked(f"What is {a} + {b}?", choices=[*sums])) for right, (a, b) in sums.items()]
    lines = [*Asker(*nano, {"temp": 1.0}, 2).answers(given)]
    assert [line["answer"] for line in lines] == [*sums] and {line["finish_reason"] for line in lines} == {"choice"}


@pytest.fixture
def alone(monkeypatch):
    """What other tests hold in memory does not count."""
    active = mx.get_active_memory
    before = active()
    monkeypatch.setattr(mx, "get_active_memory", lambda: active() - before)


def test_fewer_questions_run_at_a_time_where_memory_has_no_room_for_their_longest_answers(alone, nano, monkeypatch):
    model, processor = load("nano", memory_limit=0.16)
    at_once, add, step = [0], Engine.add, Engine.step

    def adding(self, *own):
        add(self, *own)
        at_once.append(at_once[-1] + len(own))

    def stepping(self):
        changed = step(self)
        at_once.append(at_once[-1] - sum(own.finished for own in changed))
        return changed

    monkeypatch.setattr(Engine, "add", adding)
    monkeypatch.setattr(Engine, "step", stepping)
    lines = [*Asker(model, processor, {}, 4).answers(questions(Sums(4, max_tokens=20_000)))]
    assert {*by_key(lines)} == {"sum0", "sum1", "sum2", "sum3"} and 0 < max(at_once) < 4


def test_an_answer_that_memory_would_shorten_is_refused(alone, nano):
    model, processor = load("nano", memory_limit=0.05)
    for own, told in (({"preset": "instruct"}, "max_tokens"), ({"max_tokens": 200_000}, "max_tokens")):
        with refused("memory_exceeded", "question sum0", told):
            next(Asker(model, processor, own, 2).answers(questions(Sums(2))))


def test_a_question_that_cannot_be_asked_ends_the_run_with_its_error(nano):
    with pytest.raises(InputError):
        next(Asker(*nano, {}, 2).answers([Question("1", 1, Asked(""))]))


def narrow(own: Subject, window: int) -> Subject:
    """A subject whose model has a context of so many tokens."""
    text = replace(own.checkpoint.config.text, max_position_embeddings=window)
    own.checkpoint = replace(own.checkpoint, config=replace(own.checkpoint.config, text=text))
    return own


class Long(Sums):
    """Of its questions the second is long, with choices the third; an answer without text is right."""

    def judge(self, item, answer):
        return super().judge(item, answer) or float(not answer)

    def ask(self, item):
        asked = super().ask(item)
        asked = replace(asked, options={**asked.options, "max_tokens": 9})
        return {"sum1": replace(asked, prompt="1 + " * 100), "sum2": replace(asked, choices=["1", "1 + " * 100])}.get(
            item.key, asked
        )


def test_a_question_longer_than_the_context_is_counted_as_such_and_the_others_are_asked(tmp_path):
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    whole.mkdir(), ended.mkdir()
    lines, found = narrow(subject(whole), 100).run(Long(4))
    assert [line["finish_reason"] for line in lines] == ["stop", "too_long", "too_long", "stop"]
    assert [line["score"] for line in lines] == [1.0, 0.0, 0.0, 1.0] and lines[1]["expected"] == "74"
    assert (found.n, found.score, found.too_long, found.cut_at_limit) == (4, 0.5, 2, 0)
    text = (whole / "sums.jsonl").read_bytes()
    (ended / "sums.jsonl").write_bytes(b"".join(text.splitlines(keepends=True)[:1]))
    assert narrow(subject(ended), 100).run(Long(4))[0] == lines and (ended / "sums.jsonl").read_bytes() == text


def test_a_task_of_which_no_question_fits_is_refused(tmp_path):
    with refused("context_length_exceeded", "question sum0"):
        narrow(subject(tmp_path), 10).settings(Sums(2))


def test_some_questions_are_spread_evenly():
    assert chosen(range(10), 4) == [0, 2, 5, 7] and chosen(range(3), 5) == chosen(range(3), None) == [0, 1, 2]
