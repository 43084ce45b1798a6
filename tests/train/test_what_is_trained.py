"""What is trained, and how a step changes it: options, maps, first values, schedules, optimizers, sums over batches."""

import math

import mlx.core as mx
import numpy as np
import pytest
from refusing import refused

from mlx_qwen35.checkpoint.adapter import Adapter, Pair
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.train.loop import Sums
from mlx_qwen35.train.optimizer import learning_rate, norm, updated
from mlx_qwen35.train.options import OPTIMIZERS, TrainOptions
from mlx_qwen35.train.parameters import first_values, trained_parts

CONFIG = parse_config(geometry("tiny")).text
TEXT = "model.language_model."


def names(**options) -> list[str]:
    return list(trained_parts(CONFIG, TrainOptions(**options), None))


def pair(out: int = 6, width: int = 4, rank: int = 2, scale: float = 2.0, seed: int = 0) -> Pair:
    rng = np.random.default_rng(seed)
    return Pair(*(mx.array(rng.normal(size=shape).astype(np.float32)) for shape in ((rank, width), (out, rank))), scale)


def adapter(**fields) -> Adapter:
    given = {"pairs": {f"{TEXT}layers.1.mlp.up_proj.weight": pair(448, 256, 5, 0.25)}}
    return Adapter("an-adapter", "peft", **given | fields)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("option_conflict", {"steps": 3, "epochs": 1}),
        ("option_conflict", {"from_adapter": "a", "rank": 8}),
        ("option_conflict", {"from_adapter": "a", "targets": "q_proj"}),
        ("option_no_effect", {"weight_decay": 0.1, "optimizer": "adam"}),
        ("option_invalid", {"targets": []}),
        ("option_invalid", {"targets": ["q_proj", 3]}),
        ("option_invalid", {"learning_rate": 0}),
        ("option_invalid", {"schedule": "step"}),
        ("option_invalid", {"from_adapter": ""}),
    ],
)
def test_options_that_contradict_each_other_or_are_none_are_refused(code, options):
    with refused(code, next(iter(options))):
        TrainOptions(**options)


def test_targets_are_one_text_or_a_list():
    assert TrainOptions(targets="q_proj, v_proj").targets == TrainOptions(targets=["q_proj", "v_proj"]).targets


# --- which maps ------------------------------------------------------------------------------------------------------


def test_all_maps_of_all_layers_are_trained_and_nothing_else():
    found = names()
    assert len(found) == 3 * 8 + 7 and all(name.startswith(f"{TEXT}layers.") for name in found)
    assert not any("conv1d" in name or "norm" in name for name in found)


def test_a_target_is_the_end_of_a_maps_name():
    assert names(targets=["q_proj"]) == [f"{TEXT}layers.3.self_attn.q_proj.weight"]
    assert names(targets=["layers.2.mlp.up_proj"]) == [f"{TEXT}layers.2.mlp.up_proj.weight"]
    assert names(targets=["embed_tokens"]) == [f"{TEXT}embed_tokens.weight"]
    assert names(targets=["lm_head"]) == ["lm_head.weight"]  # tied to the table, and trained apart
    with refused("option_invalid", "proj", "q_proj"):  # no part of a name between dots
        names(targets=["proj"])


def test_only_the_last_layers_are_trained_on_request():
    assert {name.split(".")[3] for name in names(layers=2)} == {"2", "3"}
    assert names(layers=99) == names()
    with refused("option_invalid", "in_proj_z"):  # the last layer is attention
        names(layers=1, targets=["in_proj_z"])


def test_the_draft_heads_maps_come_last():
    found = names(draft_head=True)
    assert found[:31] == names() and len(found) == 31 + 8 and found[31] == "mtp.fc.weight"


def test_the_parts_of_an_adapter_are_trained_further_with_their_ranks_and_scales():
    options, begin = TrainOptions(from_adapter="a"), adapter()
    parts = trained_parts(CONFIG, options, begin)
    (name, own), *others = first_values(parts, options, begin).items()
    assert not others and parts[name] == (448, 256, 5) and own.scale == 0.25
    assert mx.array_equal(own.a, begin.pairs[name].a) and mx.array_equal(own.b, begin.pairs[name].b)


def test_the_heads_part_of_an_adapter_is_trained_further_where_the_head_is_the_table():
    assert CONFIG.tie_word_embeddings
    pairs = {f"{TEXT}embed_tokens.weight": pair(512, 256), "lm_head.weight": pair(512, 256)}
    assert trained_parts(CONFIG, TrainOptions(from_adapter="a"), adapter(pairs=pairs)).keys() == pairs.keys()


@pytest.mark.parametrize(
    "more",
    [
        {"replaced": {f"{TEXT}norm.weight": mx.zeros(3)}},
        {"magnitudes": {f"{TEXT}layers.1.mlp.up_proj.weight": mx.zeros(3)}},
        {"pairs": {"model.visual.merger.linear_fc1.weight": pair()}},
    ],
)
def test_an_adapter_with_more_than_low_rank_parts_of_the_text_model_is_not_trained_further(more):
    with refused("adapter_unsupported", "an-adapter"):
        trained_parts(CONFIG, TrainOptions(from_adapter="a"), adapter(**more))


