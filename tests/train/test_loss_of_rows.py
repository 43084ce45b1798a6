"""Loss and number of targets of 20 conversations equal those of transformers, which renders each answer by itself."""

import json
from collections.abc import Callable

import pytest
from train_rows import CASE, CUT, GOLDEN, LIMITS, TALKS, losses

from mlx_qwen35 import Processor
from mlx_qwen35.model.model import Model
from mlx_qwen35.train.gradients import batch_loss
from mlx_qwen35.train.rows import Row, rows_of

QUICK = (1, 2)  # several turns with reasoning, and one that is cut
CLOSE = 1e-5  # of the loss of a target, which is about 7


@pytest.fixture(scope="module")
def golden() -> list[list[float]]:
    return json.loads(GOLDEN.read_text())


@pytest.fixture
def model(parity_model: Callable[..., Model]) -> Model:
    return parity_model(CASE)


def rendered(nano: Processor, number: int) -> list[Row]:
    return list(rows_of([TALKS[number]], nano, LIMITS[number]))


def close(found: tuple[float, int], expected: tuple[float, int]) -> None:
    assert found[1] == expected[1]
    assert abs(found[0] - expected[0]) < CLOSE * expected[1]


@pytest.mark.parametrize(
    "number", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in range(len(TALKS))]
)
def test_loss_and_targets_are_those_of_transformers(nano: Processor, model: Model, golden: list, number: int):
    rows = rendered(nano, number)
    found = batch_loss(model, {}, rows, backward=False)
    close((found.loss, found.targets), golden[number])
    assert found.targets == sum(sum(row.targets) for row in rows)


@pytest.mark.full
def test_no_padding_counts_in_batches_of_rows_of_several_conversations(nano: Processor, model: Model, golden: list):
    rows = [row for number in range(len(TALKS)) for row in rendered(nano, number)]
    batches = [rows[i : i + 6] for i in range(0, len(rows), 6)]
    found = [batch_loss(model, {}, batch, backward=False) for batch in batches]
    expected = sum(loss for loss, _ in golden), sum(count for _, count in golden)
    close((sum(own.loss for own in found), sum(own.targets for own in found)), expected)


@pytest.mark.full
def test_the_conversations_are_of_every_kind(nano: Processor):
    files = [rows_of([talk], nano, limit) for talk, limit in zip(TALKS, LIMITS, strict=True)]
    assert sum(rows.report.cut for rows in files) == len(CUT)
    assert sum(rows.report.thinking for rows in files) >= 10
    assert sum("tools" in talk for talk in TALKS) >= 6
    assert sum(len(rows) < rows.report.answers for rows in files) >= 3  # rows of several targets


@pytest.mark.full
def test_the_golden_losses_are_those_of_transformers_now(parity_folder: Callable, golden: list):
    pytest.importorskip("torch")
    for now, before in zip(losses(parity_folder(CASE)), golden, strict=True):
        close((now[0], now[1]), (before[0], before[1]))
