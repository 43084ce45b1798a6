"""How many tokens of a prompt are read at a time: as many as memory and the GPU's watchdog allow.

macOS ends a command buffer that keeps the GPU for some seconds. Reading hands the layers over one by one, at most two
at a time (generate/prefill.py), so a command buffer holds at most one layer, and what is in memory for it is at most
that of two. Both are estimated here, from the launches of a layer and the speed of the chip.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.checkpoint.config import FULL, LINEAR, TextConfig
from mlx_qwen35.kernels.attention import attention_impl, score_bytes, tile_rows
from mlx_qwen35.machine.chip import Chip, CommandBuffers, command_buffers, this_chip
from mlx_qwen35.machine.memory import prefill_room, usable_bytes

LENGTHS = (1024, 512, 256, 128, 64, 32)  # longer ones gain nothing: the weights are read once for 1,024 tokens as it is
SUBMISSION_SECONDS = 1.0  # most that a command buffer may take by the estimate
SUSTAINED = 0.4  # of a chip's peak operations, and of its bandwidth: prompts of 4B models are read at 0.5 to 0.7
LAYERS_IN_FLIGHT = 2  # handed over and not yet finished


class Launch(NamedTuple):
    """One launch, and what MLX counts of it: elements of arrays that no launch before it has named."""

    flops: float
    nbytes: float  # read and written
    elements: float
    kept: float = 0  # elements of keys or values, which the next launches name again


def _product(T: int, columns: int, rows: int) -> Launch:
    """T rows times a matrix in 4 bit; with more bits less goes into one command buffer."""
    stored = rows * columns * 4.5 / 32
    return Launch(2 * T * rows * columns, 4 * stored + 2 * T * (rows + columns), stored + T * rows)


def _pointwise(elements: float) -> Launch:
    return Launch(8 * elements, 6 * elements, elements)


def layer_launches(config: TextConfig, kind: str, T: int, S: int, fused: bool) -> Iterator[Launch]:
    """The launches of one layer that reads T tokens, of a context that then has S, one batch row, in 16 bit."""
    c, D = config, config.hidden_size
    if kind == FULL:
        H, Hk, size, _ = c.attention_heads
        yield _product(T, D, 2 * (H + Hk) * size)
        yield _pointwise(T * (H + Hk) * size)  # norm and rotary
        yield from [_pointwise(T * Hk * size)] * 2  # into the cache
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
    """By launches that write no scores, or by tiles: two products each, and two passes over the scores between them."""
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


def longest_submission(config: TextConfig, T: int, S: int, chip: Chip, buffers: CommandBuffers) -> float:
    """Seconds of the longest command buffer while T tokens are read in a context that then has S, by estimate."""
    return max(
        seconds
        for kind in dict.fromkeys(config.layer_types)
        for fused in (False, True)
        for seconds in _submissions(layer_launches(config, kind, T, S, fused), chip, buffers)
    )


def _submissions(launches: Iterator[Launch], chip: Chip, buffers: CommandBuffers) -> Iterator[float]:
    """Seconds of each command buffer of a layer: MLX ends one behind the launch that goes over either number."""
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
    """Bytes that reading T tokens takes on top of weights and caches: all arrays of the layers in flight, and scores.

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


def chunk_length(
    config: TextConfig,
    S: int,
    room: float,
    itemsize: int,
    impl: str,
    chip: Chip | None = None,
    buffers: CommandBuffers | None = None,
) -> int:
    """How many tokens to read at a time, up to a context of S: the most of LENGTHS that suit memory and GPU.

    Not S alone must suit but all that comes before it, where MLX may end command buffers later, or write scores out
    that it does not at S. So it is never more for a longer context.

    room: bytes that reading may take. itemsize, impl: as for prefill_bytes. chip, buffers: of a Mac; None where no
    watchdog looks on.
    """

    def suits(T: int, S: int) -> bool:
        fits = prefill_bytes(config, T, S, itemsize, impl) <= room
        return fits and (chip is None or longest_submission(config, T, S, chip, buffers) <= SUBMISSION_SECONDS)

    contexts = contexts_up_to(S)
    return next((T for T in LENGTHS if all(suits(T, context) for context in contexts)), LENGTHS[-1])


def contexts_up_to(S: int) -> list[int]:
    """From the longest chunk to S or a little more, each a fifth longer than the one before; the same for every S."""
    steps = max(0, math.ceil(4 * math.log2(S / LENGTHS[0])))
    return [round(LENGTHS[0] * 2 ** (step / 4)) for step in range(steps + 1)]


def suitable_chunk(config: TextConfig, dtype: mx.Dtype, S: int, batch: int = 1) -> int:
    """chunk_length on this machine as it is now, for `batch` rows up to a context of S each.

    Rows share the tokens of a submission: two rows of 512 take what one of 1,024 does.
    """
    limit = usable_bytes()
    room = min(prefill_room(limit), max(0, limit - mx.get_active_memory()))
    chip = this_chip() if backend().watchdog else None
    buffers = command_buffers(chip) if chip else None
    impl = attention_impl(config.head_dim, dtype)
    return max(1, chunk_length(config, S, room, dtype.size, impl, chip, buffers) // batch)
