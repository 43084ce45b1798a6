"""Launches and bytes of adapters beside the products of a decoded token."""

import mlx.core as mx
import pytest
from dispatches.count.dispatches import AROUND, count_program
from dispatches.recording import counted, zeros

from mlx_qwen35.backend import METAL, assume
from mlx_qwen35.checkpoint.config import FULL, LINEAR
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.kernels.low_rank import ActiveAdapters, LowRank

PRODUCTS = {LINEAR: 4, FULL: 4, AROUND: 0}  # of a layer: of the mixer two, of the MLP two
MIXED = PRODUCTS | {LINEAR: 5}  # gates that are not packed are a product of their own


@pytest.mark.full
@pytest.mark.parametrize("name", ["tiny", "4b"])
@pytest.mark.parametrize(("recipe", "products"), [("uniform", PRODUCTS), ("mixed", MIXED)])
def test_an_adapter_takes_two_launches_more_a_product_and_products_stay_joined(name, recipe, products):
    plain, beside = (count_program("mlx_qwen35", geometry(name), recipe, rank=rank) for rank in (0, 16))
    for kind, place in beside.places.items():
        more = place.operations - plain.places[kind].operations
        assert more == (dict.fromkeys(("Matmul", "AddMM"), products[kind] * place.layers) if products[kind] else {})


@pytest.mark.full
@pytest.mark.parametrize("name", ["tiny", "4b"])
def test_rows_of_several_adapters_take_three_launches_more_a_product(name):
    plain, beside = (count_program("mlx_qwen35", geometry(name), rows=3, rank=rank, adapters=2) for rank in (0, 16))
    for kind, place in beside.places.items():
        more, each = place.operations - plain.places[kind].operations, PRODUCTS[kind] * place.layers
        assert more == ({"GatherMM": 2 * each, "Add": each} if each else {})


RANK, IN, OUT = 16, 2560, 9216
LOW = LowRank(zeros(2, RANK, IN), zeros(2, OUT, RANK), (0, 2))


@pytest.mark.parametrize(
    ("rows", "launches"),
    [
        (0, {"Matmul": 1, "AddMM": 1}),
        (1, {}),  # it has no part here
        ([0, 2, 0], {"GatherMM": 2, "Add": 1}),
        ([0, -1, 1], {"GatherMM": 2, "Add": 1, "Select": 1}),
        ([-1, 1, 1], {}),
    ],
    ids=str,
)
def test_rows_without_a_part_beside_a_product_cost_little(marked, rows, launches):
    tokens = 1 if isinstance(rows, int) else len(rows)
    with assume(METAL):
        active = ActiveAdapters(lambda maps: LOW, rows)
        found = counted(lambda x, y: active.add((), x, y), zeros(tokens, 1, IN), zeros(tokens, 1, OUT))
    assert found == launches


def test_the_numbers_of_a_row_without_an_adapter_are_its_own():
    low = LowRank(mx.full((1, 2, 3), mx.inf), mx.ones((1, 4, 2)))
    x, y = mx.ones((2, 1, 3)), mx.arange(8).reshape(2, 1, 4).astype(mx.float32)
    found = ActiveAdapters(lambda maps: low, [-1, 0]).add((), x, y)
    assert mx.array_equal(found[0], y[0]) and mx.isinf(found[1]).all()
