"""The chunk of a prefill: as many tokens at a time as memory and the GPU's watchdog allow.

macOS ends a command buffer that keeps the GPU for some seconds. Prefill submits the layers one by one, at most two at a
time (model/pace.py). So a command buffer holds at most one layer, and memory the arrays of at most two. Both are
estimated here, from the launches of a layer and the speed of the chip.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.cache.kv_format import UNQUANTIZED, KVFormat
from mlx_qwen35.checkpoint.config import FULL, LINEAR, TextConfig
from mlx_qwen35.kernels.attention import attention_impl, score_bytes, tile_rows
from mlx_qwen35.machine.chip import Chip, CommandBuffers, command_buffers, this_chip
from mlx_qwen35.machine.memory import prefill_room

LENGTHS = (1024, 512, 256, 128, 64, 32)  # longer ones gain nothing: the weights are read once for 1,024 tokens as it is
SUBMISSION_SECONDS = 1.0  # most that a command buffer may take by the estimate
SUSTAINED = 0.4  # of a chip's peak operations, and of its bandwidth: prefill of 4B models reaches 0.5 to 0.7
LAYERS_IN_FLIGHT = 2  # submitted and not yet finished


class Launch(NamedTuple):
    """One launch. MLX counts the elements of arrays that no earlier launch of the command buffer has named."""

    flops: float
    nbytes: float  # read and written
    elements: float
    kept: float = 0  # elements of keys or values, which the next launches name again


def _product(T: int, columns: int, rows: int) -> Launch:
    """T rows times a 4-bit matrix. Fewer launches with more bits fit into one command buffer."""
    stored = rows * columns * 4.5 / 32
    return Launch(2 * T * rows * columns, 4 * stored + 2 * T * (rows + columns), stored + T * rows)


def _pointwise(elements: float) -> Launch:
    return Launch(8 * elements, 6 * elements, elements)


def layer_launches(
    config: TextConfig, kind: str, T: int, S: int, fused: bool, kv: KVFormat = UNQUANTIZED
) -> Iterator[Launch]:
    """The launches of one layer over the last T of S tokens: one batch row, 16-bit activations."""
    c, D = config, config.hidden_size
    if kind == FULL:
        H, Hk, size, _ = c.attention_heads
        yield _product(T, D, 2 * (H + Hk) * size)
        yield _pointwise(T * (H + Hk) * size)  # norm and rotary
        yield from [_pointwise(T * Hk * size)] * 2  # into the cache
        if kv.quantized:
            yield from [_pointwise(S * Hk * size)] * 2  # out of it
        yield from _attention_launches(H, Hk, size, T, S, fused)
        yield _pointwise(T * H * size)  # gate
        yield _product(T, H * size, D)
    else:
        Hv, Dk, Dv = c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim
        width = c.conv_dim + c.value_dim + 2 * Hv
        yield _product(T, D, width)
        yield Launch(8 * T * Hv * Dk * Dv, 4 * T * width, T * c.value_dim)
        yield _product(T, c.value_dim, D)
    yield _pointwise(2 * T * D)
    yield _product(T, D, 2 * c.intermediate_size)
    yield _pointwise(T * c.intermediate_size)
    yield _product(T, c.intermediate_size, D)
    yield _pointwise(2 * T * D)


def _attention_launches(H: int, Hk: int, size: int, T: int, S: int, fused: bool) -> Iterator[Launch]:
    """Fused launches write no scores. A tile takes two products, and two passes over its scores between them."""
    rows = min(T, tile_rows((1, H, T, size), S, fused))
    keys = S * Hk * size
    for start in range(0, T, rows):
        n = min(rows, T - start)
        scores = n * H * S
        if fused:
            yield Launch(4 * scores * size, 4 * keys, n * H * size, 2 * keys)
            continue
        yield Launch(2 * scores * size, 2 * (scores + keys), scores, keys)
        yield from [_pointwise(scores)] * 2
        yield Launch(2 * scores * size, 2 * (scores + keys), n * H * size, 2 * keys)


def longest_submission(
    config: TextConfig, T: int, S: int, chip: Chip, buffers: CommandBuffers, kv: KVFormat = UNQUANTIZED
) -> float:
    """Estimated seconds of the longest command buffer while the last T of S tokens are prefilled."""
    return max(
        seconds
        for kind in dict.fromkeys(config.layer_types)
        for fused in (False, True)
        for seconds in _submissions(layer_launches(config, kind, T, S, fused, kv), chip, buffers)
    )


def _submissions(launches: Iterator[Launch], chip: Chip, buffers: CommandBuffers) -> Iterator[float]:
    """Seconds of each command buffer of a layer. MLX ends one behind the launch that exceeds either limit."""
    seconds = operations = elements = kept = 0.0
    for launch in launches:
        seconds += max(launch.flops / chip.flops, launch.nbytes / chip.bandwidth) / SUSTAINED
        operations += 1
        elements += launch.elements
        kept = max(kept, launch.kept)
        if operations > buffers.operations or (elements + kept) / 2**20 >= buffers.megabytes + 1:
            yield seconds
            seconds = operations = elements = kept = 0.0
    yield seconds


def prefill_bytes(config: TextConfig, T: int, S: int, itemsize: int, impl: str) -> int:
    """Bytes that prefill of T tokens takes beside weights and caches: all arrays of the layers in flight, and scores.

    itemsize: bytes of an activation. impl: see `attention_impl`.
    """
    D, value, (H, Hk, size, _) = config.hidden_size, config.value_dim, config.attention_heads
    mlp = 3 * config.intermediate_size + 4 * D  # gate, up and their product; two sums and their norms
    mixers = {
        LINEAR: config.conv_dim + 2 * value + 2 * config.linear_num_value_heads,
        FULL: 4 * H * size + 3 * Hk * size,
    }
    widest = mlp + max(mixers[kind] for kind in config.layer_types)
    scores = score_bytes((1, H, T, size), S, itemsize, impl) if FULL in config.layer_types else 0
    return LAYERS_IN_FLIGHT * T * widest * itemsize + scores


def unpacked_bytes(config: TextConfig, itemsize: int, kv: KVFormat, impl: str) -> int:
    """Bytes of a token's key and value in one layer, dequantized: of two layers in flight one has attention.

    Prefill takes them beside `prefill_bytes`, however many tokens a chunk has. On the CPU operations dequantize one of
    the two after the other, through an array of 32 bits an element. impl: as for `prefill_bytes`.
    """
    if not kv.quantized or FULL not in config.layer_types:
        return 0
    _, Hk, size, _ = config.attention_heads
    return Hk * size * (2 * itemsize + 4 * (impl == "cpu"))


def chunk_length(
    config: TextConfig,
    S: int,
    room: float,
    itemsize: int,
    impl: str,
    chip: Chip | None = None,
    buffers: CommandBuffers | None = None,
    kv: KVFormat = UNQUANTIZED,
) -> int:
    """Tokens of a chunk up to a context of S: the largest of LENGTHS that suits memory and GPU.

    It must suit every shorter context too, where MLX may end command buffers later, or write scores that it does not
    write at S. So a longer context never has a longer chunk.

    room: bytes that prefill may take. itemsize, impl: as for prefill_bytes. chip, buffers: of a Mac; None without a
    watchdog.
    """

    def suits(T: int, S: int) -> bool:
        if prefill_bytes(config, T, S, itemsize, impl) > room:
            return False
        return not (chip and buffers) or longest_submission(config, T, S, chip, buffers, kv) <= SUBMISSION_SECONDS

    contexts = contexts_up_to(S)
    return next((T for T in LENGTHS if all(suits(T, context) for context in contexts)), LENGTHS[-1])


def contexts_up_to(S: int) -> list[int]:
    """Contexts from the longest chunk to S or a little more, each a fifth longer than the one before."""
    steps = max(0, math.ceil(4 * math.log2(S / LENGTHS[0])))
    return [round(LENGTHS[0] * 2 ** (step / 4)) for step in range(steps + 1)]


def suitable_chunk(config: TextConfig, dtype: mx.Dtype, limit: int, S: int, kv: KVFormat = UNQUANTIZED) -> int:
    """chunk_length on this machine in its present state. limit: bytes that the model may take."""
    room = min(prefill_room(limit), max(0, limit - mx.get_active_memory()))
    chip = this_chip() if backend().watchdog else None
    buffers = command_buffers(chip) if chip else None
    impl = attention_impl(config.head_dim, dtype)
    return chunk_length(config, S, room, dtype.size, impl, chip, buffers, kv)
