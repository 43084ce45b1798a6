"""How many kernels MLX launches on Metal for a recorded graph. The rule, read in MLX's Metal backend:

zero    what only looks at memory in another way: broadcast, transpose, expand_dims, squeeze, slice, split, view,
        stop_gradient, depends; reshape, flatten and unflatten where the elements lie in order, or in steps that the new
        shape can take over; contiguous where they lie in order in a buffer at most 16 KB larger
one     every other operation, astype and operations with a scalar among them (a Python number is a constant of the
        graph and costs nothing by itself); arange; full; gather; quantized_matmul; matmul; a reduction; a Metal kernel
one     a reshape or contiguous that must copy
more    concatenate (and stack): one copy an input
        slice_update: one, for the update; one more where another operation also reads what is overwritten, which then
        must be copied. A cache is not: nothing else holds it when the next token is computed
        dynamic slice and slice_update: one more, for the address
        a compiled function: one, and where MLX's compiler splits it, at a reduction say, one for each part that must
        wait for the one before
        and one copy for each input that an operation cannot read as it lies: rms_norm and layer_norm want rows one
        after the other, a Metal kernel made with ensure_row_contiguous all elements in order, a quantized_matmul also
        a row stride of a row's length, be it a single row, a matmul rows or columns without gaps inside, attention
        queries in order (heads and tokens may be swapped), keys and values with unbroken rows, rope of several
        sequences elements in order (heads and tokens may be swapped)
        rms_norm, layer_norm and attention: an astype for each input that is not of the result's dtype

For that each array's strides are followed through the graph. What was there before (weights, caches, the token) lies in
order. Judgement, where the sources of MLX (0.32) would allow another number. The first two are chosen so that the rule
gives what is known of mlx-lm 0.32.2 (814) and mlx-vlm 0.7.10 (831); `left_out` says what they leave out:

- rope counts one. MLX first copies the input where only some of the dims are rotated, as in Qwen3.5.
- parts of a compiled function that share nothing, and so run side by side, count one together.
- attention counts one: over long contexts (1,024 or 4,096 keys, by chip) MLX uses two launches, for every program.
- a reduction or a product counts one: those that MLX splits in two passes are larger than any here.

Not seen: MLX simplifies what it records, so that an operation asked for twice with the same inputs is there once; and
it does not say that a kernel was made with init_value, which is a launch more for each output.

How many bytes those launches move is the matter of byte_rule.py.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .layout import Layout, fresh, reshaped

BOUNDARY = "boundary"  # a marker that costs nothing: here a layer begins
_EXTRA_BYTES = 16384  # of Contiguous::eval_gpu


@dataclass
class Node:
    """One operation. Sizes are bytes of an element."""

    name: str
    arguments: list[Any]
    inputs: list[str]  # which arrays: the same one may come twice
    layouts: list[Layout]  # of the inputs
    sizes: list[int]
    given: list[bool]  # which inputs no launch has made: weights, what a cache held, and views of these
    shared: bool  # another operation reads its first input too
    shapes: list[tuple[int, ...]]  # of its outputs
    output_sizes: list[int]


class Result(NamedTuple):
    launches: int
    outputs: list[Layout]
    copied: Sequence[int] = ()  # inputs that are first copied to lie in order


# --- views -----------------------------------------------------------------------------------------------------------


def _view(node: Node, strides: Sequence[int]) -> Result:
    return Result(0, [Layout(node.shapes[0], tuple(strides), node.layouts[0].buffer)])


def _transpose(node: Node) -> Result:
    return _view(node, [node.layouts[0].strides[axis] for axis in node.arguments[0]])


def _expand(node: Node) -> Result:
    strides = list(node.layouts[0].strides)
    for axis in sorted(node.arguments[0]):
        strides.insert(axis, 1)
    return _view(node, strides)


def _squeeze(node: Node) -> Result:
    return _view(node, [s for axis, s in enumerate(node.layouts[0].strides) if axis not in node.arguments[0]])


def _broadcast(node: Node) -> Result:
    source = node.layouts[0]
    strides = [0 if n == 1 else s for n, s in zip(source.shape, source.strides, strict=True)]
    return _view(node, [0] * (len(node.shapes[0]) - len(strides)) + strides)


def _slice(node: Node) -> Result:
    return _view(node, [s * step for s, step in zip(node.layouts[0].strides, node.arguments[2], strict=True)])


def _same(node: Node) -> Result:
    pairs = zip(node.shapes, node.layouts, strict=False)
    return Result(0, [Layout(shape, layout.strides, layout.buffer) for shape, layout in pairs])


def _custom(node: Node) -> Result:
    """A function with a gradient of its own: its results are its last inputs."""
    return Result(0, node.layouts[len(node.layouts) - len(node.shapes) :])


def _split(node: Node) -> Result:
    source = node.layouts[0]
    return Result(0, [Layout(shape, source.strides, source.buffer) for shape in node.shapes])


def _bits(node: Node) -> Result:
    return Result(0, [node.layouts[0]]) if node.shapes[0] == node.layouts[0].shape else _new(node, 0)


def _reshape(node: Node) -> Result:
    strides = reshaped(node.layouts[0], node.shapes[0])
    return _new(node, 1) if strides is None else _view(node, strides)


# --- launches --------------------------------------------------------------------------------------------------------


def _plain(node: Node) -> Result:
    """One launch. An elementwise result lies as its inputs do, where MLX can walk through them side by side."""
    full = [layout for layout in node.layouts if not layout.scalar]
    fits = bool(full) and all(layout.shape == node.shapes[0] for layout in full)
    alone = len(full) == 1 and full[0].dense
    if fits and (alone or all(x.in_order for x in full) or all(x.in_reverse for x in full)):
        return Result(1, [Layout(shape, full[0].strides, math.prod(shape)) for shape in node.shapes])
    return _new(node, 1)


def _new(node: Node, launches: int) -> Result:
    return Result(launches, [fresh(shape) for shape in node.shapes])


def _reading(node: Node, ready: Iterable[bool]) -> Result:
    """One launch, and a copy of each input (ready: of the first ones) that cannot be read as it lies."""
    copied = [index for index, fine in enumerate(ready) if not fine]
    return Result(1 + len(copied), [fresh(shape) for shape in node.shapes], copied)


def _concatenate(node: Node) -> Result:
    return _new(node, sum(math.prod(layout.shape) > 0 for layout in node.layouts))


def _slice_update(node: Node) -> Result:
    return _new(node, 1 + node.shared)


def _address_too(node: Node) -> Result:
    return _new(node, 2 + (node.shared and node.name == "DynamicSliceUpdate"))


def _matrix_in_order(layout: Layout) -> bool:
    """A single row is no exception: a part of a longer row, and what an elementwise operation makes of it, is not."""
    return layout.strides[-2:] == (*layout.shape[-1:], 1)[-len(layout.shape[-2:]) :]


def _quantized(node: Node) -> Result:
    return _reading(node, map(_matrix_in_order, node.layouts))


def _product(node: Node) -> Result:
    left, right = node.layouts[:2]

    def readable(layout: Layout, vector: bool) -> bool:
        (rows, columns), (row, column) = layout.shape[-2:], layout.strides[-2:]
        return (column == 1 and (not vector or row == columns)) or (row == 1 and (not vector or column == rows))

    return _reading(node, [readable(left, left.shape[-2] == 1), readable(right, right.shape[-1] == 1)])


def _kernel(node: Node) -> Result:
    if label := stands_for(node.name, node.arguments):
        return _marker(label, node)
    wants_order = node.arguments[9]
    return _reading(node, [layout.in_order or not wants_order for layout in node.layouts])


def _norm(node: Node) -> Result:
    x = node.layouts[0]
    rows = len(x.shape) < 2 or x.shape[-2] == 1 or x.strides[-2] in (0, x.shape[-1])
    ready = x.dense and x.strides[-1] == 1 and rows
    return Result(1, [x]) if ready else _reading(node, [False])


def _swapped(layout: Layout) -> bool:
    """(B, H, T, D) that lies as (B, T, H, D)."""
    _, heads, _, size = layout.shape
    return layout.strides[1:] == (size, size * heads, 1)


def _rope(node: Node) -> Result:
    x = node.layouts[0]
    single = math.prod(x.shape[:-3]) == 1
    return _reading(node, [x.in_order or single or _swapped(x)])


def _attention(node: Node) -> Result:
    q, keys, values = node.layouts[:3]
    swapped = q.shape[0] == 1 and _swapped(q)
    return _reading(node, [q.in_order or swapped, keys.strides[-1] == 1, values.strides[-1] == 1])


def _contiguous(node: Node) -> Result:
    source, size = node.layouts[0], node.sizes[0]
    spare = (source.buffer - math.prod(source.shape)) * size
    return Result(0, [source]) if source.in_order and spare <= _EXTRA_BYTES else _new(node, 1)


def _dequantize(node: Node) -> Result:
    return _reading(node, [layout.in_order for layout in node.layouts])


_MARKERS: Mapping[str, Callable[[Node], Result]] = {
    "rms_norm": _norm, "layer_norm": _norm, "rope": _rope, "rope_partly": _rope,
    "scaled_dot_product_attention": _attention, "contiguous": _contiguous, "dequantize": _dequantize,
}  # fmt: skip


def stands_for(name: str, arguments: Sequence[Any]) -> str | None:
    """What a marker stands for; None of another operation."""
    found = re.match(r"custom_kernel_marker_(\w+?)_end_", arguments[0]) if name == "CustomKernel" else None
    return found and found.group(1)


def left_out(name: str, arguments: Sequence[Any]) -> int:
    """Launches of an operation that MLX makes and the rule does not count."""
    label = stands_for(name, arguments) or ""
    if label.startswith("compiled_"):
        chain, every = label.split("_")[1:3]
        return int(every) - int(chain)
    return int(label == "rope_partly")


def _marker(label: str, node: Node) -> Result:
    if label == BOUNDARY:
        return _same(node)
    if label.startswith("compiled_"):
        return _plain(node)._replace(launches=int(label.split("_")[1]))
    return _MARKERS[label](node)


_RULES: Mapping[str, Callable[[Node], Result]] = {
    "Transpose": _transpose, "ExpandDims": _expand, "Squeeze": _squeeze, "Broadcast": _broadcast,
    "BroadcastAxes": _broadcast, "Slice": _slice, "Split": _split, "View": _bits, "Copy": _same,
    "StopGradient": _same, "Depends": _same, "CustomTransforms": _custom, "Reshape": _reshape,
    "Flatten": _reshape, "Unflatten": _reshape,
    "Concatenate": _concatenate, "SliceUpdate": _slice_update, "DynamicSlice": _address_too,
    "DynamicSliceUpdate": _address_too, "QuantizedMatmul": _quantized, "Matmul": _product, "AddMM": _product,
    "CustomKernel": _kernel,
}  # fmt: skip


def launches(node: Node) -> Result:
    """How many launches an operation is, and how its outputs lie."""
    return _RULES.get(node.name, _plain)(node)
