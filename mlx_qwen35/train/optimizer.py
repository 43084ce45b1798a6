"""A step of the optimizer: mlx.optimizers over low-rank parts, as a function that changes nothing."""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx.utils import tree_map

from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.train.options import TrainOptions

Gradients = Mapping[str, tuple[mx.array, mx.array]]  # of A and B
Moments = Mapping[str, Any]  # name of a map -> "a" and "b" -> what the optimizer keeps of it, by name


def learning_rate(options: TrainOptions, step: int, steps: int) -> float:
    """Of step 1 to `steps`. Warmup rises in a line; then the schedule falls, and would be 0 at `steps` + 1."""
    if step <= options.warmup:
        return options.learning_rate * step / (options.warmup + 1)
    done = (step - options.warmup - 1) / max(1, steps - options.warmup)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[options.schedule]
    return options.learning_rate * share


def norm(gradients: Gradients) -> float:
    """The length of all gradients as one vector."""
    squares = [mx.sum(array * array) for pair in gradients.values() for array in pair]
    return math.sqrt(float(mx.sum(mx.stack(squares)))) if squares else 0.0


def updated(
    options: TrainOptions,
    rate: float,
    step: int,
    parameters: Mapping[str, Pair],
    gradients: Gradients,
    moments: Moments,
) -> tuple[dict[str, Pair], Moments]:
    """The parameters and moments behind step `step`, from 1 on, evaluated; all that is given stays as it is.

    gradients: of the mean, clipped; parameters without any stay the same. moments: of the step before; empty before
    the first.
    """
    optimizer = _optimizer(options, rate)
    count = mx.array(step - 1, mx.uint64)
    optimizer.state = tree_map(lambda array: array, dict(moments)) | {"step": count, "learning_rate": mx.array(rate)}
    new = optimizer.apply_gradients(
        {name: {"a": a, "b": b} for name, (a, b) in gradients.items()},
        {name: {"a": pair.a, "b": pair.b} for name, pair in parameters.items()},
    )
    kept = {name: optimizer.state[name] for name in gradients}
    mx.eval(new, kept)
    made = {name: Pair(own["a"], own["b"], parameters[name].scale) for name, own in new.items()}
    return {**parameters, **made}, {**moments, **kept}


def _optimizer(options: TrainOptions, rate: float) -> optimizers.Optimizer:
    decay = options.weight_decay
    match options.optimizer:
        case "adamw":
            return optimizers.AdamW(rate, weight_decay=decay, bias_correction=True)
        case "adam":
            return optimizers.Adam(rate, bias_correction=True)
        case "sgd":
            return optimizers.SGD(rate, momentum=0.9, weight_decay=decay)
        case "adafactor":
            return optimizers.Adafactor(rate, relative_step=False, scale_parameter=False, weight_decay=decay)
        case _:
            return optimizers.Muon(rate, weight_decay=decay)
