"""What measures drafts: acceptance over texts, rows and rounds of an answer, expected gains, mlx_qwen35.bench --mtp."""

import json
from pathlib import Path

import acceptance as nano_acceptance  # of examples/nano
import mlx.core as mx
import numpy as np
import pytest
from refusing import refused
from tasks import items_of

import mlx_qwen35
from mlx_qwen35.bench import expected, main, mtp
from mlx_qwen35.bench.acceptance import Acceptance, Text, _coupled, acceptance, guesses
from mlx_qwen35.bench.mtp_program import MtpProgram, answer, shares
from mlx_qwen35.checkpoint.checkpoint import mtp_shapes, text_shapes
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.drafts.speculate import Choice
from mlx_qwen35.engine.prefill import PromptRow
from mlx_qwen35.engine.sampling import Sampling

TOKENS = tuple((7 * i + i * i) % 900 for i in range(14))
FOUR = parse_config(geometry("4b")).text


@pytest.fixture(scope="module")
def nano():
    return mlx_qwen35.load("nano")


# --- acceptance over texts -------------------------------------------------------------------------------------------


def test_the_model_s_guesses_are_its_own(text_model):
    model = text_model()
    hidden, drafted = guesses(model, Text(TOKENS, 5))
    whole = model.hidden(mx.array([TOKENS]))[0]
    assert hidden.shape == drafted.shape == (9, 256)
    assert mx.abs(hidden - whole[4:13]).max().item() < 1e-4


def test_the_head_s_guesses_are_the_drafts_of_decoding(text_model):
    model = text_model()
    _, drafted = guesses(model, Text(TOKENS))
    said = mx.argmax(model.logits(drafted), axis=-1).tolist()
    for j in (2, 3, 9):  # the token that is guessed: the model is about to read the one before it
        cache = model.make_cache()
        drafts = DraftFollower(model, [0])
        tokens = mx.array([TOKENS[: j - 1]])
        drafts.read(model, tokens, model.hidden(tokens, cache), [j - 1], [0])
        last = mx.array([[TOKENS[j - 1]]])
        token = drafts.propose(model, last, [1], 1, lambda logits, drafted: mx.argmax(logits, axis=-1))
        assert token.item() == said[j - 2]


def test_before_the_norm_the_head_is_given_what_the_norm_is_of(text_model, monkeypatch):
    model, given = text_model(), []
    head = model.mtp.weights
    monkeypatch.setattr(model.mtp, "_weights", lambda e, hidden, *rest: given.append(hidden) or head(e, hidden, *rest))
    after, before = (guesses(model, Text(TOKENS), before_norm)[1] for before_norm in (False, True))
    assert mx.abs(model.norm(given[1]) - given[0]).max().item() < 1e-4
    assert mx.abs(after - before).max().item() > 1e-3


def test_shares_are_of_the_tokens_that_count(text_model):
    model = text_model()
    found = acceptance(model, [Text(TOKENS, 5), Text(TOKENS)], 1.0, range(2), 900)
    assert found.tokens == 9 + 12
    expected = []
    for first in (5, 2):
        p, q = (np.array(model.logits(x).astype(mx.float32))[:, :900] for x in guesses(model, Text(TOKENS, first)))
        p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (p, q))
        expected += list(np.minimum(p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)).sum(-1))
    assert found.classical == pytest.approx(np.mean(expected), abs=1e-4)


def test_coupled_acceptance_is_that_of_two_draws_with_the_same_noise():
    """Its expectation is known: the sum over tokens x of 1 / sum over y of max(p_y / p_x, q_y / q_x)."""
    p, q = np.array([0.5, 0.2, 0.2, 0.1]), np.array([0.1, 0.4, 0.2, 0.3])
    exact = sum(1 / np.maximum(p / p[x], q / q[x]).sum() for x in range(4))
    counted = _coupled(mx.log(mx.array(p[None])), mx.log(mx.array(q[None])), range(3000), 5)
    assert counted == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 3000) ** 0.5)
    assert exact < np.minimum(p, q).sum()  # never above rejection sampling


