"""The memory plan of a model, from a checkpoint's headers. Loading and generating keep to it.

GB are 10^9 bytes. MLX's own limit makes an allocation wait, but never refuses one: the plan does.
"""

import bisect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.budget.adapters import adapter_bytes
from mlx_qwen35.budget.chunk import chunk_length, contexts_up_to, prefill_bytes, unpacked_bytes
from mlx_qwen35.budget.encoding import working_bytes
from mlx_qwen35.cache.kv_format import UNQUANTIZED, KVFormat
from mlx_qwen35.cache.layer import KVCache
from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.config import FULL, LINEAR, TextConfig
from mlx_qwen35.checkpoint.converted import to_4bit
from mlx_qwen35.checkpoint.names import TEXT, VISION, takes_dtype
from mlx_qwen35.checkpoint.shapes import mtp_shapes, text_shapes, vision_shapes
from mlx_qwen35.checkpoint.tensors import DTYPE_BYTES
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.attention import attention_impl
from mlx_qwen35.kernels.cpu import UNPACKED
from mlx_qwen35.machine.chip import TUNED, Chip, CommandBuffers, command_buffers, parse_chip, this_chip
from mlx_qwen35.machine.memory import buffer_bytes, prefill_room

SAMPLING_ARRAYS = 8  # float32, of the vocabulary's size, while a token is sampled
WORKING_SET = 2 / 3  # of a Mac's memory: what macOS recommends for the GPU up to 32 GB
PACKED = 1 / 3.3  # of the bytes of 16-bit weights: what the recipe 4bit leaves of them
SHORT = 256  # tokens of the shortest useful context
PIXELS = 1 << 20  # of the image that is planned for


@dataclass(frozen=True)
class Machine:
    """The machine that a plan is made for, and the forms of what it computes. attention_impl: see that function."""

    name: str
    limit: int  # bytes for a model
    dtype: mx.Dtype  # of activations and unquantized weights
    attention_impl: str
    chip: Chip | None = None
    buffers: CommandBuffers | None = None
    kv: KVFormat = UNQUANTIZED

    @property
    def on_cpu(self) -> bool:
        return self.attention_impl == "cpu"

    @property
    def kept(self) -> int:
        """Bytes of freed buffers that MLX keeps. On the CPU it keeps none."""
        return 0 if self.on_cpu else buffer_bytes(self.limit)


def this_machine(config: TextConfig, dtype: mx.Dtype, limit: int, kv: KVFormat = UNQUANTIZED) -> Machine:
    """limit: bytes that the model may take."""
    chip = this_chip() if backend().watchdog else None
    buffers = command_buffers(chip) if chip else None
    return Machine("this machine", limit, dtype, attention_impl(config.head_dim, dtype), chip, buffers, kv)