# --- first values ----------------------------------------------------------------------------------------------------


def test_a_first_value_depends_on_the_seed_and_the_name_alone():
    def values(**options):
        made = TrainOptions(**options)
        return first_values(trained_parts(CONFIG, made, None), made, None)

    name = f"{TEXT}layers.3.self_attn.q_proj.weight"
    alone, among = values(targets=["q_proj"])[name], values()[name]
    assert mx.array_equal(alone.a, among.a) and not mx.any(among.b).item() and among.scale == 2
    assert not mx.array_equal(values(seed=1)[name].a, among.a)
    assert not mx.array_equal(values()[f"{TEXT}layers.3.self_attn.k_proj.weight"].a, among.a)
    bound = 256**-0.5
    assert 0.95 * bound < mx.abs(among.a).max().item() <= bound and abs(among.a.mean().item()) < 0.05 * bound
    assert values(rank=4, alpha=2)[name].scale == 0.5


# --- the optimizer ---------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_in_a_line_and_falls_to_nothing_behind_the_last_step():
    options = TrainOptions(learning_rate=1.0, warmup=3, schedule="linear")
    assert [round(learning_rate(options, step, 8), 6) for step in range(1, 9)] == [
        0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2,
    ]  # fmt: skip
    cosine = TrainOptions(learning_rate=1.0, schedule="cosine")
    assert [round(learning_rate(cosine, step, 2), 6) for step in (1, 2)] == [1.0, 0.5]
    assert learning_rate(TrainOptions(learning_rate=0.3, schedule="constant"), 7, 9) == 0.3
    assert 0 < learning_rate(TrainOptions(warmup=9), 5, 5) < 1e-4  # warmup longer than the run


def test_adamw_makes_the_steps_of_its_definition():
    """Loshchilov and Hutter, algorithm 2, with bias correction, as torch.optim.AdamW."""
    options = TrainOptions(weight_decay=0.1, optimizer="adamw")
    parameters, moments = {"w": pair()}, {}
    expected = [np.array(parameters["w"].a, np.float64), 0.0, 0.0]
    for step in (1, 2, 3):
        gradients = {"w": pair(seed=step)[:2]}
        parameters, moments = updated(options, 0.01, step, parameters, gradients, moments)
        g, (w, m, v) = np.array(gradients["w"][0], np.float64), expected
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        expected = [w, m, v]
    assert np.abs(np.array(parameters["w"].a) - expected[0]).max() < 1e-6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_of_any_optimizer_goes_down_and_leaves_what_it_was_given(optimizer):
    options, before = TrainOptions(optimizer=optimizer), {"w": pair(), "v": pair(8, 3)}
    kept = {name: [np.array(array) for array in own[:2]] for name, own in before.items()}
    state, moments, made = before, {}, []
    for step in (1, 2, 3):
        gradients = {name: (own.a, own.b) for name, own in state.items()}  # of half the sum of squares
        new, after = updated(options, 0.01, step, state, gradients, moments)
        assert norm({name: own[:2] for name, own in new.items()}) < norm(gradients)
        made.append((step, state, gradients, moments, new))
        state, moments = new, after
    for *given, new in made:
        again, _ = updated(options, 0.01, *given)
        for name, own in new.items():
            assert mx.array_equal(again[name].a, own.a) and mx.array_equal(again[name].b, own.b)
    for name, own in before.items():
        assert all(np.array_equal(a, b) for a, b in zip(kept[name], own[:2], strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_without_gradients_stay_as_they_are(optimizer):
    options, state = TrainOptions(optimizer=optimizer), {"w": pair(), "v": pair(8, 3)}
    gradients = {name: (own.a, own.b) for name, own in state.items()}
    state, moments = updated(options, 0.01, 1, state, gradients, {})
    for before in ({}, moments):
        new, after = updated(options, 0.01, 2, state, {"w": gradients["w"]}, before)
        assert new["v"] is state["v"] and after.get("v") is before.get("v") and list(new) == list(state)
        assert not mx.array_equal(new["w"].a, state["w"].a)


# --- sums ------------------------------------------------------------------------------------------------------------


def test_each_target_of_a_step_weighs_the_same_whatever_its_batch():
    ones = mx.ones((2, 2))
    sums = Sums()
    sums.add(10.0, 5, {"w": (5 * ones, ones)})  # sums over targets, as batch_loss gives them
    sums.add(2.0, 1, {"w": (ones, 2 * ones)})
    gradients, length = sums.clipped(0)
    assert sums.mean == 2.0 and mx.allclose(gradients["w"][0], ones) and mx.allclose(gradients["w"][1], 0.5 * ones)
    assert math.isclose(length, math.sqrt(4 + 1), rel_tol=1e-6)
    shorter, before = sums.clipped(0.1)
    assert before == length and math.isclose(norm(shorter), 0.1, rel_tol=1e-6)
    assert norm(sums.clipped(100)[0]) == pytest.approx(length)