def test_a_head_that_is_the_model_s_equal_is_always_accepted(text_model, monkeypatch):
    model = text_model()
    monkeypatch.setattr("mlx_qwen35.bench.acceptance.guesses", lambda *_: (mx.ones((3, 256)),) * 2)
    assert acceptance(model, [Text(TOKENS)], 1.0, range(2)) == Acceptance(3, 1.0, 1.0, pytest.approx(1.0, abs=1e-5))


# --- answers ---------------------------------------------------------------------------------------------------------


def test_rows_and_rounds_of_an_answer(text_model):
    model = text_model()
    plain = answer(model, PromptRow(TOKENS), Choice(0), 12)
    assert (plain.rows, len(plain.rounds), len(plain.tokens)) == (11, 11, 12)
    drafted = answer(model, PromptRow(TOKENS), Choice(2, fixed=True), 12)
    assert drafted.tokens == plain.tokens
    assert drafted.rows == sum(1 + made for made, _ in drafted.rounds)
    assert sum(1 + right for _, right in drafted.rounds) == 11 and drafted.drafting.steps == len(drafted.rounds)
    assert "hidden" not in vars(model)  # nothing counts any more


def test_an_answer_is_what_generate_gives(nano):
    model, processor = nano
    prompt = processor.encode_messages([{"role": "user", "content": "What is 34 + 58?"}]).tokens
    result = mlx_qwen35.generate(model, processor, list(prompt), temp=0.8, seed=3, mtp="off", preset="coding")
    ids = (processor.stop_ids, processor.vocabulary)
    found = answer(model, PromptRow(prompt), Choice(2, fixed=True), 160, Sampling(0.8, 20, 0.95), 3, *ids)
    assert found.tokens == result.tokens and found.rows < 3 * len(result.tokens)


def test_a_share_is_of_the_drafts_whose_predecessors_were_accepted():
    assert shares([(3, 3), (3, 1), (2, 0), (1, 1), (0, 0)], 3) == [3 / 4, 1 / 2, 1.0]
    assert shares([(1, 0)], 2) == [0.0, None]


def test_random_weights_are_measured_without_a_tokenizer(checkpoint_folder):
    program = MtpProgram(checkpoint_folder(), "float32")
    found = program.answer({"acceptance": 1, "limit": 4})
    assert found["after_norm"]["tokens"] == found["before_norm"]["tokens"] == 4 and len(found["shares"]) == 3
    off, on = (program.answer({"mode": m, "depth": d, "tokens": 5}) for m, d in (("off", None), ("on", 1)))
    assert off["tokens"] == on["tokens"] and (off["rows"], off["steps"]) == (4, 4) and on["rows"] > 4


def test_a_checkpoint_without_a_head_is_refused_by_the_worker(checkpoint_folder):
    with refused("draft_head_missing"):
        MtpProgram(checkpoint_folder(mtp=False), "float32")


# --- nano ------------------------------------------------------------------------------------------------------------


def test_nano_s_answers_with_drafts_are_those_without():
    greedy, warm = nano_acceptance.measure("add_2", "nano", 2)
    assert (greedy.temp, warm.temp) == (0, 1) and greedy.same == greedy.answers == warm.same == 2 * 3
    assert greedy.shares[0] == 1.0 and 1.5 < greedy.a_step[0] <= 2 < greedy.a_step[2]
    assert 0.9 < warm.coupled <= 1 and 0.9 < warm.classical <= 1 and warm.guesses == round(2 * greedy.tokens)
    lines = nano_acceptance.table([warm], rules=True).splitlines()
    assert lines[0].endswith("| coupled | classical |") and lines[2].startswith("| add_2 | ")
    assert lines[3].split(" | ")[1:4] == lines[2].split(" | ")[1:4]  # the mean of one


def test_the_transcript_of_a_picture_is_read_as_it_was_answered(nano):
    model, processor = nano
    row = nano_acceptance.prompt(model, processor, items_of("colour", False, 1, 0)[0])
    found = answer(model, row, Choice(0), 160, stop_ids=processor.stop_ids, vocabulary=processor.vocabulary)
    text = nano_acceptance.transcript(row, found.tokens)
    hidden, _ = guesses(model, text)
    assert row.runs and mx.argmax(model.logits(hidden), axis=-1).tolist() == list(found.tokens)