def mac(gigabytes: float, dtype: mx.Dtype = mx.float16, kv: KVFormat = UNQUANTIZED, chip: str = "M1") -> Machine:
    """A Mac with `gigabytes` of memory. chip: as "M2 Max"; its command buffers are those of M1 to M4."""
    return Machine(
        f"{chip}, {gigabytes:g} GB", int(WORKING_SET * gigabytes * 2**30), dtype, "fused", parse_chip(f"Apple {chip}"),
        CommandBuffers(*TUNED.values()), kv,
    )  # fmt: skip


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part of one conversation, and the tokens of a chunk of its prefill."""

    machine: Machine
    context: int
    chunk: int
    weights: int
    drafts: int  # of the draft head (MTP), where it is on
    adapters: int  # their low-rank parts, all of them
    kv: int
    state: int  # DeltaNet's, before a chunk and after it; with drafts, after each token of a step
    prefill: int
    sampling: int
    growth: int  # of the largest array of keys or values, which memory holds twice while it grows
    buffers: int  # freed ones, which MLX keeps
    vision_encoder: int
    encoding: int  # of an image, beside the vision encoder

    @property
    def working(self) -> int:
        """What a pass takes at most, of a prompt or of its answer."""
        return max(self.prefill, self.sampling + self.growth)

    @property
    def text(self) -> int:
        """The peak of a prompt of text and its answer."""
        return self._loaded + self.kv + self.state + self.working + self.buffers

    @property
    def image(self) -> int:
        """The peak of a first turn with an image, which is encoded before there are keys and values."""
        encoding = self.vision_encoder + self.encoding
        return max(self.text, self._loaded + self.state // 2 + encoding + self.buffers)

    @property
    def _loaded(self) -> int:
        return self.weights + self.drafts + self.adapters

    @property
    def fits(self) -> bool:
        return self.text <= self.machine.limit


def plan_memory(
    checkpoint: Checkpoint,
    machine: Machine,
    context: int,
    *,
    pixels: int = 0,
    chunk: int | None = None,
    mtp: int = 0,
    adapters: Sequence[Adapter] = (),
    held: TextConfig | None = None,
) -> MemoryPlan:
    """The plan of one conversation up to `context` tokens.

    pixels: height x width of an image in it. chunk: tokens of a chunk; None: by the machine. mtp: how many tokens are
    drafted at a time; 0: the draft head is not loaded. adapters: all that are loaded. A checkpoint counts their whole
    tensors, see `Checkpoint.replacing`. held: of caches and logits beside a part of a model, see `Share.planned`; None:
    as of the checkpoint.
    """
    text, size = checkpoint.config.text, machine.dtype.size
    held = held or text
    encoder = encoding = 0
    vision = checkpoint.config.vision
    if pixels and vision is not None and checkpoint.has(VISION):
        encoder = loaded_bytes(checkpoint, names(checkpoint, vision_shapes(vision)), machine.dtype)
        patches = -(-pixels // vision.patch_size**2)
        encoding = working_bytes(vision, machine.dtype, patches, machine.attention_impl)
        encoding += patches // vision.spatial_merge_size**2 * vision.out_hidden_size * size
    if chunk is None:
        room = prefill_room(machine.limit)
        chunk = chunk_length(
            held, context, room, size, machine.attention_impl, machine.chip, machine.buffers, machine.kv
        )
    return MemoryPlan(
        machine, context, chunk,
        weights=loaded_bytes(checkpoint, names(checkpoint, text_shapes(text)), machine.dtype),
        drafts=loaded_bytes(checkpoint, names(checkpoint, mtp_shapes(text)) if mtp else [], machine.dtype),
        adapters=adapter_bytes(checkpoint, adapters, machine.dtype, joined=not machine.on_cpu),
        state=2 * (1 + mtp) * state_bytes(held, size),
        sampling=SAMPLING_ARRAYS * 4 * held.vocab_size, buffers=machine.kept,
        vision_encoder=encoder, encoding=encoding,
        **_of_context(held, machine, context, chunk, mtp, unpacks(checkpoint)),
    )  # fmt: skip


def _of_context(
    held: TextConfig, machine: Machine, context: int, chunk: int, mtp: int, quantized: bool
) -> dict[str, Any]:  # fmt: skip
    """The parts of a plan that depend on the context."""
    size = machine.dtype.size
    return {
        "kv": kv_bytes(held, context, size, held.mtp_num_hidden_layers if mtp else 0, machine.kv),
        "prefill": most_prefill_bytes(held, machine, context, chunk, quantized and machine.on_cpu),
        "growth": growth_bytes(held, context, size, machine.kv),
    }


def unpacks(checkpoint: Checkpoint) -> bool:
    """Whether the matrices of its layers are quantized, so that a CPU dequantizes them in a prefill."""
    return bool(checkpoint.quantization(f"{TEXT}layers.0.mlp.gate_proj.weight"))


def longest_context(
    checkpoint: Checkpoint, plan: MemoryPlan, kv: KVFormat, mtp: int = 0, held: TextConfig | None = None
) -> int:
    """The most tokens, in steps of 1,024, of a conversation that fits the machine of a plan, in chunks as the plan's.

    kv: the form of its keys and values, instead of the plan's. mtp, held: as for `plan_memory`.
    """
    machine, text, quantized = replace(plan.machine, kv=kv), held or checkpoint.config.text, unpacks(checkpoint)
    contexts = range(1024, text.max_position_embeddings + 1, 1024)

    def too_long(context: int) -> bool:
        return not replace(plan, **_of_context(text, machine, context, plan.chunk, mtp, quantized)).fits

    return 1024 * bisect.bisect_left(contexts, True, key=too_long)


def names(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The names in the folder of the tensors of these shapes, if they are there."""
    return [name for name, _ in checkpoint.part(shapes) if name in checkpoint.entries]


