"""The memory plan of training: what it counts, what it proposes, and how near it comes to measured peaks."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from refusing import refused

from mlx_qwen35.backend import CPU, assume
from mlx_qwen35.budget.plan import Machine, mac, this_machine
from mlx_qwen35.budget.training import TrainingNeeds, TrainingPlan, check_training_fits, plan_training, proposals
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.random import geometry, write_headers
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import StorageOptions
from mlx_qwen35.load import load_model
from mlx_qwen35.train.gradients import batch_loss
from mlx_qwen35.train.loop import Sums
from mlx_qwen35.train.optimizer import updated
from mlx_qwen35.train.options import TrainOptions
from mlx_qwen35.train.parameters import first_values, trained_parts
from mlx_qwen35.train.rows import Row


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The headers of the 4B by recipe 4bit."""
    raw, folder = tmp_path_factory.mktemp("4b") / "raw", tmp_path_factory.mktemp("4b-4bit")
    make_plan(write_headers(raw, geometry("4b")), StorageOptions("4bit")).write_headers(folder)
    return open_checkpoint(folder)


def needs(checkpoint: Checkpoint, length: int, **options: object) -> TrainingNeeds:
    own = TrainOptions(**options)  # type: ignore[arg-type]
    parts = trained_parts(checkpoint.config.text, own, None)
    return TrainingNeeds(parts, length, own.batch_size, own.pieces, own.optimizer, own.accumulate > 1, rank=own.rank)


def planned(
    checkpoint: Checkpoint, length: int, machine: Machine | None = None, **options: object
) -> TrainingPlan:
    return plan_training(checkpoint, machine or mac(16), needs(checkpoint, length, **options))


# --- what is counted -------------------------------------------------------------------------------------------------


def test_the_4b_is_trained_in_4_bit_on_a_mac_with_8_gb(packed: Checkpoint):
    plan = planned(packed, 2048, mac(8), rank=16)
    assert plan.fits and 4.0e9 < plan.peak < 5.0e9
    assert plan.trained == 4 * sum(16 * (out + width) for out, width, _ in plan.needs.parts.values())
    assert (plan.moments, plan.gradients, plan.best) == (2 * plan.trained, 2 * plan.trained, 0)
    assert plan.held == plan.weights + 3 * plan.trained


def test_only_the_trained_layers_keep_their_inputs(packed: Checkpoint):
    hidden = 2 * 1024 * packed.config.text.hidden_size
    kept = [planned(packed, 1024, **own).inputs for own in ({}, {"layers": 4}, {"targets": ("lm_head",)})]  # type: ignore
    assert planned(packed, 1024, targets=("embed_tokens",)).inputs == kept[0] == 34 * hidden
    assert kept[1] == 6 * hidden


@pytest.mark.parametrize(("optimizer", "moments"), [("adam", 2), ("sgd", 1), ("muon", 1), ("adafactor", 0.2)])
def test_each_optimizer_keeps_its_numbers(packed: Checkpoint, optimizer: str, moments: float):
    plan = planned(packed, 512, rank=8, optimizer=optimizer)
    assert plan.moments == moments * plan.trained or (moments < 1 and plan.moments < moments * plan.trained)


def test_more_of_anything_needs_more(packed: Checkpoint):
    least = needs(packed, 256, rank=8)
    more = [replace(least, **own) for own in ({"length": 512}, {"batch": 2}, {"keeps_best": True}, {"patches": 60_000})]
    peaks = [plan_training(packed, mac(16), own).peak for own in (*more, least.with_rank(16))]
    assert min(peaks) > plan_training(packed, mac(16), least).peak
    assert planned(packed, 256, pieces=32).loss < planned(packed, 256, pieces=256).loss


# --- what is proposed ------------------------------------------------------------------------------------------------


def limited(plan: TrainingPlan, share: float) -> Machine:
    """A machine for a part of what a run works with."""
    return replace(plan.machine, limit=int(plan.peak - (1 - share) * plan.working))


