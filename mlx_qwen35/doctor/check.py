"""Speed and memory of a model, measured in half a minute."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.checkpoint.names import is_zero_centred
from mlx_qwen35.checkpoint.shapes import is_matrix, text_shapes
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.model.model import Model
from mlx_qwen35.model.weights import Weights
from mlx_qwen35.quantization import Quantization

SECONDS = 10.0  # for prefill, and for decoding
PROMPTS = (32, 64, 128, 256, 512, 1024)
SAMPLE_LAYERS = 4  # of a model with random weights: three of DeltaNet, one of attention
_QUANTIZATION = Quantization(64, 4, "affine")


@dataclass(frozen=True)
class Speed:
    """Seconds of prefill and of a decode step, the LM head apart from the layers, and bytes of memory."""

    prompt: int  # tokens
    prompt_seconds: float
    layers_seconds: float  # of a decode step
    head_seconds: float
    peak_bytes: int
    several: tuple[tuple[float, float], ...] = ()  # layers and head of steps of 2, 3, 4 tokens, as with drafts

    def per_second(self, layers: float = 1.0) -> tuple[float, float]:
        """Tokens per second of prefill and of decoding, for a model with so many times the layers."""
        prompt = self.prompt_seconds * layers + self.head_seconds
        return self.prompt / prompt, 1 / self._step(self.layers_seconds, self.head_seconds, layers)

    def wide(self, layers: float = 1.0) -> list[float]:
        """The time of steps of 2, 3, 4 tokens, in steps of one."""
        one = self._step(self.layers_seconds, self.head_seconds, layers)
        return [self._step(*seconds, layers) / one for seconds in self.several]

    @staticmethod
    def _step(layers_seconds: float, head_seconds: float, layers: float) -> float:
        return layers_seconds * layers + head_seconds


def sample_model(config: TextConfig, dtype: mx.Dtype, memory_limit: int) -> Model:
    """The first layers and the whole LM head of a model of this shape, with random weights in 4 bit."""
    small = replace(config, layer_types=config.layer_types[:SAMPLE_LAYERS])
    keys = iter(mx.random.split(mx.random.key(0), 4 * len(text_shapes(small))))
    arrays = {}
    for name, shape in text_shapes(small).items():
        if is_matrix(name, shape):
            parts, stem = _QUANTIZATION.parts(shape), name.removesuffix("weight")
            arrays[name] = mx.random.randint(0, 1 << 32, parts["weight"], mx.uint32, key=next(keys))
            arrays[f"{stem}scales"] = mx.random.uniform(0.0, 0.004, parts["scales"], dtype, key=next(keys))
            arrays[f"{stem}biases"] = -7.5 * arrays[f"{stem}scales"]
        else:
            centre = 0.0 if is_zero_centred(name) else 1.0
            arrays[name] = (centre + 0.1 * mx.random.normal(shape, key=next(keys))).astype(mx.float32)

    def quantization(name: str) -> Quantization | None:
        return _QUANTIZATION if name.removesuffix("weight") + "scales" in arrays else None

    model = Model(small, Weights(arrays, quantization, dtype, small.rms_norm_eps), memory_limit)
    mx.eval(model.parameters(), model.rotary.frequencies, model.rotary.axes)
    model.eval()
    return model


def measure(
    model: Model, seconds: float = SECONDS, progress: Callable[[int, int], None] = lambda done, total: None
) -> Speed:
    """Prefill longer and longer prompts, decode, and run steps of several tokens, each for about `seconds`.

    progress: called with the seconds so far, and what they will be in all as far as is known: slow steps take longer.
    """
    mx.clear_cache()
    mx.reset_peak_memory()
    start, prompt, elapsed, cache = time.perf_counter(), 0, 0.0, model.make_cache()

    def telling(most: float, later: float) -> Callable[[], None]:
        """For a part that takes `most` seconds, with `later` seconds behind it."""
        begin = time.perf_counter()

        def tick() -> None:
            now = time.perf_counter()
            progress(int(now - start), int(now - start + max(0.0, begin + most - now) + later))

        return tick

    tick = telling(seconds, 2 * seconds)
    for length in PROMPTS:
        tick()
        cache = model.make_cache()
        begin = time.perf_counter()
        step = model.chunk(length)
        prefill(model, cache, PromptRow([i % model.config.vocab_size for i in range(length)]), step)
        prompt, elapsed = length, time.perf_counter() - begin
        if time.perf_counter() - start + 2 * elapsed > seconds:
            break
    layers, head = _decode(model, cache, seconds, telling(seconds, seconds))
    peak, third = mx.get_peak_memory(), seconds / 3
    several = tuple(_decode(model, cache, third, telling(third, (4 - n) * third), n) for n in (2, 3, 4))
    return Speed(prompt, elapsed, layers, head, peak, several)


def _decode(
    model: Model, cache: Cache, seconds: float, tick: Callable[[], None], tokens: int = 1
) -> tuple[float, float]:
    """Median seconds of the layers, and of the LM head, of a step of so many tokens."""
    layers: list[float] = []
    heads: list[float] = []
    start, token = time.perf_counter(), mx.ones((1, tokens), mx.int32)
    while not layers or (len(layers) < 64 and time.perf_counter() - start < seconds):
        begin = time.perf_counter()
        hidden = model.hidden(token, cache, stepwise=tokens > 1)
        mx.eval(hidden)
        middle = time.perf_counter()
        mx.eval(model.logits(hidden, model.active(cache)))
        layers.append(middle - begin)
        heads.append(time.perf_counter() - middle)
        tick()
    return sorted(layers)[len(layers) // 2], sorted(heads)[len(heads) // 2]
