"""The rows that nano is trained on: packed lessons, and every few steps rows of one long text."""

from itertools import groupby, islice

import pytest
from encoding import Encoder

pytest.importorskip("torch")

from lessons import LESSONS, LONG_TOKENS, Settings, batches
from tasks import ALL_TASKS

SETTINGS = Settings(rows=2, long_tokens=(448, 1536))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder()


def test_every_task_is_taught_in_its_modes():
    assert list(LESSONS) == list(ALL_TASKS)
    for name, lesson in LESSONS.items():
        assert ALL_TASKS[name].modes == (False, True) or lesson.thinking == float(ALL_TASKS[name].modes[0])


def test_every_fourth_step_has_long_rows_equally_long_for_all_workers(encoder):
    first, second = (list(islice(batches(encoder, SETTINGS, rank, 6, [1.0]), 6)) for rank in (0, 1))
    shapes = [tuple(batch.ids.shape) for batch in first]
    assert shapes == [tuple(batch.ids.shape) for batch in second]
    long = [shape for shape in shapes if shape != (2, 352)]
    assert [shapes.index(shape) for shape in long] == [1, 5]  # steps 7 and 11
    assert all(448 - 32 < tokens <= 1536 and rows == LONG_TOKENS // tokens for rows, tokens in long)
    assert all((one.ids != other.ids).any() for one, other in zip(first, second, strict=True))


def test_what_is_learned_are_whole_answers(encoder):
    (batch,) = islice(batches(encoder, SETTINGS, 0, 0, [1.0]), 1)
    assert batch.learn.any(1).all()
    for ids, learn in zip(batch.ids.tolist(), batch.learn.tolist(), strict=True):
        for own, run in groupby(zip(ids, learn, strict=True), key=lambda pair: pair[1]):
            text = encoder.tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
            assert not own or text.index("<|im_end|>") == len(text) - len("<|im_end|>")


def test_long_rows_grow_with_the_run(encoder):
    settings = Settings(long_every=1, long_from=0.5)
    for progress, longest in ((0.0, 1024), (0.5, 4096)):
        tokens = [batch.ids.shape[1] for batch in islice(batches(encoder, settings, 0, 0, [progress]), 6)]
        assert longest / 2 < max(tokens) <= longest
