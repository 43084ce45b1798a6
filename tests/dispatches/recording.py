"""Recorded functions, for the tests of the two rules."""

from collections import Counter

import mlx.core as mx
from dispatches.count import markers
from dispatches.count.byte_rule import Bytes
from dispatches.count.dispatches import AROUND, count

HEADS = (1, 1, 16, 512)  # queries and gates of 16 heads, of one token


def zeros(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return markers.blank(shape, dtype)


def counted(function, *inputs: mx.array) -> Counter:
    """Launches by operation."""
    return count(markers.record(function, *inputs)["nodes"]).places.get(AROUND, Counter())


def moved(function, *inputs: mx.array) -> tuple[int, int]:
    """Bytes read and written."""
    found = in_all(function, *inputs)
    return found.read, found.written


def in_all(function, *inputs: mx.array) -> Bytes:
    return count(markers.record(function, *inputs)["nodes"]).bytes.get(AROUND, Bytes())


def kernel(in_order: bool = True):
    made = mx.fast.metal_kernel(
        name="some_kernel", input_names=["x"], output_names=["y"], source="", ensure_row_contiguous=in_order
    )
    one = (1, 1, 1)
    return lambda x: made(inputs=[x], grid=one, threadgroup=one, output_shapes=[x.shape], output_dtypes=[x.dtype])[0]
