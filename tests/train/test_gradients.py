"""Loss and gradients of batches: equal to transformers' and PEFT's, to finite differences, and of rows to their own."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import gradient_cases as given
import mlx.core as mx
import numpy as np
import pytest
from gradient_cases import CASE, SMALL, TABLE
from parity.cases import Case
from refusing import refused

from mlx_qwen35.backend import CPU, assume
from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.names import HEAD
from mlx_qwen35.convert import convert
from mlx_qwen35.kernels import cpu
from mlx_qwen35.load import load_model
from mlx_qwen35.model.model import Model
from mlx_qwen35.train.gradients import Backward, BatchLoss, Gradients, batch_loss
from mlx_qwen35.train.rows import Row

CLOSE = 1e-4  # of the largest element of a map's gradient; float32 leaves 2e-5
ALIKE = 2e-5  # between two orders of the same sums


@pytest.fixture
def model(parity_model: Callable[..., Model]) -> Model:
    """Of SMALL, which most tests are of: CASE takes a second."""
    return parity_model(SMALL)


def found(
    model: Model, parameters: Mapping[str, Pair] | None = None, case: Case = SMALL, **options: object
) -> BatchLoss:
    shown = [mx.array(own) for own in given.embeddings(case)]
    parameters = given.parameters(case) if parameters is None else parameters
    return batch_loss(model, parameters, given.rows(case), embeddings=shown, **options)


def differences(ours: Gradients, theirs: Mapping[str, tuple]) -> list[float]:
    """The largest of each gradient, relative to its largest element."""
    pairs = [(np.array(ours[n][i]), np.array(theirs[n][i])) for n in theirs for i in (0, 1)]
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]


def some(*ends: str) -> dict[str, Pair]:
    """Those of SMALL whose names end so."""
    return {name: pair for name, pair in given.parameters(SMALL).items() if name.endswith(ends)}


# --- against other programs ------------------------------------------------------------------------------------------


def test_gradients_of_every_map_are_those_of_peft_in_a_batch_with_padding_and_images(parity_model: Callable):
    ours, golden = found(parity_model(CASE), case=CASE), given.golden()
    assert abs(ours.loss - golden["loss"]) < 1e-5 * ours.targets
    assert len(ours.gradients) == 33 and set(golden) == {"loss", *(own for own, _, _ in given.names(ours.gradients))}
    for own, name, i in given.names(ours.gradients):
        summary, theirs = given.summary(own, np.array(ours.gradients[name][i])), golden[own]
        assert np.abs(summary - theirs).max() < CLOSE * theirs[0], own


@pytest.mark.full
def test_they_are_those_of_peft_now(parity_model: Callable, parity_folder: Callable):
    pytest.importorskip("peft")
    loss, theirs = given.of_peft(parity_folder(CASE))
    ours = found(parity_model(CASE), case=CASE)
    assert abs(ours.loss - loss) < 1e-5 * ours.targets
    assert max(differences(ours.gradients, theirs)) < CLOSE
    for own, name, i in given.names(theirs):
        assert np.abs(given.summary(own, theirs[name][i]) - given.golden()[own]).max() < ALIKE * given.golden()[own][0]


@pytest.fixture(scope="module")
def packed(parity_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SMALL by the recipe 4bit."""
    return convert(parity_folder(SMALL), tmp_path_factory.mktemp("packed") / "4bit", recipe="4bit", rounding="nearest")


@pytest.mark.core(1)
@pytest.mark.parametrize("unpacks", [True, False], ids=["unpacked", "quantized products"])
def test_gradients_through_packed_weights_are_finite_differences(packed: Path, monkeypatch, unpacks: bool):
    monkeypatch.setattr(cpu, "UNPACKED", 3_000)  # several slices of a matrix
    with assume(replace(CPU, unpacks_for_many_rows=unpacks)):
        model = load_model(open_checkpoint(packed), mx.float32, "packed")
        parameters = given.parameters(SMALL)
        ours = found(model, parameters)
        rng, step = np.random.default_rng(5), 3e-3
        for _ in range(5):
            directions = {n: [_noise(rng, array) for array in pair[:2]] for n, pair in parameters.items()}
            moved = [
                found(model, {n: Pair(p.a + sign * step * d[0], p.b + sign * step * d[1], p.scale)
                              for (n, p), d in zip(parameters.items(), directions.values(), strict=True)},
                      backward=False).loss
                for sign in (1, -1)
            ]  # fmt: skip
            slope = sum(float((g * d).sum()) for n, own in directions.items()
                        for g, d in zip(ours.gradients[n], own, strict=True))  # fmt: skip
            length = sum(float((g * g).sum()) for own in ours.gradients.values() for g in own) ** 0.5
            assert abs((moved[0] - moved[1]) / (2 * step) - slope) < 1e-3 * length


def _noise(rng: np.random.Generator, like: mx.array) -> mx.array:
    """A random direction; all of those of a model have a length of about 1."""
    return mx.array(rng.normal(size=like.shape).astype(np.float32)) / 250


# --- rows and batches ------------------------------------------------------------------------------------------------


def test_loss_and_gradients_of_a_batch_are_the_sums_of_its_rows_alone(model: Model):
    parameters, together = some("q_proj.weight", "in_proj_a.weight", TABLE, HEAD), []
    for row, shown in zip(given.rows(SMALL), given.embeddings(SMALL), strict=True):
        together.append(batch_loss(model, parameters, [row], embeddings=[mx.array(shown)]))
    both = found(model, parameters)
    assert both.targets == sum(own.targets for own in together)
    assert abs(both.loss - sum(own.loss for own in together)) < 1e-6 * both.loss
    sums = {n: [a + b for a, b in zip(*(own.gradients[n] for own in together), strict=True)] for n in parameters}
    assert max(differences(both.gradients, sums)) < ALIKE


