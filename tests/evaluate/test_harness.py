"""Tasks of lm-eval: nano's known scores offline, what is asked, what counts as the answer, and what is refused."""

import json
import socket
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from refusing import refused

from mlx_qwen35 import Model, load
from mlx_qwen35.engine.presets import PRESETS
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.evaluate import evaluate
from mlx_qwen35.evaluate.harness_tasks import find_task
from mlx_qwen35.evaluate.names import find
from mlx_qwen35.evaluate.subject import Subject
from mlx_qwen35.load import LoadOptions

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval (pip install 'mlx-qwen35[eval]')")

pytestmark = pytest.mark.full  # importing lm-eval takes seconds
ROWS = '{"a": "One?", "b": 1}\n{"a": "Two?", "b": 0}\n'
TASKS = Path(__file__).parent / "lm_eval"
ALL = [str(TASKS / f"{name}.yaml") for name in ("sums", "choices", "texts")]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """The network is blocked, and data sets are kept apart from the user's."""
    import datasets

    def connect(*given):
        raise AssertionError(f"a test reached for the network: {given[1:]}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def lines(out: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{task}.jsonl").read_text().splitlines()]


# --- scores -----------------------------------------------------------------------------------------------------------


def test_nano_has_its_known_scores(tmp_path):
    tasks = evaluate("nano", ALL, tmp_path / "out")["tasks"]
    assert {name: (own["n"], own["cut_at_limit"]) for name, own in tasks.items()} == {
        "sums": (12, 0), "choices": (12, 0), "texts": (3, 0),
    }  # fmt: skip
    assert tasks["sums"]["score"] == tasks["choices"]["score"] == 1.0
    assert tasks["texts"]["score"] == pytest.approx(3.2105, abs=1e-3) and tasks["texts"]["unit"] == "bits_per_byte"
    assert tasks["sums"]["settings"]["enable_thinking"] and not tasks["choices"]["settings"]["enable_thinking"]
    assert tasks["sums"]["versions"]["lm_eval"] == lm_eval.__version__
    assert all(line["reasoning_tokens"] > 4 for line in lines(tmp_path / "out", "sums"))


def test_nano_adds_without_thinking_too(tmp_path):
    own = evaluate("nano", ALL[0], tmp_path / "out", enable_thinking=False)["tasks"]["sums"]
    assert own["score"] == 1.0 and not own["settings"]["enable_thinking"]


def test_a_killed_run_and_another_batch_size_give_the_same_files(tmp_path):
    evaluate("nano", ALL, tmp_path / "whole", batch_size=1, items=9)

    class Killed(Exception):
        pass

    def kill(what, done, total, unit):
        if "sums" in what and done == 7:
            raise Killed

    with pytest.raises(Killed):
        evaluate("nano", ALL, tmp_path / "parts", items=9, watch=kill)
    assert [line["score"] for line in lines(tmp_path / "parts", "sums")] == [None] * 7
    evaluate("nano", ALL, tmp_path / "parts", items=9)
    for name in ("sums", "choices", "texts"):
        parts, whole = (tmp_path / run / f"{name}.jsonl" for run in ("parts", "whole"))
        assert parts.read_bytes() == whole.read_bytes()


def test_a_model_against_itself_differs_nowhere(tmp_path):
    tasks = evaluate("nano", ALL, tmp_path / "out", against="nano", items=4, enable_thinking=False)["tasks"]
    assert [(own["paired"]["difference"], own["paired"]["changed"]) for own in tasks.values()] == [(0.0, 0)] * 3


def test_other_questions_are_asked_when_a_file_changes(tmp_path):
    for name in ("sums.yaml", "sums.jsonl"):
        (tmp_path / name).write_bytes((TASKS / name).read_bytes())
    evaluate("nano", str(tmp_path / "sums.yaml"), tmp_path / "out", items=2)
    (tmp_path / "sums.jsonl").write_text((tmp_path / "sums.jsonl").read_text().replace("34 + 58", "35 + 58"))
    with refused("resume_differs", "task sums"):
        evaluate("nano", str(tmp_path / "sums.yaml"), tmp_path / "out", items=2)


# --- reasoning and settings -------------------------------------------------------------------------------------------


