"""What is trained: which maps have a low-rank part, and its first values."""

import hashlib
import math
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint.adapter import Adapter, Pair
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.checkpoint.names import MTP, TEXT
from mlx_qwen35.checkpoint.shapes import is_matrix, mtp_shapes, text_shapes
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import spelled
from mlx_qwen35.train.options import RANK, TrainOptions

Shapes = Mapping[str, tuple[int, ...]]  # name of a weight -> (out, in); of the table of tokens (V, D)
LAYERS = f"{TEXT}layers."


def trained_shapes(config: TextConfig, options: TrainOptions) -> Shapes:
    """The maps that get a low-rank part, in the order of the data; those of the draft head last.

    A target is a map's name or the end of it from a dot on, as in PEFT. InputError where one matches no map.
    """
    maps = {name: shape for name, shape in text_shapes(config).items() if is_matrix(name, shape)}
    first = max(0, config.num_hidden_layers - (options.layers or config.num_hidden_layers))
    inside = {name: shape for name, shape in maps.items() if name.startswith(LAYERS) and _layer(name) >= first}
    chosen = dict(inside)
    if options.targets is not None:
        outside = {name: shape for name, shape in maps.items() if not name.startswith(LAYERS)}
        offered = outside | inside
        for target in options.targets:
            if not any(_ends(name, target) for name in offered):
                kinds = ", ".join(dict.fromkeys(name.removesuffix(".weight").rsplit(".", 1)[-1] for name in offered))
                raise InputError(
                    "option_invalid", f"each of {spelled('targets')} must be one of this model's maps ({kinds}), or the "
                    f"end of a map's whole name; got {target!r}",
                )  # fmt: skip
        chosen = {name: shape for name, shape in offered.items() if any(_ends(name, own) for own in options.targets)}
    if options.draft_head:
        chosen |= {name: shape for name, shape in mtp_shapes(config).items() if is_matrix(name, shape)}
    return chosen


def _layer(name: str) -> int:
    return int(name.removeprefix(LAYERS).split(".", 1)[0])


def _ends(name: str, target: str) -> bool:
    module = name.removesuffix(".weight")
    return module == target or module.endswith(f".{target}")


def first_values(shapes: Shapes, options: TrainOptions) -> dict[str, Pair]:
    """A uniform within 1 / sqrt(in), as PEFT's, and B zero, float32. A depends on the seed and the map's name alone."""
    rank = options.rank or RANK
    scale = (2.0 * rank if options.alpha is None else options.alpha) / rank
    return {name: Pair(_uniform(name, rank, shape[1], options.seed), mx.zeros((shape[0], rank)), scale)
            for name, shape in shapes.items()}  # fmt: skip


def _uniform(name: str, rank: int, width: int, seed: int) -> mx.array:
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    values = np.random.default_rng(np.frombuffer(key, np.uint32)).random((rank, width), np.float32)
    return mx.array((2 * values - 1) / np.float32(math.sqrt(width)))


def from_adapter(adapter: Adapter, options: TrainOptions) -> dict[str, Pair]:
    """The low-rank parts of an adapter, float32, and with --draft-head first values for a head that it has none for.

    InputError where the adapter holds more than low-rank parts of the text model and the draft head.
    """
    foreign = [name for name in adapter.pairs if not name.startswith((TEXT, "lm_head.", MTP))]
    if adapter.replaced or adapter.magnitudes or foreign:
        what = "whole tensors" if adapter.replaced else "magnitudes (DoRA)" if adapter.magnitudes else foreign[0]
        raise InputError(
            "adapter_unsupported",
            f"{spelled('from_adapter')} must hold low-rank parts of the text model alone; {adapter.path} holds {what}. "
            "Fuse it into the model, and train a new adapter on that",
        )
    return {name: Pair(pair.a.astype(mx.float32), pair.b.astype(mx.float32), pair.scale)
            for name, pair in adapter.pairs.items() if options.draft_head or not name.startswith(MTP)}  # fmt: skip