def test_what_stands_in_the_padding_changes_nothing(model: Model):
    rows = [Row(row.tokens, row.targets) for row in given.rows(SMALL)]
    parameters = some("k_proj.weight", "in_proj_qkv.weight")
    short = batch_loss(model, parameters, rows)
    longer = batch_loss(model, parameters, [*rows, Row((1,) * 99, (False,) * 99)])
    assert longer.targets == short.targets and abs(longer.loss - short.loss) < 1e-5 * short.loss
    assert max(differences(longer.gradients, short.gradients)) < ALIKE


@pytest.mark.parametrize("pieces", [1000, pytest.param(7, marks=pytest.mark.full)])
def test_pieces_change_nothing(model: Model, pieces: int):
    parameters = some("1.mlp.down_proj.weight", HEAD)
    one, other = found(model, parameters, pieces=16), found(model, parameters, pieces=pieces)
    assert abs(one.loss - other.loss) < 1e-6 * one.loss
    assert max(differences(one.gradients, other.gradients)) < ALIKE


def test_a_row_without_targets_has_no_loss_and_zero_gradients(model: Model):
    parameters = some("0.mlp.up_proj.weight", TABLE, HEAD)
    ours = batch_loss(model, parameters, [Row((1, 2, 3), (False,) * 3)])
    assert (ours.loss, ours.targets) == (0.0, 0)
    assert all((array == 0).all() for own in ours.gradients.values() for array in own)


def test_a_loss_alone_is_the_same_and_has_no_gradients(model: Model):
    parameters = some("o_proj.weight", HEAD)
    whole, alone = found(model, parameters), found(model, parameters, backward=False)
    assert alone.gradients == {} and (alone.loss, alone.targets) == (whole.loss, whole.targets)
    assert mx.array_equal(alone.hidden, whole.hidden)
    assert alone.hidden.shape == (2, 45, SMALL.config["text_config"]["hidden_size"])


def test_embeddings_that_do_not_fit_the_placeholders_are_refused(model: Model):
    with refused("embeddings_mismatch", "row 1", "12", "0"):
        batch_loss(model, {}, given.rows(SMALL), backward=False)


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "layers"),
    [(("1.mlp.up_proj.weight",), 1), ((HEAD,), 0), ((TABLE,), 2)],
    ids=["the last layer", "the head", "the table"],
)
def test_the_way_back_ends_at_the_lowest_part_that_is_trained(model: Model, ends: tuple, layers: int):
    calls: list[int] = []
    parameters = some(*ends)
    ours = found(model, parameters, progress=lambda: calls.append(0))
    assert len(calls) == len(model.layers) + layers and set(ours.gradients) == set(parameters)
    assert all(mx.abs(array).max() > 0 for own in ours.gradients.values() for array in own)


def test_a_tied_head_and_the_table_are_trained_apart(model: Model):
    made, rng = some(TABLE, HEAD), np.random.default_rng(2)
    ours = found(model, made)
    for name, step in ((TABLE, 2e-4), (HEAD, 1e-2)):
        pair = made[name]
        d = mx.array(rng.normal(size=pair.b.shape).astype(np.float32))
        ends = [found(model, made | {name: pair._replace(b=pair.b + sign * step * d)}, backward=False).loss
                for sign in (1, -1)]  # fmt: skip
        slope = float((ours.gradients[name][1] * d).sum())
        assert abs((ends[0] - ends[1]) / (2 * step) - slope) < 5e-3 * abs(slope)


# --- other machines and dtypes ---------------------------------------------------------------------------------------


@pytest.mark.full
def test_joined_projections_have_the_same_gradients(model: Model, parity_folder: Callable):
    with assume(replace(CPU, joins_projections=True)):
        joined = load_model(open_checkpoint(parity_folder(SMALL)), mx.float32, "joined")
        ours = found(joined)
    assert len(joined.layers[0].linear_attn.in_proj.products) == 1
    assert max(differences(ours.gradients, found(model).gradients)) < CLOSE


@pytest.mark.core(1)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_has_the_same_gradients_but_for_its_digits(model: Model, parity_folder: Callable, dtype):
    half = load_model(open_checkpoint(parity_folder(SMALL)), dtype, "half")
    parameters = some("0.linear_attn.in_proj_qkv.weight", "0.mlp.up_proj.weight", "1.self_attn.k_proj.weight", HEAD)
    ours, whole = found(half, parameters), found(model, parameters)
    digits = 2**-11 if dtype == mx.float16 else 2**-8
    assert all(array.dtype == mx.float32 for own in ours.gradients.values() for array in own)
    assert max(differences(ours.gradients, whole.gradients)) < 30 * digits


@pytest.mark.parametrize("size", [3e-7, 1e-2, 60000.0])
def test_gradients_in_float16_of_any_size_keep_their_digits_and_zeros(size):
    back, dx = Backward({}), mx.array([size, 0.0, -size / 4], mx.float16)
    back.dx = dx
    for _ in range(3):
        back.through(lambda x, pairs: 0.01 * x, mx.ones(3, mx.float16), [])
    got, expected = back.dx.astype(mx.float32) / back.scale, 1e-6 * dx.astype(mx.float32)
    assert mx.allclose(got, expected, rtol=5e-3, atol=0)


def test_gradients_that_a_layer_makes_larger_than_float16_are_computed_once_more_smaller():
    back = Backward({})
    back.dx = mx.array([1e-3, 0.0, -0.25], mx.float16)
    back.through(lambda x, pairs: 30_000 * x, mx.ones(3, mx.float16), [])
    assert mx.allclose(back.dx.astype(mx.float32) / back.scale, mx.array([30.0, 0.0, -7500.0]), rtol=5e-3, atol=0)