@pytest.fixture
def says(monkeypatch):
    """(text) -> from now on every model writes this, and its last token for ever."""

    def script(text: str) -> None:
        tokens = load("nano")[1].tokenizer.encode(text, add_special_tokens=False)
        asked = iter(tokens)

        def logits(model, hidden, adapters=None):
            made = mx.full((*hidden.shape[:-1], model.config.vocab_size), -90.0)
            made[..., next(asked, tokens[-1])] = 90.0
            return made

        monkeypatch.setattr(Model, "logits", logits)

    return script


THOUGHT = "Question: which? Perhaps the answer is (A)."


def of_letters(tmp_path: Path) -> str:
    (tmp_path / "letters.jsonl").write_text(json.dumps({"question": "A or B?", "answer": "B"}) + "\n")
    (tmp_path / "letters.yaml").write_text(
        f"include: {TASKS / 'sums.yaml'}\ntask: letters\ndataset_kwargs: {{data_files: {{test: letters.jsonl}}}}\n"
        "filter_list:\n- name: letter\n  filter:\n"
        "  - {function: regex, regex_pattern: 'answer is \\(?([A-J])\\)?'}\n  - {function: take_first}\n"
    )
    return str(tmp_path / "letters.yaml")


def test_the_answer_counts_and_not_what_was_thought(tmp_path, says):
    says(f"{THOUGHT}</think>\n\nthe answer is (B). Question: another one, whose answer is (C)<|im_end|>")
    own = evaluate("nano", of_letters(tmp_path), tmp_path / "out", preset="thinking", mtp="off")["tasks"]["letters"]
    (line,) = lines(tmp_path / "out", "letters")
    assert line["answer"].strip() == "the answer is (B)." and line["finish_reason"] == "stop"
    assert (own["score"], own["cut_at_limit"], own["metric"]) == (1.0, 0, "exact_match,letter")


