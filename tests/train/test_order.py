"""The order of rows: every row once an epoch, the same wherever a run goes on, and rows of a step by length."""

import itertools

import numpy as np
import pytest

from mlx_qwen35.train.order import Order

LENGTHS = np.random.RandomState(0).randint(1, 500, 103)


def rows_of(order: Order, step: int) -> list[int]:
    return list(itertools.chain.from_iterable(order[step]))


def test_each_epoch_shows_every_row_once():
    order = Order(LENGTHS, 4, 3, 0)
    assert len(order) == 9
    for epoch in range(3):
        seen = [row for step in range(9 * epoch, 9 * epoch + 9) for row in rows_of(order, step)]
        assert sorted(seen) == list(range(103))


def test_each_epoch_and_seed_has_an_order_of_its_own():
    firsts = {tuple(rows_of(Order(LENGTHS, 4, 3, seed), step)) for seed in (0, 1, 2**40, 2**200) for step in (0, 9, 18)}
    assert len(firsts) == 12


def test_a_step_has_the_same_rows_whenever_it_is_asked_for():
    whole = Order(LENGTHS, 4, 3, 7)
    in_order = [whole[step] for step in range(30)]
    assert [Order(LENGTHS, 4, 3, 7)[step] for step in reversed(range(30))][::-1] == in_order


def test_the_order_is_the_same_on_every_machine():
    order = Order([5] * 8, 2, 2, 3)
    assert (order[0], order[2]) == ([[5, 0], [4, 1]], [[5, 0], [1, 3]])


def test_batches_change_no_rows_of_a_step():
    """Of 12 rows a step, whatever the batches and the lengths."""
    orders = [Order(LENGTHS, batch, 12 // batch, 5) for batch in (1, 2, 3, 4, 12)] + [Order([9] * 103, 4, 3, 5)]
    for step in range(len(orders[0])):
        assert len({frozenset(rows_of(order, step)) for order in orders}) == 1


@pytest.mark.parametrize("batch", [1, 4])
def test_rows_of_similar_length_come_together(batch: int):
    for step in range(9):
        lengths = [LENGTHS[row] for row in rows_of(Order(LENGTHS, batch, 12 // batch, 5), step)]
        assert lengths == sorted(lengths)


def test_the_last_step_of_an_epoch_has_what_is_left():
    order = Order([1] * 10, 4, 1, 0)
    assert [[len(batch) for batch in order[step]] for step in range(6)] == [[4], [4], [2], [4], [4], [2]]
    assert Order([1] * 3, 4, 8, 0)[0] != [] and len(Order([1] * 3, 4, 8, 0)) == 1