def loaded_bytes(checkpoint: Checkpoint, tensors: list[str], dtype: mx.Dtype) -> int:
    """Bytes of these tensors in memory: quantized ones as on disk, the rest in dtype, or in float32 if they stay so.

    The tensors of a file with float64 are all in float32 before the first is cast.
    """
    total = 0
    for name in tensors:
        entry = checkpoint.entries[name]
        if entry.dtype.startswith("U"):
            total += entry.nbytes
        else:
            cast = takes_dtype(name) and (entry.lazy or entry.partial)
            total += entry.nbytes // DTYPE_BYTES[entry.dtype] * (dtype.size if cast else 4)
    return total


def kv_bytes(
    config: TextConfig, context: int, itemsize: int, drafting_layers: int = 0, kv: KVFormat = UNQUANTIZED
) -> int:
    """Bytes of the keys and values of `context` tokens, one row, rounded up to the steps in which a cache grows."""
    _, Hk, D, _ = config.attention_heads
    return (config.layer_types.count(FULL) + drafting_layers) * _columns(context) * Hk * kv.nbytes(D, itemsize)


def growth_bytes(config: TextConfig, context: int, itemsize: int, kv: KVFormat = UNQUANTIZED) -> int:
    """Bytes of the largest array of the keys and values of `context` tokens."""
    _, Hk, D, _ = config.attention_heads
    return _columns(context) * Hk * kv.widest(D, itemsize) if FULL in config.layer_types else 0


