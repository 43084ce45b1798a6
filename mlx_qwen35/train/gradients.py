"""Loss and gradients of a batch of rows, layer by layer.

Forward, each layer's input is kept. The loss goes over the vocabulary in pieces, which give the gradient of the hidden
states. Backward, each layer runs again from its input, and gives the gradients of its low-rank parts and of its input.
So memory holds one layer's intermediate results at a time. Below the lowest layer that is trained nothing is kept.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_qwen35.backend import gradients
from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.checkpoint.names import HEAD, TEXT
from mlx_qwen35.model.model import Model
from mlx_qwen35.train.batch import Batch
from mlx_qwen35.train.loss import LARGEST, piecewise_loss
from mlx_qwen35.train.rows import Row
from mlx_qwen35.train.traced import active

SIZES = (LARGEST, LARGEST / 1024)  # of float16 gradients before a layer; the second where the first becomes infinite

Parameters = Mapping[str, Pair]  # what is trained, float32: name of a weight -> its low-rank part
Gradients = dict[str, tuple[mx.array, mx.array]]  # of A and of B, by the weight's name


class BatchLoss(NamedTuple):
    """What a batch gives. Loss and gradients are sums over its targets: divided by their count they are the mean's."""

    loss: float  # sum of -log p over the targets
    targets: int
    gradients: Gradients  # empty for a loss alone
    hidden: mx.array  # (B, T, D) after the final norm


def batch_loss(
    model: Model,
    parameters: Parameters,
    rows: Sequence[Row],
    *,
    embeddings: Sequence[mx.array] | None = None,
    pieces: int = 256,
    backward: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> BatchLoss:
    """Loss and gradients of rows that go through the model together, T the tokens of the longest. All is evaluated.

    Args:
        parameters: low-rank parts of maps of the text model; of the table of tokens too, and of the LM head, each by
            its own name, also where the head is the table.
        embeddings: of each row's images and videos, (n, D) in the order of their placeholders; None: no row has any.
        pieces: hidden states whose logits are in memory at a time.
        backward: whether gradients are wanted.
        progress: called after each layer, forward, and backward where it is trained.

    Raises InputError embeddings_mismatch where a row has more placeholders or fewer than embeddings.
    """
    batch, depth = Batch(model, rows, embeddings), len(model.layers)
    embedding, layers, head = _by_place(model, parameters)
    lowest = depth if not backward else 0 if embedding else next((i for i in range(depth) if layers[i]), depth)
    x = batch.embed(active(parameters))
    mx.eval(x)
    inputs: list[mx.array] = []  # of the layers from the lowest trained one on
    for i in range(depth):
        if i >= lowest:
            inputs.append(x)
        x = batch.layer(i, x, active(parameters))
        mx.eval(x)
        progress()
    hidden = model.norm(x)
    mx.eval(hidden)
    found = piecewise_loss(
        lambda rows, *arrays: model.logits(rows, active(paired(parameters, head, arrays))),
        hidden.reshape(-1, hidden.shape[-1])[batch.rows],
        batch.targets,
        arrays_of(parameters, head),
        pieces=pieces,
        backward=backward,
    )
    loss = found.loss
    if not backward:
        return BatchLoss(loss, len(batch.targets), {}, hidden)
    back = Backward(parameters)
    back.add(head, found.parameters)
    if inputs:
        assert found.hidden is not None
        dx = mx.zeros_like(hidden).reshape(-1, hidden.shape[-1])
        dx[batch.rows] = found.hidden
        back.dx, back.scale = dx.reshape(hidden.shape), found.scale
        back.through(lambda x, pairs: model.norm(x), x, [])
        del found, dx, x
        for i in range(depth - 1, lowest - 1, -1):
            layer = functools.partial(_layer, batch, i)
            back.through(layer, inputs.pop(), layers[i], further=i > lowest or bool(embedding))
            progress()
        if embedding:
            back.through(lambda _, pairs: batch.embed(active(pairs)), None, embedding, further=False)
    return BatchLoss(loss, len(batch.targets), back.sums, hidden)


def _layer(batch: Batch, i: int, x: mx.array, pairs: Parameters) -> mx.array:
    return batch.layer(i, x, active(pairs))


def _by_place(model: Model, parameters: Parameters) -> tuple[list[str], list[list[str]], list[str]]:
    """The names of what is trained: of the table of tokens, of each layer, of the LM head."""
    embedding, head = ([name] if name in parameters else [] for name in (f"{TEXT}embed_tokens.weight", HEAD))
    layers = [[name for name in parameters if name.startswith(f"{TEXT}layers.{i}.")] for i in range(len(model.layers))]
    assert {*embedding, *head}.union(*layers) == set(parameters), "what is trained belongs to the text model"
    return embedding, layers, head


class Backward:
    """The way back: the gradient of the hidden states where it has come to, and the sums of those of parameters."""

    def __init__(self, parameters: Parameters):
        self.parameters = parameters
        self.sums: Gradients = {n: (mx.zeros_like(pair.a), mx.zeros_like(pair.b)) for n, pair in parameters.items()}
        self.dx = mx.zeros(())
        self.scale = 1.0  # that dx has been multiplied by

    def through(
        self, function: Callable[[Any, Parameters], mx.array], x: mx.array | None, names: Sequence[str],
        further: bool = True,
    ) -> None:  # fmt: skip
        """From behind function(x, parameters of these names) to before it. further: whether that gradient is wanted."""
        inputs = [x] if further and x is not None else []

        def traced(*arrays: mx.array) -> list[mx.array]:
            pairs = paired(self.parameters, names, arrays[len(inputs) :])
            return [function(arrays[0] if inputs else x, pairs)]

        for largest in SIZES:
            self._rescale(largest)
            with gradients():
                _, found = mx.vjp(traced, [*inputs, *arrays_of(self.parameters, names)], [self.dx])
            mx.eval(found)
            if self.dx.dtype != mx.float16 or all(mx.isfinite(array).all().item() for array in found):
                break
        if inputs:
            self.dx = found[0]
        self.add(names, found[len(inputs) :])

    def add(self, names: Sequence[str], found: Sequence[mx.array]) -> None:
        """More gradients, of A and of B in turn, of parameters of these names."""
        for i, name in enumerate(names):
            a, b = self.sums[name]
            self.sums[name] = a + found[2 * i] / self.scale, b + found[2 * i + 1] / self.scale
        mx.eval([self.sums[name] for name in names])

    def _rescale(self, wanted: float) -> None:
        """Half precision ends at 6e-8 and 65,504. A power of two changes no digit. wanted: size of the largest."""
        if self.dx.dtype == mx.float16:
            largest = float(mx.abs(self.dx).max())
            if 0 < largest < math.inf:
                factor = 2.0 ** round(math.log2(wanted / largest))
                self.dx = (self.dx.astype(mx.float32) * factor).astype(mx.float16)  # the factor may be no float16
                self.scale *= factor


def arrays_of(parameters: Parameters, names: Sequence[str]) -> list[mx.array]:
    """A and B in turn, of each name."""
    return [array for name in names for array in (parameters[name].a, parameters[name].b)]


def paired(parameters: Parameters, names: Sequence[str], arrays: Sequence[mx.array]) -> dict[str, Pair]:
    """What `arrays_of` took apart, of other arrays, with the scales of the parameters."""
    pairs = zip(names, arrays[::2], arrays[1::2], strict=True)
    return {name: Pair(a, b, parameters[name].scale) for name, a, b in pairs}