def test_thinking_without_end_is_counted_as_cut(tmp_path, says):
    says(THOUGHT)
    own = evaluate("nano", of_letters(tmp_path), tmp_path / "out", max_tokens=60, preset="thinking", mtp="off")["tasks"]
    (line,) = lines(tmp_path / "out", "letters")
    assert (own["letters"]["score"], own["letters"]["cut_at_limit"]) == (0.0, 1)
    assert (line["answer"], line["finish_reason"], line["tokens"]) == ("", "length", 60)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reaches_the_sampler_and_the_report(name, tmp_path, monkeypatch):
    seen, begin = [], Sampler.__init__

    def spy(sampler, sampling, *given, **named):
        seen.append(sampling)
        begin(sampler, sampling, *given, **named)

    monkeypatch.setattr(Sampler, "__init__", spy)
    own = evaluate("nano", ALL[0], tmp_path / "out", preset=name, items=1)["tasks"]["sums"]
    preset, told = PRESETS[name], own["settings"]
    for field in ("temp", "top_k", "top_p", "presence_penalty"):
        assert {getattr(sampling, field) for sampling in seen} == {told[field]} == {getattr(preset.sampling, field)}
    assert told["enable_thinking"] == preset.thinking and told["preset"] == name
    assert told["max_tokens"] > 30_000  # not the 1 of the task; as far as nano's context goes


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch):
    """As with HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_without_network_the_message_says_where_data_come_from(no_hub):
    with refused("hub_failed", "gpqa_diamond", "not on this machine", "HF_HUB_OFFLINE"):
        find_task("gpqa_diamond")


def test_all_that_a_list_of_tasks_lacks_is_told_together(no_hub):
    with refused("hub_failed", "mmlu_pro", "mmmu_val"):
        find(["quick"], None)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("task: a\ndataset_path: json\ndataset_kwargs: {data_files: {test: no.jsonl}}\n", "no.jsonl"),
        ("task: a\noutput_type: [\n", "a.yaml"),
        ("task: a\ninclude: none.yaml\n", "none.yaml"),
        ("task: a\noutput_type: sing\ndataset_path: json\n", "sing"),
        ("group: a\ntask: [sums, {task: choices}]\n", "sums,choices"),
        (f"include: {TASKS / 'sums.yaml'}\ndoc_to_target: '{{{{zzz}}}}'\n", "'zzz' is undefined"),
        (f"include: {TASKS / 'sums.yaml'}\nmetric_list: [{{metric: exactmatch, aggregation: mean}}]\n", "exact_match"),
        (f"include: {TASKS / 'choices.yaml'}\nmetric_list: [{{metric: exact_matc, aggregation: mean}}]\n", "exact_m"),
        (f"include: {TASKS / 'choices.yaml'}\nmetric_list: [{{metric: bleu}}]\n", "bleu"),
        ("task: a\ndataset_path: json\ndataset_kwargs: {data_files: {test: torn.jsonl}}\n", "torn.jsonl"),
        ("task: a\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
         "output_type: generate_until\ndoc_to_text: '{{a}}'\ndoc_to_target: '{{1 // b}}'\n", "a.yaml, question 1"),
    ],
)
def test_a_file_that_lm_eval_cannot_use_is_refused(tmp_path, text, fact):
    for name, content in {"sums": (TASKS / "sums.jsonl").read_text(), "torn": '{"a": ', "rows": ROWS}.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    (tmp_path / "a.yaml").write_text(text)
    with refused("task_invalid", "a.yaml", fact):
        find_task(str(tmp_path / "a.yaml"))


def test_a_function_that_fails_on_an_answer_is_told_with_its_file_and_question(tmp_path):
    (tmp_path / "judge.py").write_text("def judge(doc, results):\n    return {'exact_match': 1 // (doc['b'] - 2)}\n")
    (tmp_path / "rows.jsonl").write_text(ROWS.replace("0", "2"))
    (tmp_path / "a.yaml").write_text(
        "task: a\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{a}}'\ndoc_to_target: '{{b}}'\n"
        "process_results: !function judge.judge\nmetric_list: [{metric: exact_match, aggregation: mean}]\n"
    )
    with refused("task_invalid", "a.yaml, question 1", "ZeroDivisionError"):
        evaluate("nano", str(tmp_path / "a.yaml"), tmp_path / "out", enable_thinking=False, max_tokens=4)


def test_what_the_models_own_code_raises_is_not_laid_at_the_task_s_door(tmp_path, monkeypatch):
    def fail(self, *given):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(Model, "logits", fail)
    with pytest.raises(ZeroDivisionError, match="ours"):
        evaluate("nano", ALL[1], tmp_path / "out", items=1)


def test_a_package_that_a_task_needs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with refused("package_missing", "ifeval", "langdetect", "pip install 'mlx-qwen35[eval]'"):
        find_task("ifeval")


def test_documents_longer_than_the_context_count_as_wrong_and_whole_texts_are_left_out(tmp_path):
    rows = [{"question": "What is 1 + 2?", "answer": "3"}, {"question": "1 + " * 200, "answer": "3"}]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": row["question"]}) + "\n" for row in rows))
    for name, score in {"sums": 0.5, "texts": None}.items():
        (tmp_path / f"{name}.yaml").write_text((TASKS / f"{name}.yaml").read_text())
        (out := tmp_path / name).mkdir()
        subject = Subject(LoadOptions("nano"), {"enable_thinking": False} if score else {}, 2, 0, out)
        config = subject.checkpoint.config
        text = replace(config.text, max_position_embeddings=100)
        subject.checkpoint = replace(subject.checkpoint, config=replace(config, text=text))
        _, found = find_task(str(tmp_path / f"{name}.yaml")).run(subject)
        alone = lines(out, name)[0]["score"]
        assert (found.n, found.too_long, found.score) == (2, 1, score or alone)


def test_two_models_differ_on_whole_texts_by_what_their_scores_do(tmp_path):
    told = evaluate("nano", ALL[2], tmp_path / "out", against="nano", dtype="float16")["tasks"]["texts"]
    assert told["paired"]["difference"] == pytest.approx(told["score"] - told["against"]["score"], abs=1e-12)
    assert told["standard_error"] > 0 and told["prompt_tokens"] > 10 and "lower is better" in (
        tmp_path / "out" / "report.md"
    ).read_text()


def test_a_task_that_nobody_has_is_refused_with_those_near_it():
    with refused("task_unknown", "mmlu_prp", "mmlu_pro"):
        find_task("mmlu_prp")
