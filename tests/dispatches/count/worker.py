"""The graph of one decoded token of each row: python -m tests.dispatches.count.worker PROGRAM BITS [ROWS [DRAFTS
[RANK ADAPTERS]]], in the root of the repository.

config.json comes on stdin, nodes go to stdout. A third argument is the number of rows. With a fourth from 0 on the
graph is that of a step of our decoding of one row with so many drafts, see draft_step.py. With RANK the rows of our
program have so many adapters of that rank in turn, beside every matrix of the layers.

BITS and nodes are JSON. BITS says how matrices are packed whose name ends so, those not named have 4 bits:
{"linear_attn.out_proj": 8, "linear_attn.in_proj_a": null} is 8 bits, and not packed.

The program believes that it has a GPU, so that it takes its Metal path, and MLX records what it asks for. Nothing is
computed and no weight is in memory: every matrix is one zero, broadcast. Each program is imported after MLX has been
prepared (markers.py), and meets nothing of the others.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import mlx.core as mx
from mlx.utils import tree_map, tree_map_with_path

from . import markers
from .markers import blank

GROUP_SIZE = 64
BITS = 4  # where no other number is given
READ = 3  # tokens in the cache
BOUNDARY = "boundary"  # a marker that says which layer begins


class _Beginning:
    """A module at whose input a layer begins, or what is around the layers."""

    def __init__(self, module: Any):
        self._module = module

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return self._module(markers.marked(BOUNDARY, x, x), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Network(NamedTuple):
    """A program's model. beginnings: where each layer begins, then what is around them; a container and a key each."""

    beginnings: list[tuple[Any, Any]]
    make_cache: Callable[..., Any]  # of our program with the number of rows
    forward: Callable[[mx.array, Any], mx.array]  # tokens (1, T), cache -> logits


def one_token(network: Network, rows: int) -> dict[str, Any]:
    """Record the pass over one token of each row, with a cache that holds READ tokens, to logits and written cache."""
    for container, key in network.beginnings:
        container[key] = _Beginning(container[key])
    cache = network.make_cache(rows) if rows > 1 else network.make_cache()

    def step(tokens: mx.array) -> list[mx.array]:
        logits = network.forward(tokens, cache)
        return [logits, *markers.arrays(cache)]

    markers.record(step, mx.zeros((rows, READ), mx.int32))
    _forget(cache)
    return markers.record(step, mx.zeros((rows, 1), mx.int32))


def _forget(cache: Any) -> None:
    """Put zeros in the place of all arrays of a cache, which were only recorded."""
    seen: set[int] = set()

    def visit(value: Any) -> Any:
        if isinstance(value, mx.array):
            return blank(value.shape, value.dtype)
        if isinstance(value, tuple):
            items = map(visit, value)
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if id(value) in seen:
            return value
        seen.add(id(value))
        if isinstance(value, list):
            value[:] = map(visit, value)
        elif isinstance(value, dict):
            value.update({name: visit(item) for name, item in value.items()})
        else:
            for name, item in getattr(value, "__dict__", {}).items():
                value.__dict__[name] = visit(item)
        return value

    visit(cache)


# --- how matrices are packed -----------------------------------------------------------------------------------------

Bits = dict[str, int | None]  # end of a matrix's name -> bits, None for not packed


def bits_of(name: str, bits: Bits) -> int | None:
    return next((number for end, number in bits.items() if name.endswith(f".{end}")), BITS)


# --- programs --------------------------------------------------------------------------------------------------------


def _hollow(model: Any) -> Any:
    """The model with zeros for weights, not one of them computed."""
    model.update(tree_map(lambda a: blank(a.shape, a.dtype), model.parameters()))
    return model.eval()


def _hollow_peer(model: Any, bits: Bits) -> Any:
    """A peer's fresh model, quantized, with bfloat16 for the rest and float32 A_log, as it loads a checkpoint."""
    from mlx.nn import quantize

    def packing(path: str, module: Any) -> dict[str, int] | bool:
        number = bits_of(path, bits) if hasattr(module, "to_quantized") else None
        return {"group_size": GROUP_SIZE, "bits": number} if number else False

    quantize(model, class_predicate=packing)

    def cast(path: str, a: mx.array) -> mx.array:
        narrow = mx.issubdtype(a.dtype, mx.floating) and not path.endswith("A_log")
        return blank(a.shape, mx.bfloat16 if narrow else a.dtype)

    model.update(tree_map_with_path(cast, model.parameters()))
    return model.eval()


