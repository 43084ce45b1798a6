"""What a restricted answer costs on a GPU."""

import mlx.core as mx
import pytest
from dispatches.recording import counted, zeros

from mlx_qwen35.engine.constraints.bits import WORD, spread

WORDS = 248_320 // WORD


@pytest.mark.parametrize("rows", [1, 4])
def test_masks_of_all_rows_are_one_launch(rows, marked):
    """The function is compiled here, in the place of the decorator's: MLX is prepared for counting only now."""
    one_launch = mx.compile(spread.__wrapped__)
    inputs = zeros(rows, WORDS, WORD, dtype=mx.float32), zeros(rows, WORDS, 1, dtype=mx.uint32)
    launches = counted(one_launch, *inputs, zeros(WORD, dtype=mx.uint32))
    assert launches.total() == 1, launches