# --- expected gains --------------------------------------------------------------------------------------------------


def test_rows_that_cost_nothing_give_as_many_times_as_tokens():
    for depth in (1, 2, 3):
        assert expected.gain((1.0, 1.0, 1.0), depth, 1.0, 0.0) == depth + 1
    assert expected.tokens_a_round([0.5, 0.5, 0.2]) == pytest.approx(1 + 0.5 + 0.25 + 0.05)


def test_two_and_three_rows_are_on_the_line_from_one_to_four():
    assert [expected.cost_of_rows(n, 3.2) for n in (1, 2, 3, 4)] == pytest.approx([1, 1 + 2.2 / 3, 1 + 4.4 / 3, 3.2])
    assert expected.gain([0.8, 0.5], 2, 3.2, 0.1) == pytest.approx(2.2 / (1 + 4.4 / 3 + 0.2))


def test_the_implied_cost_gives_the_published_gain():
    found = expected.expect("some", [0.9, 0.85, 0.8], 0.1)
    assert found.on_max[2] == pytest.approx(227.8 / 133.6)
    assert found.implied == pytest.approx((1 + 0.9 + 0.9 * 0.85 + 0.9 * 0.85 * 0.8) * 133.6 / 227.8 - 0.3)


def test_an_acceptance_with_which_the_published_gain_cannot_be_implies_nothing():
    found = expected.expect("low", [0.35, 0.3, 0.3], 0.1)
    assert found.implied < 1 and found.on_max is None and found.on_ultra[0] < 1


def test_a_draft_costs_the_bytes_of_head_and_output_matrix():
    head = 2560 * 5120 * 4.5 / 8 + 3 * 2560 * 9216 * 4.5 / 8  # fc, MLP
    head += 2560 * (8192 + 1024 + 1024) * 4.5 / 8 + 2560 * 4096 * 8.5 / 8  # q, k, v; o
    assert expected.packed_bytes(mtp_shapes(FOUR)) == head
    assert expected.packed_bytes(text_shapes(FOUR)) == 2_538_618_880  # as counted in the graph, test_counted_programs
    assert expected.draft_cost(FOUR) == pytest.approx((head + 2560 * 248320 * 4.5 / 8) / 2_538_618_880)


def test_an_embedding_that_is_not_the_output_matrix_is_not_read():
    nine = parse_config(geometry("9b")).text
    table = 4096 * 248320 * 4.5 / 8
    read = expected.packed_bytes(text_shapes(nine)) - table
    assert expected.draft_cost(nine) == pytest.approx((expected.packed_bytes(mtp_shapes(nine)) + table) / read)


def test_reading_with_drafts_adds_the_last_mlp_and_what_makes_the_head_s_keys_and_values():
    layers = sum(np.prod(shape) for name, shape in text_shapes(FOUR).items() if ".layers." in name and len(shape) == 2)
    mlp, fc, keys = 3 * 2560 * 9216, 2560 * 5120, 2 * 1024 * 2560
    assert expected.reading_cost(FOUR) == pytest.approx((mlp + fc + keys) / (layers - mlp))
    assert expected.reading_cost(FOUR, joined=True) == pytest.approx((mlp + fc + keys + 8192 * 2560) / (layers - mlp))


# --- the command -----------------------------------------------------------------------------------------------------


class FakeWorker:
    """Answers like a worker; auto takes half of off's seconds, and as many rows more as its calls."""

    def __init__(self):
        self.asked, self.calls = [], 0

    def ask(self, **request):
        self.asked.append(request)
        if "reading" in request:
            return {"seconds": 3.0 if request["drafts"] else 2.0}
        auto = request["mode"] == "auto"
        self.calls += auto
        return {
            "seconds": 1.0 if auto else 2.0, "rows": 10 + (self.calls if auto else 0), "steps": 10, "drafted": 2,
            "accepted": 1, "tokens": [1] * 11, "verdict": f"verdict {self.calls}", "depths": [[0, 0]],
        }  # fmt: skip


