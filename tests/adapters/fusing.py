"""A model with an adapter fused into its weights, in float32: what the tests of reading compare with the programs."""

from dataclasses import replace

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter import Adapter, fused
from mlx_qwen35.checkpoint.arrays import lazy_arrays
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.names import HEAD, TABLE
from mlx_qwen35.checkpoint.shapes import Shapes, text_shapes, vision_shapes
from mlx_qwen35.model.model import Model
from mlx_qwen35.model.vision import VisionEncoder
from mlx_qwen35.model.weights import Weights

LIMIT = 1 << 30  # bytes


def _weights(checkpoint: Checkpoint, adapter: Adapter, shapes: Shapes) -> Weights:
    arrays = {}
    for name in shapes:
        stored = TABLE if name == HEAD and name not in checkpoint.entries else name
        own = adapter.replaced.get(name)
        weight = lazy_arrays(checkpoint, [stored])[stored] if own is None else own
        arrays[name] = fused(weight, adapter.pairs.get(name), adapter.magnitudes.get(name))
    return Weights(arrays, lambda name: None, mx.float32, checkpoint.config.text.rms_norm_eps)


def fused_model(checkpoint: Checkpoint, adapter: Adapter) -> Model:
    """The text model in which every weight is what the adapter makes of it; untied where the adapter unties it."""
    text = checkpoint.config.text
    config = replace(text, tie_word_embeddings=text.tie_word_embeddings and not adapter.unties)
    model = Model(config, _weights(checkpoint, adapter, text_shapes(config)), LIMIT)
    return model.eval()


def fused_encoder(checkpoint: Checkpoint, adapter: Adapter) -> VisionEncoder:
    """The vision encoder in which every weight is what the adapter makes of it."""
    assert checkpoint.config.vision
    shapes = vision_shapes(checkpoint.config.vision)
    return VisionEncoder(checkpoint.config.vision, _weights(checkpoint, adapter, shapes), LIMIT)
