"""The largest magnitudes of the residual stream: whether float16, which ends at 65,504, suits a checkpoint."""

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.checkpoint.float16 import LARGEST
from mlx_qwen35.model.model import Model

CHUNK = 256  # tokens

# Words, figures, code and other scripts, as in prompts. A text of one's own tells more (--text).
TEXT = (
    "The lighthouse keeper wrote down 4,096 ships, and counted them again: 12 + 84 = 96.\n\n"
    "```python\ndef area(r: float) -> float:\n    return 3.14159 * r ** 2  # of a circle\n```\n"
    "Das Wetter war am 3. März kälter als üblich. 今天的天气很好，我们去公园散步。 $\\int_0^1 x^2 dx = 1/3$ "
    '{"name": "Ada", "age": 36, "tags": ["math", "engines"]}\n'
)


def residual_maxima(
    model: Model, tokens: Sequence[int], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[float]:
    """The largest magnitude of the residual stream after each layer, over these tokens; NaN if there is one."""
    cache, chunks = model.make_cache(), []
    for start in range(0, len(tokens), CHUNK):
        chunks.append(_maxima(model, cache, tokens[start : start + CHUNK]))
        progress(min(start + CHUNK, len(tokens)), len(tokens))
    return np.array(mx.stack(chunks).max(0)).tolist()


def _maxima(model: Model, cache: Cache, tokens: Sequence[int]) -> mx.array:
    """(layers,) float32, evaluated."""
    maxima: list[mx.array] = []

    def measure(arrays: list[mx.array]) -> None:
        x, delta, *_ = arrays
        maxima.append(mx.abs(x + delta).max())

    model.hidden(mx.array([list(tokens)]), cache, pace=measure)
    found = mx.stack(maxima).astype(mx.float32)
    mx.eval(found)
    cache.evaluate()
    return found


def describe(maxima: Sequence[float], most: int = 4) -> str:
    """The largest magnitudes, their layers, and their share of float16's range."""
    bad = [i for i, value in enumerate(maxima) if not math.isfinite(value)]
    if bad:
        return f"not finite from layer {bad[0]} on: take --dtype bfloat16 or float32"
    order = sorted(range(len(maxima)), key=lambda i: -maxima[i])[:most]
    listed = ", ".join(f"{maxima[i]:.4g} after layer {i}" for i in order)
    part = max(maxima) / LARGEST
    advice = "float16 has room" if part < 0.25 else "float16 is close to its end: prefer --dtype bfloat16 or float32"
    return f"{listed}; {100 * part:.2g} % of float16's range: {advice}"


def describe_key_norms(model: Model) -> str:
    """The largest magnitude over the median of k_norm's weights (with the 1 of zero-centred ones), by layer."""
    ratios = []
    for i, layer in enumerate(model.layers):
        if layer.mixer_name == "self_attn":
            weights = np.abs(np.array(layer.self_attn.k_norm.weight.astype(mx.float32)))
            ratios.append(f"{weights.max() / np.median(weights):.1f} in layer {i}")
    return f"{', '.join(ratios)}. The larger, the more --kv-rotate spares keys in 4 bit"