def test_modes_run_in_turn_and_are_compared_in_pairs():
    worker = FakeWorker()
    off, auto = mtp.measure_modes(worker, ["off", "auto"], 11, 3, lambda line: None)
    assert [request["mode"] for request in worker.asked] == ["off", "auto", "auto", "off", "off", "auto"]
    assert (auto.ratio, auto.rows, auto.most_rows, auto.verdict) == (0.5, 12, 13, "verdict 3")
    assert (off.ratio, off.tokens_a_step) == (1.0, 1.0) and auto.same


def test_a_text_that_differs_is_said(capsys):
    worker = FakeWorker()
    ask = worker.ask
    worker.ask = lambda **request: ask(**request) | ({"tokens": [2] * 11} if request["mode"] == "auto" else {})
    rows = mtp.measure_modes(worker, ["off", "auto"], 11, 1, lambda line: None)
    assert not rows[1].same and mtp._table(rows)[2][-1] == "DIFFERS"


def test_reading_is_compared_in_pairs():
    found = mtp.measure_reading(FakeWorker(), 64, 2, lambda line: None)
    assert (found.without, found.with_drafts, found.ratio) == (2.0, 3.0, 1.5)


def test_random_weights_are_measured_by_the_command(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(mtp, "READING", 8)
    monkeypatch.setattr(mtp, "LIMIT", 4)
    file = tmp_path / "all.json"
    main(["--geometry", "tiny", "--mtp", "--decode-tokens", "6", "--repeats", "1", "--json", str(file)])
    written, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert [row["mode"] for row in written["rows"]] == list(mtp.MODES) and all(row["same"] for row in written["rows"])
    assert written["rows"][0]["rows"] == 5 < written["rows"][3]["rows"] and written["vain"] == written["expected"] == []
    assert "geometry tiny" in printed and "mlx 0." in printed and "ratio" in printed and "M1 Ultra" not in printed


def test_of_a_model_it_says_what_auto_wastes_and_what_is_expected(monkeypatch, capsys):
    rows = mtp.measure_modes(FakeWorker(), list(mtp.MODES), 11, 1, lambda line: None)
    own = {"tokens": 5, "greedy": 0.5, "coupled": 0.4, "classical": 0.6}
    found = mtp.Measured({"chip": "abacus"}, rows, mtp.Reading(64, 2.0, 3.0, 1.5),
                         {"shares": [0.9, 0.8, None], "after_norm": own, "before_norm": own}, rows[:2])  # fmt: skip
    monkeypatch.setattr(mtp, "measure_mtp", lambda folder, settings, in_vain, progress: found)
    main(["--mtp"])
    printed = capsys.readouterr().out
    for part in ("abacus", "nano, float32", "random weights", "nano, measured here", "35 %, Rapid-MLX", "ratio 1.500"):
        assert part in printed
    assert "90.0%, 80.0%, -" in printed and "1.100x" in printed


def test_auto_on_random_weights(monkeypatch):
    monkeypatch.setattr(mtp, "VAIN", "tiny")
    monkeypatch.setattr(mtp, "VAIN_TOKENS", (4,))
    rows = mtp.measure_vain("float32", lambda line: None)
    assert [(row.mode, row.tokens, row.same) for row in rows] == [("off", 4, True), ("auto", 4, True)]


@pytest.mark.parametrize(
    "given",
    [
        ["--vision"], ["--compare", "mlx-lm"], ["--prompt-lengths", "5"], ["--plot", "x.png"],
        ["--image-megapixels", "1"], ["--prefill-step-size", "4"], ["--recipe", "mixed"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_of_other_modes_are_refused(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--mtp", *given])
    assert "[option_conflict]" in (err := capsys.readouterr().err) and given[0] in err


def test_a_checkpoint_without_a_head_is_refused(checkpoint_folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--mtp", "--model", str(checkpoint_folder(mtp=False))])
    assert "[draft_head_missing]" in capsys.readouterr().err
