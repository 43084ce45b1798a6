"""How many bytes of device memory the launches of an operation read and write. Launches are as in dispatch_rule.py.

zero    what launches nothing
each    launch reads its inputs and writes its outputs, in the dtypes that the graph has: packed weights as uint32, a
        state as float32. An input counts the elements that it shows, each once: a broadcast axis adds none, a slice
        counts only itself, an array given twice counts once. That holds for a quantized_matmul (packed weights,
        scales, biases), a Metal kernel (a DeltaNet state is read and written), attention (queries, and the keys and
        values in use), concatenate and other copies alike
more    an input that is copied before it can be read: the copy is written, and the operation reads that
less    a look-up (gather, dynamic slice): of what it looks into it reads the rows that come out
        slice_update, dynamic or not: it reads the update and writes as much; where the launches count a copy of what
        is overwritten, that whole is read and written too

`matrices` is the part of the read bytes that are matrices of the model: what a product takes as it was loaded, packed
or not. A token reads each once, however the program is written; what programs differ in is the rest: activations,
states, caches, norm weights, rows of the embedding.

Judgement, all of it small beside the states:

- a compiled function counts its inputs and outputs once, also where it is several launches: what they hand to each
  other is not in the graph. It would be 8 MB a token for the convolution of mlx-vlm 0.7.10.
- a Metal kernel counts its inputs whole. Ours for queries and keys passes over the gates and values beside them.
- a cache of few tokens is read here; each token in it adds 32 KB for the 4B geometry, for every program.
- caches of the chip are not considered: this is what is asked for.
- launches that the dispatch rule leaves out move nothing here, nor does the address of a dynamic slice.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .dispatch_rule import Node, Result

_PRODUCTS = ("QuantizedMatmul", "Matmul", "AddMM")
_LOOK_UPS = ("Gather", "GatherAxis", "DynamicSlice")
_UPDATES = ("SliceUpdate", "DynamicSliceUpdate")


@dataclass(frozen=True)
class Bytes:
    """Of device memory. matrices: the part of `read` that are matrices of the model."""

    read: int = 0
    written: int = 0
    matrices: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.read + other.read, self.written + other.written, self.matrices + other.matrices)

    @property
    def total(self) -> int:
        return self.read + self.written

    @property
    def rest(self) -> int:
        """Read or written, without the matrices."""
        return self.total - self.matrices


def moved(node: Node, result: Result) -> Bytes:
    """What an operation moves that has launches; result: what the dispatch rule says of it."""
    if node.name in _UPDATES:
        return _update(node)
    outputs = zip(result.outputs, node.output_sizes, strict=True)
    written = sum(layout.elements * size for layout, size in outputs)
    if node.name in _LOOK_UPS:
        return Bytes(_shown(node, range(1, len(node.inputs))) + written, written)
    copies = sum(_whole(node, index) for index in result.copied)
    matrices = _shown(node, _matrices(node)) if node.name in _PRODUCTS else 0
    return Bytes(_shown(node, range(len(node.inputs))) + copies, written + copies, matrices)


def _shown(node: Node, inputs: Iterable[int]) -> int:
    """Bytes of these inputs as they lie, each array once."""
    distinct = {node.inputs[index]: node.layouts[index].elements * node.sizes[index] for index in inputs}
    return sum(distinct.values())


def _whole(node: Node, index: int) -> int:
    """Bytes of an input that lies in order in a buffer of its own."""
    return math.prod(node.layouts[index].shape) * node.sizes[index]


def _matrices(node: Node) -> list[int]:
    return [index for index, given in enumerate(node.given) if index and given]


def _update(node: Node) -> Bytes:
    """Inputs: what is overwritten in part, the update, and where it goes if that is computed."""
    before = _shown(node, [0]), _whole(node, 0)
    read, written = before if node.shared else (0, 0)
    return Bytes(read + _shown(node, range(1, len(node.inputs))), written + _whole(node, 1))