def _our_weights(config: dict[str, Any], bits: Bits, drafts: bool = False) -> tuple[Any, Any]:
    """The text config, and the weights of the text model, with drafts the head's too, as zeros."""
    from mlx_qwen35.checkpoint.config import parse_config
    from mlx_qwen35.checkpoint.names import is_zero_centred
    from mlx_qwen35.checkpoint.shapes import mtp_shapes, text_shapes
    from mlx_qwen35.kernels import fused
    from mlx_qwen35.model import rotary
    from mlx_qwen35.model.weights import Weights
    from mlx_qwen35.quantization import Quantization

    fused.agrees = lambda name, cases: True  # as on a Mac where the kernels agree; nothing is computed here
    rotary.is_exact = lambda config, device: True
    text = parse_config(config).text

    def packing(name: str) -> Quantization | None:
        number = bits_of(name.removesuffix(".weight"), bits)
        return Quantization(GROUP_SIZE, number, "affine") if number else None

    arrays = {}
    for name, shape in (text_shapes(text) | (mtp_shapes(text) if drafts else {})).items():
        if len(shape) == 2 and (packed := packing(name)):
            parts = packed.parts(shape).items()
            stem = name.removesuffix("weight")
            arrays |= {stem + part: blank(s, mx.uint32 if part == "weight" else mx.bfloat16) for part, s in parts}
        else:
            narrow = len(shape) > 1 or is_zero_centred(name) or name.endswith("dt_bias")
            arrays[name] = blank(shape, mx.bfloat16 if narrow else mx.float32)
    return text, Weights(arrays, packing, mx.bfloat16, text.rms_norm_eps)


def _our_model(text: Any, weights: Any) -> Any:
    from mlx_qwen35.model.model import Model

    model = _hollow(Model(text, weights, memory_limit=0))
    mx.eval(model.rotary.frequencies, model.rotary.axes)
    return model


def build_mlx_qwen35(config: dict[str, Any], bits: Bits, rank: int = 0, adapters: int = 1) -> Network:
    """A layer of ours begins at its mixer: the norm before it is one launch with the sum of the layer before."""
    model = _our_model(*_our_weights(config, bits))
    if rank:
        _add_adapters(model, rank, adapters)
    lm_head = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    beginnings = [*((layer, layer.mixer_name) for layer in model.layers), (model, lm_head)]
    return Network(beginnings, lambda rows=1: _of_adapters(model, rows), model)


def _add_adapters(model: Any, rank: int, adapters: int) -> None:
    from mlx_qwen35.checkpoint.adapter import Adapter, Pair
    from mlx_qwen35.checkpoint.shapes import text_shapes

    shapes = {n: s for n, s in text_shapes(model.config).items() if ".layers." in n and len(s) == 2}
    pairs = {
        name: Pair(blank((rank, width), model.dtype), blank((out, rank), model.dtype), 1.0)
        for name, (out, width) in shapes.items()
    }
    for number in range(adapters):
        model.adapters.add(f"adapter {number}", Adapter(Path(), "peft", pairs))
    model.adapters.stack(model)


def _of_adapters(model: Any, rows: int) -> Any:
    """A cache of rows that have the loaded adapters in turn."""
    cache = model.make_cache(rows)
    if names := model.adapters.names:
        cache.adapters = tuple(names[row % len(names)] for row in range(rows))
    return cache


def draft_step(config: dict[str, Any], bits: Bits, depth: int) -> dict[str, Any]:
    """Record a step of our decoding with so many drafts, to its tokens and the memory it leaves."""
    text, weights = _our_weights(config, bits, drafts=True)
    from mlx_qwen35.model.mtp import MultiTokenPrediction

    from .draft_step import record_step

    return record_step(
        _our_model(text, weights), _hollow(MultiTokenPrediction(text, weights.at("mtp"))), depth, _forget
    )


def _peer_beginnings(model: Any) -> list[tuple[Any, Any]]:
    return [*((model.layers, i) for i in range(len(model.layers))), (model, "norm")]


def build_mlx_lm(config: dict[str, Any], bits: Bits) -> Network:
    from mlx_lm.models.qwen3_5 import Model, ModelArgs

    model = _hollow_peer(Model(ModelArgs.from_dict(config)), bits)
    text = model.language_model
    return Network(_peer_beginnings(text.model), text.make_cache, lambda tokens, cache: text(tokens, cache=cache))


def build_mlx_vlm(config: dict[str, Any], bits: Bits) -> Network:
    from mlx_vlm.models.qwen3_5 import LanguageModel, ModelConfig, TextConfig

    settings = ModelConfig.from_dict(config)
    text = config["text_config"]
    text = _hollow_peer(LanguageModel(TextConfig.from_dict(text), settings), bits)

    def forward(tokens: mx.array, cache: Any) -> mx.array:
        logits = text(tokens, cache=cache).logits
        for name in ("_position_ids", "_rope_deltas"):
            value = getattr(text, name)
            setattr(text, name, None if value is None else blank(value.shape, value.dtype))
        return logits

    return Network(_peer_beginnings(text.model), text.make_cache, forward)


BUILDERS = {"mlx_qwen35": build_mlx_qwen35, "mlx-lm": build_mlx_lm, "mlx-vlm": build_mlx_vlm}


def serve(name: str, bits: Bits, rows: int, depth: int, beside: list[int], config: TextIO, replies: TextIO) -> None:
    given = json.load(config)
    with markers.prepared():
        nodes = one_token(BUILDERS[name](given, bits, *beside), rows) if depth < 0 else draft_step(given, bits, depth)
    json.dump(nodes, replies)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between
    name, bits, *numbers = sys.argv[1:]
    rows, depth, *beside = [*map(int, numbers), *[1, -1][len(numbers) :]]
    serve(name, json.loads(bits), rows, depth, beside, sys.stdin, replies)
    replies.close()


if __name__ == "__main__":
    main()