def _columns(context: int) -> int:
    return -(-context // KVCache.STEP) * KVCache.STEP


def state_bytes(config: TextConfig, itemsize: int) -> int:
    """Bytes of the recurrent and conv states of all DeltaNet layers, one row."""
    _, Hv, Dk, Dv, K = config.delta_heads
    return config.layer_types.count(LINEAR) * (4 * Hv * Dv * Dk + (K - 1) * config.conv_dim * itemsize)


def most_prefill_bytes(text: TextConfig, machine: Machine, context: int, chunk: int, quantized: bool) -> int:
    """The most bytes that prefill takes up to this context. On the CPU it dequantizes quantized matrices."""
    size = machine.dtype.size
    contexts = [*(S for S in contexts_up_to(context) if context > S), context]
    most = max(prefill_bytes(text, min(chunk, S), S, size, machine.attention_impl) for S in contexts)
    most += _columns(context) * unpacked_bytes(text, size, machine.kv, machine.attention_impl)
    return most + (4 * 4 * min(UNPACKED, text.intermediate_size * text.hidden_size) if quantized else 0)


# --- the guard -------------------------------------------------------------------------------------------------------


def check_model_fits(
    checkpoint: Checkpoint, dtype: mx.Dtype, limit: int, name: str, adapters: Sequence[Adapter] = (),
    held: TextConfig | None = None,
) -> None:  # fmt: skip
    """Refuse a model without room for even a short context, before its weights are read. The message says what fits.

    adapters, held: as for `plan_memory`.
    """
    text = checkpoint.config.text
    plan = plan_memory(checkpoint, this_machine(text, dtype, limit), SHORT, adapters=adapters, held=held)
    if plan.fits:
        return
    need = f"{name} needs {in_gb(plan.text)}, of which {in_gb(plan.weights)} are its text weights"
    need += f", and {in_gb(plan.adapters)} adapters" if plan.adapters else ""
    has = f"a model may take {in_gb(plan.machine.limit)}"
    fits_packed = plan.text - plan.weights * (1 - PACKED) <= plan.machine.limit
    if checkpoint.raw and not checkpoint.config.quantization and fits_packed:
        way = f"Convert it to 4 bit, about 3 times smaller:\n  {to_4bit(name)}"
        raise InputError("memory_exceeded", f"{need}; {has}", way)
    way = "Choose a folder with fewer bits, or a smaller model of the family"
    raise InputError("memory_exceeded", f"{need}; {has}", way)


def in_gb(count: float) -> str:
    """3.1 GB, of small models 0.0031 GB."""
    return f"{count / 1e9:.{1 if count >= 1e8 else 4}f} GB"


def check_vision_encoder_fits(config: TextConfig, dtype: mx.Dtype, limit: int, encoder_bytes: int) -> None:
    """Refuse to load a vision encoder that has no room beside the model, before its weights are read."""
    machine, used = this_machine(config, dtype, limit), mx.get_active_memory()
    if used + encoder_bytes + machine.kept > machine.limit:
        raise InputError(
            "memory_exceeded",
            f"the vision encoder needs {in_gb(encoder_bytes)}; a model may take {in_gb(machine.limit)}, of "
            f"which {in_gb(used)} are in use. Choose a folder with fewer bits, or shorten the conversation",
        )


def most_depth(config: TextConfig, dtype: mx.Dtype, limit: int, head_bytes: int, rows: int, depth: int) -> int:
    """How many tokens, up to `depth`, may be drafted at a time in the free memory; 0: there is no room for drafts.

    limit: bytes that the model may take. head_bytes: of the draft head; 0 once it is loaded.
    """
    machine = this_machine(config, dtype, limit)
    once = prefill_room(machine.limit) + rows * SAMPLING_ARRAYS * 4 * config.vocab_size + machine.kept
    once += rows * kv_bytes(config, SHORT, dtype.size, config.mtp_num_hidden_layers)
    free = machine.limit - mx.get_active_memory() - once - head_bytes
    fitting = (n for n in range(depth, 0, -1) if rows * 2 * (1 + n) * state_bytes(config, dtype.size) <= free)
    return next(fitting, 0)


def most_tokens(
    config: TextConfig, machine: Machine, chunk: int, cached: Sequence[int], depth: int = 0, head_bytes: int = 0
) -> int:
    """How many tokens the caches of several rows may grow to in the free memory, all together.

    sys.maxsize where no layer keeps tokens.

    cached: tokens that each holds already. depth: tokens drafted at a time, at most; head_bytes: of the draft head; 0
    once it is loaded.
    """
    rows, size = len(cached), machine.dtype.size
    prefill = prefill_bytes(config, chunk, max(cached) + chunk, size, machine.attention_impl)
    sampling = rows * SAMPLING_ARRAYS * 4 * config.vocab_size
    once = max(prefill, sampling)
    state = rows * 2 * (1 + depth) * state_bytes(config, size)
    free = max(0, machine.limit - mx.get_active_memory() - once - state - machine.kept - head_bytes)
    step = kv_bytes(config, KVCache.STEP, size, config.mtp_num_hidden_layers if depth else 0, machine.kv)
    if not step:
        return sys.maxsize
    unpacked = unpacked_bytes(config, size, machine.kv, machine.attention_impl)
    prefilled = step + KVCache.STEP * unpacked
    grown = step + growth_bytes(config, KVCache.STEP, size, machine.kv)
    steps = min((free - sum(cached) * unpacked) // prefilled, (free + once - sampling) // grown)
    return sum(cached) + KVCache.STEP * max(0, int(steps) - (rows - 1))
