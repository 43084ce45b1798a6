"""What is trained: which maps have a low-rank part, and its first values."""

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint.adapter import Adapter, Pair
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.checkpoint.names import HEAD, MTP, TABLE, TEXT
from mlx_qwen35.checkpoint.shapes import is_matrix, mtp_shapes, text_shapes
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import spelled
from mlx_qwen35.train.options import RANK, TrainOptions

LAYERS = f"{TEXT}layers."


class Part(NamedTuple):
    """The size of a low-rank part beside a weight (out, width); of the table of tokens (V, D)."""

    out: int
    width: int
    rank: int

    @property
    def numbers(self) -> int:
        """Of A and B together."""
        return self.rank * (self.out + self.width)


Parts = Mapping[str, Part]  # by the weight's Hugging Face name


def trained_parts(config: TextConfig, options: TrainOptions, begin: Adapter | None) -> Parts:
    """What is trained, in the order of the data, the draft head's parts last. begin: an adapter whose parts these are.

    A target is the name of a map or its end from a dot on, as in PEFT. InputError where one is no map's, and where the
    adapter holds what cannot be trained.
    """
    rank = options.rank or RANK
    chosen = _chosen(config, options) if begin is None else _of_adapter(options, begin)
    head = mtp_shapes(config) if options.draft_head else {}
    return chosen | {name: Part(shape[0], shape[1], rank) for name, shape in head.items()
                     if is_matrix(name, shape) and name not in chosen}  # fmt: skip


def _chosen(config: TextConfig, options: TrainOptions) -> dict[str, Part]:
    shapes = text_shapes(config)
    shapes.setdefault(HEAD, shapes[TABLE])  # a tied head has a low-rank part of its own, as in PEFT
    maps = {name: shape for name, shape in shapes.items() if is_matrix(name, shape)}
    depth = config.num_hidden_layers
    if options.layers is not None and options.layers > depth:
        raise InputError(
            "option_invalid",
            f"{spelled('layers')} must be 1 to {depth}, the layers of this model; got {options.layers}",
        )
    first = depth - (options.layers or depth)
    offered = {name: shape for name, shape in maps.items() if not name.startswith(LAYERS) or _layer(name) >= first}
    targets = options.targets
    for target in targets or ():
        if not any(_ends(name, target) for name in offered):
            kinds = ", ".join(dict.fromkeys(name.removesuffix(".weight").rsplit(".", 1)[-1] for name in offered))
            raise InputError(
                "option_invalid",
                f"each of {spelled('targets')} must be a map that this model has there ({kinds}), or the end of a "
                f"map's whole name; got {target!r}",
            )
    wanted = [name for name in offered if name.startswith(LAYERS)]
    if targets is not None:
        wanted = [name for name in offered if any(_ends(name, target) for target in targets)]
    return {name: Part(offered[name][0], offered[name][1], options.rank or RANK) for name in wanted}


def _layer(name: str) -> int:
    return int(name.removeprefix(LAYERS).split(".", 1)[0])


def _ends(name: str, target: str) -> bool:
    return f".{name.removesuffix('.weight')}".endswith(f".{target}")


def _of_adapter(options: TrainOptions, adapter: Adapter) -> dict[str, Part]:
    foreign = [name for name in adapter.pairs if not name.startswith((TEXT, HEAD, MTP))]
    if adapter.replaced or adapter.magnitudes or foreign:
        what = "whole tensors" if adapter.replaced else "magnitudes (DoRA)" if adapter.magnitudes else foreign[0]
        raise InputError(
            "adapter_unsupported",
            f"{spelled('from_adapter')} must hold low-rank parts of the text model alone; {adapter.path} holds {what}. "
            "Fuse it into the model, and train a new adapter on that",
        )
    return {name: Part(len(pair.b), pair.a.shape[1], len(pair.a)) for name, pair in adapter.pairs.items()
            if options.draft_head or not name.startswith(MTP)}  # fmt: skip


def first_values(parts: Parts, options: TrainOptions, begin: Adapter | None) -> dict[str, Pair]:
    """The adapter's values, or A uniform within 1 / sqrt(width), as PEFT has it, and B zero; float32.

    A first A depends on the seed and the map's name alone.
    """
    alpha = options.alpha
    given = begin.pairs if begin else {}
    made = {}
    for name, (out, width, rank) in parts.items():
        if name in given:
            a, b, scale = given[name]
            made[name] = Pair(a.astype(mx.float32), b.astype(mx.float32), scale)
        else:
            scale = 2.0 if alpha is None else alpha / rank
            made[name] = Pair(_uniform(name, rank, width, options.seed), mx.zeros((out, rank)), scale)
    return made


def _uniform(name: str, rank: int, width: int, seed: int) -> mx.array:
    key, bound = hashlib.sha256(f"{seed} {name}".encode()).digest(), 1 / math.sqrt(width)
    # RandomState: numpy promises that its numbers never change (NEP 19), of Generator it does not.
    values = np.random.RandomState(np.frombuffer(key, "<u4")).uniform(-bound, bound, (rank, width))
    return mx.array(values.astype(np.float32))