def test_a_run_that_does_not_fit_is_refused_with_the_largest_values_that_fit(packed: Checkpoint):
    plan = planned(packed, 2048, rank=16, batch_size=4)
    machine = limited(plan, 0.5)
    with refused("memory_exceeded", "2,048 tokens", "batch_size=", "max_length="):
        check_training_fits(packed, machine, plan.needs, "4B")
    found = dict(way.split("=") for way in proposals(packed, machine, plan.needs))
    assert set(found) == {"batch_size", "max_length"}
    for name, option, step in (("batch_size", "batch", 1), ("max_length", "length", 32)):
        value = int(found[name])
        fits = [plan_training(packed, machine, replace(plan.needs, **{option: n})).fits for n in (value, value + step)]
        assert fits == [True, False]


def test_where_no_one_change_is_enough_several_are_proposed(packed: Checkpoint):
    plan = planned(packed, 4096, rank=64, batch_size=8)
    machine = replace(plan.machine, limit=int(plan.weights + 6e8))
    (way,) = proposals(packed, machine, plan.needs)
    found = dict(part.split("=") for part in shlex.split(way))
    assert (found["batch_size"], found["pieces"], found["rank"]) == ("1", "64", "4")
    changed = replace(plan.needs.with_rank(4), batch=1, pieces=64, length=int(found["max_length"]))
    assert plan_training(packed, machine, changed).fits


def test_16_bit_weights_that_leave_no_room_are_to_be_packed(tmp_path):
    raw = open_checkpoint(write_headers(tmp_path / "raw", geometry("4b")))
    with refused("memory_exceeded", "4 bit", "mlx_qwen35.convert"):
        check_training_fits(raw, mac(8), needs(raw, 512, rank=8), str(tmp_path / "raw"))
    with refused("memory_exceeded", "smaller model"):
        check_training_fits(raw, replace(mac(8), limit=10**9), needs(raw, 512, rank=8), "4B")


def test_a_run_that_fits_gives_its_plan(packed: Checkpoint):
    own = needs(packed, 1024, rank=16)
    assert check_training_fits(packed, mac(16), own, "4B") == plan_training(packed, mac(16), own)


# --- what is measured ------------------------------------------------------------------------------------------------


@contextmanager
def measured(found: list[int]) -> Iterator[None]:
    """Append the bytes that the block took at most."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    yield
    found.append(mx.get_peak_memory() - before)


def trained(checkpoint: Checkpoint, length: int, options: TrainOptions) -> None:
    """Load, and make two steps as `Training` does."""
    model = load_model(checkpoint, mx.float32, "mid")
    parameters = first_values(trained_parts(checkpoint.config.text, options, None), options, None)
    rng, moments = np.random.default_rng(0), {}
    for step in (1, 2):
        sums = Sums()
        for _ in range(options.accumulate):
            tokens = rng.integers(0, 1000, (options.batch_size, length)).tolist()
            rows = [Row(tuple(own), (False, *[True] * (length - 1))) for own in tokens]
            found = batch_loss(model, parameters, rows, pieces=options.pieces)
            sums.add(found.loss, found.targets, found.gradients)
            del found
        gradients, _ = sums.clipped(1.0)
        parameters, moments = updated(options, 1e-4, step, parameters, gradients, moments)


RUNS = {
    "256": (256, {}), "rank 64": (256, {"rank": 64}), "4 rows": (128, {"batch_size": 4}), "1,024": (1024, {}),
    "2 layers, sgd": (256, {"layers": 2, "optimizer": "sgd"}), "head": (256, {"targets": ("lm_head", "q_proj")}),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("recipe", ["float32", "4bit"])
@pytest.mark.parametrize("run", RUNS)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(checkpoint_folder: Callable, tmp_path: Path, recipe, run):
    folder = checkpoint_folder({**geometry("mid"), "tie_word_embeddings": run != "head"}, dtype=mx.float32)
    if recipe != "float32":
        folder = convert(folder, tmp_path / recipe, recipe=recipe, rounding="nearest")
    length, given = RUNS[run]
    checkpoint, options = open_checkpoint(folder), TrainOptions(**given, accumulate=2)
    found: list[int] = []
    with assume(CPU), measured(found):
        trained(checkpoint, length, options)
        plan = planned(checkpoint, length, this_machine(checkpoint.config.text, mx.float32, 1 << 40), **given)
    assert abs(plan.peak / found[0] - 1) < 0.1, f"{plan.peak / found[0] - 1:+.1%}"
