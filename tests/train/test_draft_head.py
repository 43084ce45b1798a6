"""The draft head trained along: loss and gradients against the definition, finite differences, and how it drafts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from refusing import refused

from mlx_qwen35.backend import gradients
from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.prompt.positions import Placeholder, positions
from mlx_qwen35.prompt.prompt import Placed
from mlx_qwen35.train.draft_head import draft_gradients
from mlx_qwen35.train.gradients import active, batch_loss
from mlx_qwen35.train.options import TrainOptions
from mlx_qwen35.train.rows import Row
from mlx_qwen35.train.training import train

LAYER = "mtp.layers.0."
MAPS = ("mtp.fc", *(f"{LAYER}{name}" for name in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)))  # fmt: skip
TEXT = ("model.language_model.layers.1.mlp.up_proj", "model.language_model.embed_tokens")  # which is the LM head too
LENGTHS = (11, 7, 2)


@pytest.fixture(scope="module")
def tiny(text_model):
    return text_model()


def pairs(model, names, seed: int = 0, rank: int = 3) -> dict[str, Pair]:
    """Low-rank parts that are not zero, of the shapes of the maps."""
    rng, found = np.random.default_rng(seed), {}
    for name in names:
        out, width = shape(model, name)
        a, b = rng.normal(0, width**-0.5, (rank, width)), rng.normal(0, 0.3, (out, rank))
        found[f"{name}.weight"] = Pair(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)), 0.5)
    return found


def shape(model, name: str) -> tuple[int, int]:
    c = model.config
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    D, inner = c.hidden_size, c.intermediate_size
    return {
        "fc": (D, 2 * D), "q_proj": (2 * heads, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, heads),
        "gate_proj": (inner, D), "up_proj": (inner, D), "down_proj": (D, inner),
        "embed_tokens": (c.vocab_size, D),
    }[name.rpartition(".")[2]]  # fmt: skip


def drawn(model, lengths=LENGTHS, seed: int = 1) -> list[Row]:
    """Rows of random tokens, of which about half are targets, the second token of the first row among them."""
    rng, rows = np.random.default_rng(seed), []
    for length in lengths:
        targets = rng.random(length) < 0.5
        targets[:2] = (False, True)[:length]
        tokens = rng.integers(0, model.config.vocab_size, length)
        rows.append(Row(tuple(map(int, tokens)), tuple(map(bool, targets))))
    return rows


def plain(
    model, given: Mapping[str, Pair], rows: list[Row], hidden: mx.array, shown: mx.array | None = None
) -> mx.array:
    """The definition, row by row, without pieces: sum of -log p(token i + 2 | hidden i, embedding i + 1).

    shown: (n, D) embeddings of what the rows show, in the place of those of their placeholders.
    """
    adapters, total = active(given), mx.zeros(())
    for b, row in enumerate(rows):
        T = len(row.tokens)
        if T < 3:
            continue
        head, placeholders = DraftFollower(model, [0]).cache, [p for own in row.media for p in own.placeholders]
        x = model.embed(mx.array([row.tokens]), None, adapters)
        for place in placeholders:
            x[0, place.start : place.stop] = shown
        with head.forward(T - 1, None, positions(T, placeholders)[:, None, :-1], False, adapters) as context:
            table = model.rotary.table(context.positions)
            y = model.mtp.part(x[:, 1:], hidden[b : b + 1, : T - 1], table, context, head.layers)
        logits = model.logits(y[0, : T - 2], adapters).astype(mx.float32)
        wanted = mx.array(row.tokens[2:])
        losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        total = total + (losses * mx.array(row.targets[2:])).sum()
    return total


def relative(found: mx.array, expected: mx.array) -> float:
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


@pytest.mark.parametrize("pieces", [256, 3])
def test_gradients_are_those_of_the_definition(tiny, pieces):
    given, rows = pairs(tiny, [*MAPS, *TEXT]), drawn(tiny)
    text = {name: pair for name, pair in given.items() if not name.startswith("mtp.")}
    hidden = batch_loss(tiny, text, rows, backward=False).hidden
    found = draft_gradients(tiny, given, rows, hidden, pieces=pieces)
    names = [f"{name}.weight" for name in MAPS]

    def loss(*arrays: mx.array) -> mx.array:
        own = {n: Pair(a, b, 0.5) for n, a, b in zip(names, arrays[::2], arrays[1::2], strict=True)}
        return plain(tiny, given | own, rows, hidden)

    arrays = [array for name in names for array in given[name][:2]]
    with gradients():
        value, expected = mx.value_and_grad(loss, list(range(len(arrays))))(*arrays)
    assert found.targets == sum(sum(row.targets[2:]) for row in rows)
    assert found.loss == pytest.approx(value.item(), rel=1e-5) and set(found.gradients) == set(names)
    for name, a, b in zip(names, expected[::2], expected[1::2], strict=True):
        assert relative(found.gradients[name][0], a) < 2e-5 and relative(found.gradients[name][1], b) < 2e-5


def test_gradients_are_finite_differences(tiny):
    given, rows = pairs(tiny, MAPS), drawn(tiny)
    hidden = batch_loss(tiny, {}, rows, backward=False).hidden
    found = draft_gradients(tiny, given, rows, hidden)
    rng, eps = np.random.default_rng(5), 1e-2
    way = {
        name: [mx.array(rng.normal(0, 0.1, array.shape).astype(np.float32)) for array in pair[:2]]
        for name, pair in given.items()
    }

    def loss(step: float) -> float:
        moved = {n: Pair(p.a + step * way[n][0], p.b + step * way[n][1], p.scale) for n, p in given.items()}
        return draft_gradients(tiny, moved, rows, hidden, backward=False).loss

    expected = (loss(eps) - loss(-eps)) / (2 * eps)
    slope = sum(float((g * d).sum()) for n in given for g, d in zip(found.gradients[n], way[n], strict=True))
    assert slope == pytest.approx(expected, rel=2e-3)


def test_the_loss_is_that_of_the_head_while_it_drafts(tiny):
    """The log-probabilities of the drafts that a follower proposes, token by token."""
    (row,) = drawn(tiny, (9,))
    given = pairs(tiny, MAPS)
    hidden = batch_loss(tiny, {}, [row], backward=False).hidden
    adapters = active(given)
    total = 0.0
    for t in range(2, len(row.tokens)):
        follower = DraftFollower(tiny, [0])
        y = None
        for i in range(t - 1):  # one pair after the other, as while decoding
            with follower.cache.forward(1, None, None, False, adapters) as context:
                y = tiny.mtp.part(
                    tiny.embed(mx.array([[row.tokens[i + 1]]])), hidden[:, i : i + 1],
                    tiny.rotary.table(context.positions), context, follower.cache.layers,
                )  # fmt: skip
        if row.targets[t]:
            logits = tiny.logits(y)[0, 0]
            total += float(mx.logsumexp(logits) - logits[row.tokens[t]])
    assert draft_gradients(tiny, given, [row], hidden, backward=False).loss == pytest.approx(total, rel=1e-5)


def test_images_have_their_embeddings_and_positions(tiny):
    (row,), given, shown = drawn(tiny, (16,)), pairs(tiny, MAPS), Placeholder(2, 2, 3)
    row = replace(row, media=(Placed(None, (shown,)),))  # nobody asks for its pixels
    embeddings = mx.array(np.random.default_rng(8).normal(0, 1, (6, tiny.config.hidden_size)).astype(np.float32))
    hidden = batch_loss(tiny, {}, [row], embeddings=[embeddings], backward=False).hidden
    found = draft_gradients(tiny, given, [row], hidden, embeddings=[embeddings], backward=False)
    assert found.loss == pytest.approx(plain(tiny, given, [row], hidden, embeddings).item(), rel=1e-5)


def test_a_batch_is_the_sum_of_its_rows(tiny):
    given, rows = pairs(tiny, MAPS), drawn(tiny, (12, 5, 1))
    hidden = batch_loss(tiny, {}, rows, backward=False).hidden
    together = draft_gradients(tiny, given, rows, hidden)
    alone = [draft_gradients(tiny, given, [row], hidden[b : b + 1, : len(row.tokens)]) for b, row in enumerate(rows)]
    assert together.loss == pytest.approx(sum(own.loss for own in alone), rel=1e-5)
    assert together.targets == sum(own.targets for own in alone)
    for name, found in together.gradients.items():
        for n in (0, 1):
            assert relative(found[n], sum(own.gradients[name][n] for own in alone)) < 1e-5


def test_the_text_adapter_gets_no_gradient_from_the_head(tiny):
    given, rows = pairs(tiny, [*MAPS[:1], *TEXT]), drawn(tiny)
    hidden = batch_loss(tiny, {}, rows, backward=False).hidden
    assert set(draft_gradients(tiny, given, rows, hidden).gradients) == {f"{MAPS[0]}.weight"}


def test_rows_without_a_target_give_zeros(tiny):
    given = pairs(tiny, MAPS[:1])
    rows = [Row((1, 2, 3), (False, True, False))]  # the second token is none of the head's
    found = draft_gradients(tiny, given, rows, batch_loss(tiny, {}, rows, backward=False).hidden)
    assert found.loss == 0 and found.targets == 0
    assert all(not array.any().item() for array in found.gradients["mtp.fc.weight"])


def test_a_model_without_a_head_is_refused(text_model):
    from geometries import changed

    from mlx_qwen35.checkpoint.random import geometry

    headless = text_model(changed(geometry("tiny"), mtp_num_hidden_layers=0))
    row = drawn(headless, (4,))
    with refused("draft_head_missing"):
        draft_gradients(headless, {}, row, mx.zeros((1, 4, headless.config.hidden_size)))


@pytest.mark.full
def test_a_run_gives_the_same_text_adapter_with_the_head_and_without(tmp_path):
    data = Path(__file__).parents[2] / "examples/finetune/rows"
    for name, draft_head in (("with", True), ("without", False)):
        train("nano", data, tmp_path / name, TrainOptions(steps=2, draft_head=draft_head), report=False)
    file = "adapter_model.safetensors"
    assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    trained = mx.load(str(tmp_path / "with/mtp_adapter.safetensors"))
    assert trained and all(array.any().item() for array in trained.values())
