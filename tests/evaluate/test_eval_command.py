"""The command mlx_qwen35.eval: what it prints, writes and refuses; nano's known figures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image
from refusing import refused

from mlx_qwen35.convert import convert
from mlx_qwen35.evaluate import evaluate, kl
from mlx_qwen35.evaluate.command import main
from mlx_qwen35.evaluate.kl import sequences
from mlx_qwen35.measure.layerwise import Layerwise

NANO = json.loads((Path(__file__).parents[2] / "mlx_qwen35/nano/evaluation.json").read_text())["scores"]
KL, ERROR, TOP1 = 4.73e-3, 0.44e-3, 0.9896  # docs/convert.md, of nano's recipe 4bit on all bundled items


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return convert("nano", tmp_path_factory.mktemp("packed") / "nano-4bit", recipe="4bit", verify=False)


def told_by(capsys, *arguments: object) -> dict:
    main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


# --- kl ---------------------------------------------------------------------------------------------------------------


def test_a_model_differs_from_itself_by_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model", "nano", "--against", "nano", "--tasks", "kl", "--items", "1", "--out", str(out)]
    main(arguments)
    assert "0.00000 nats, same most likely token 100.00 %" in capsys.readouterr().out
    found = json.loads((out / "summary.json").read_text())["tasks"]["kl"]
    assert (found["kl"], found["top1"], found["n"]) == (0.0, 1.0, 1)
    assert found["versions"]["task"].startswith("nano's bundled items")
    assert told_by(capsys, *arguments)["tasks"]["kl"] == found  # measured once


@pytest.mark.full
def test_the_4bit_pack_is_as_far_from_its_source_as_the_documents_say(packed, tmp_path):
    found = evaluate(packed, "kl", tmp_path / "out", against="nano")["tasks"]["kl"]
    assert abs(found["kl"] - KL) < ERROR and abs(found["top1"] - TOP1) < 0.002
    assert found["kl_error"] == pytest.approx(ERROR, rel=0.05) and found["positions"] == 4215


def test_a_pack_on_a_text_is_further_away_than_its_source(packed, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("What is 34 + 58? What is 7 + 5? " * 2)
    given = {"against": "nano", "text": text, "items": 1}
    found = evaluate(packed, ["kl"], tmp_path / "out", **given)["tasks"]["kl"]
    assert 1e-4 < found["kl"] < 1 and found["top1"] < 1 and (found["sequences"], found["text"]) == (1, "text.txt")
    (tmp_path / "text.txt").write_text("Another text, of the same name. " * 20)
    with refused("resume_differs", "task kl", "text.txt"):
        evaluate(packed, ["kl"], tmp_path / "out", **given)


@pytest.mark.full
def test_a_measurement_that_was_ended_goes_on_behind_its_last_piece(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(kl, "PIECE", 60)
    given = {"against": "nano", "items": 3}
    whole = evaluate(packed, "kl", tmp_path / "whole", **given)["tasks"]["kl"]
    file, out = tmp_path / "whole" / "kl.jsonl", tmp_path / "out"
    lines = file.read_bytes().splitlines(keepends=True)
    measured, embed = [], Layerwise.embed

    def end(what, done, total, unit):
        if (out / "kl.jsonl").is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(packed, "kl", out, watch=end, **given)
    kept = (out / "kl.jsonl").read_bytes()
    assert 0 < len(kept.splitlines()) < 3 and b"".join(lines).startswith(kept)

    def embedding(self, batches):
        measured.extend(row for batch in batches for row in batch.rows)
        return embed(self, batches)

    monkeypatch.setattr(Layerwise, "embed", embedding)
    again = evaluate(packed, "kl", out, **given)["tasks"]["kl"]
    assert len(measured) == 2 * (3 - len(kept.splitlines()))  # by both models
    assert (out / "kl.jsonl").read_bytes() == file.read_bytes()
    assert again | {"seconds": 0} == whole | {"seconds": 0} and whole["kl"] > 0
    more = evaluate(packed, "kl", out, **given | {"items": 4})["tasks"]["kl"]
    assert more["n"] == 4


@pytest.mark.full
def test_keys_and_values_in_fewer_bits_are_of_the_model_alone(tmp_path):
    found = evaluate("nano", "kl", tmp_path / "out", against="nano", items=4, kv_bits="4")["tasks"]["kl"]
    assert found["kl"] > 0 and found["settings"]["kv_bits"] == "4"


def test_kl_of_another_model_needs_a_text(checkpoint_folder):
    from mlx_qwen35.checkpoint.checkpoint import open_checkpoint

    with refused("option_missing", "text"):
        sequences(open_checkpoint(checkpoint_folder()), None, None)


# --- nano's questions -------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_nano_answers_its_own_questions_as_it_is_known_to(tmp_path):
    found = evaluate("nano", "nano", tmp_path)["tasks"]["nano"]
    assert (found["n"], found["score"], found["cut_at_limit"]) == (200, 0.97, 0)
    lines = {line["key"]: line for line in map(json.loads, (tmp_path / "nano.jsonl").read_text().splitlines())}
    whole = [
        f"{own['task']}.{'thinking' if own['thinking'] else 'direct'}.{number}"
        for own in NANO
        for number, right in enumerate(own["ours"][:10])
        if right == "1"
    ]
    assert len(whole) > 300 and all(lines[key]["score"] for key in whole if key in lines)


def test_two_packs_are_compared_on_the_same_questions(packed, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", str(packed), "--against", "nano", "--tasks", "nano", "--items", "2", "--quiet"]
    main([*words, "--out", str(out)])
    assert "points against nano" in capsys.readouterr().out
    looked = told_by(capsys, *words, "--dry-run")["tasks"]
    found = json.loads((out / "summary.json").read_text())["tasks"]["nano"]
    assert [own["prompt_tokens"] for own in looked] == [found["prompt_tokens"], found["against"]["prompt_tokens"]]
    assert found["paired"]["n"] == 2 and found["paired"]["difference"] == found["score"] - found["against"]["score"]
    assert {".seconds.jsonl", "against", "nano.jsonl", "report.md", "run.json", "summary.json"} <= {*os.listdir(out)}
    assert (found["settings"]["max_tokens"], found["settings"]["temp"], found["settings"]["seed"]) == (160, 0.0, 0)


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_and_started_again_ends_with_the_same_file(number, tmp_path):
    def command(out: str, rows: int) -> list[str]:
        words = ["--model", "nano", "--tasks", "nano", "--items", "16", "--out", str(tmp_path / out), "--quiet"]
        return [sys.executable, "-m", "mlx_qwen35.eval", *words, "--batch-size", str(rows)]

    run = subprocess.Popen(command("ended", 3))
    file = tmp_path / "ended" / "nano.jsonl"
    while not (file.is_file() and file.read_bytes().count(b"\n") >= 7):
        time.sleep(0.01)
    run.send_signal(number)
    assert run.wait() == (-number if number == signal.SIGKILL else 128 + number)
    assert not (file.parent / "summary.json").exists()
    for out, rows in (("ended", 1), ("whole", 8)):
        subprocess.run(command(out, rows), check=True)
    assert file.read_bytes() == (tmp_path / "whole" / "nano.jsonl").read_bytes()


# --- the dry run, refusals --------------------------------------------------------------------------------------------


def test_a_dry_run_tells_questions_tokens_hours_and_memory_and_reads_no_weights(tmp_path, capsys):
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    words = "--model nano --tasks nano,kl --against nano --max-tokens 100 --items 20 --dry-run".split()
    main(words)
    told = capsys.readouterr().out
    assert mx.get_peak_memory() - before < 1e5
    found = told_by(capsys, *words)["tasks"]
    assert [(own["task"], own["questions"]) for own in found] == [("nano", 20), ("kl", 20), ("nano", 20)]
    assert found[0]["tokens"] == 2_000 and found[0]["at_once"] == 8 and found[0]["seconds"] > 0
    assert 5e6 < found[0]["memory"] < 1e8 and 1000 < found[1]["prompt_tokens"] < 2000
    read, memory = f"{found[1]['prompt_tokens']:,}", f"{found[0]['memory'] / 1e6:.1f} MB"
    for fact in ("at most 2,000", read, memory, "computed", "nothing was measured"):
        assert fact in told
    assert os.listdir(tmp_path) == []


def test_a_dry_run_in_a_folder_with_answers_counts_what_is_left(tmp_path, capsys):
    rows = [{"question": f"What is {number} + 5?", "answer": "12"} for number in (7, 8, 9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.yaml").write_text("questions: a.jsonl\noptions: {max_tokens: 20}")
    words = ["--model", "nano", "--tasks", tmp_path / "a.yaml", "--out", tmp_path / "out", "--no-enable-thinking"]
    evaluate("nano", str(tmp_path / "a.yaml"), tmp_path / "out", items=2, enable_thinking=False)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    (found,) = told_by(capsys, *words, "--dry-run")["tasks"]
    assert (found["questions"], found["answered"], found["guessed"], found["tokens"]) == (1, 2, True, 3)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    with pytest.raises(SystemExit):
        main([*map(str, words), "--dry-run", "--seed", "3"])
    assert "[resume_differs]" in capsys.readouterr().err


def test_kl_over_several_machines_is_refused_with_its_reason(tmp_path, capsys):
    words = f"--model nano --against nano --tasks kl,nano --with 10.0.0.2 --out {tmp_path / 'out'}"
    with pytest.raises(SystemExit):
        main(words.split())
    told = capsys.readouterr().err
    assert "kl must run on one machine" in told and "without --with" in told and told.endswith("[ranks_unsupported]\n")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("option_missing", "--tasks nano --out OUT"), ("option_missing", "--model nano --out OUT"),
        ("option_missing", "--model nano --tasks nano"), ("option_missing", "--model nano --tasks kl --out OUT"),
        ("option_no_effect", "--model nano --tasks nano --text FILE --out OUT"),
        ("option_no_effect", "--model nano --tasks kl --against nano --temp 1 --out OUT"),
        ("option_no_effect", "--model nano --tasks CHOICES --preset thinking --out OUT"),
        ("option_no_effect", "--model nano --tasks nano --max-pixels 9999 --out OUT"),
        ("task_invalid", "--model nano --tasks SHOWN --out OUT"),
        ("prompt_empty", "--model nano --tasks EMPTY --out OUT"),
        ("option_conflict", "--model nano --tasks nano --preset coding --no-enable-thinking --out OUT"),
        ("option_conflict", "--model nano --tasks nano --adapter a --adapter b --out OUT"),
        ("option_invalid", "--model nano --tasks nano --items 0 --out OUT"),
        ("option_unknown", "--model nano --tasks nano --limit 3 --out OUT"),
        ("task_invalid", "--model nano --tasks FILE,FILE2 --out OUT"),
        ("model_not_found", "--model nano --tasks kl --against none/ --out OUT"),
        ("target_refused", "--model nano --tasks nano --out FOLDER"),
        ("package_missing", "--model nano --tasks mmlu_pro --out OUT"),
        ("package_missing", "--model nano --tasks quick --out OUT"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_written(tmp_path, capsys, monkeypatch, code, words):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    files = [tmp_path / "in" / name for name in ("house.yaml", "house.yml")]
    files[0].parent.mkdir()
    for file in files:
        file.write_text("questions: house.jsonl")
    (tmp_path / "in" / "house.jsonl").write_text('{"question": "Who?", "answer": "nano"}\n')
    choices = {"question": "Who?", "choices": ["a", "b"], "answer": "a"}
    given = {"choices": [choices, choices], "shown": [choices | {"images": ["a.png"]}],
             "empty": [{"question": "", "answer": "a"}]}  # fmt: skip
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in" / "a.png")
    for name, rows in given.items():
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "in" / f"{name}.yaml").write_text(f"questions: {name}.jsonl")
    twice = ",".join(map(str, files))
    places = {"OUT": tmp_path / "out", "FILE": files[0], "FILE,FILE2": twice, "FOLDER": tmp_path / "in"}
    places |= {name.upper(): tmp_path / "in" / f"{name}.yaml" for name in given}
    with pytest.raises(SystemExit) as ended:
        main([str(places.get(word, word)) for word in words.split()])
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.err.endswith(f"[{code}]\n") and told.err.count("\n") == 1 and told.out == ""
    assert os.listdir(tmp_path) == ["in"]


def test_without_the_extra_one_sentence_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with refused("package_missing", "pip install 'mlx-qwen35[eval]'", "mmlu_pro", "kl"):
        evaluate("nano", "mmlu_pro", tmp_path / "out")


def test_an_unknown_option_of_the_python_function_is_refused(tmp_path):
    with refused("option_unknown", "limit"):
        evaluate("nano", "nano", tmp_path / "out", limit=3)
    with refused("option_unknown", "regex"):
        evaluate("nano", "nano", tmp_path / "out", regex="a")
