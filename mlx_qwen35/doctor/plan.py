"""mlx_qwen35.doctor --plan: the memory that a model would take on this machine and on Macs, without loading it."""

from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_qwen35.budget.plan import MemoryPlan, longest_context, mac, plan_memory, this_machine
from mlx_qwen35.cache.kv_format import FORMS, UNQUANTIZED, KVFormat
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.dtypes import DTYPES, dtype_name
from mlx_qwen35.checkpoint.names import VISION
from mlx_qwen35.console.table import align
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import choose_dtype, stored_dtype

MACS = (8, 16, 32)  # GB
PIXELS = 1 << 20  # of the image that is planned for

_PARTS = (
    ("text weights", "weights"), ("draft head", "drafts"), ("keys and values", "kv"), ("DeltaNet state", "state"),
    ("prefill of a chunk", "prefill"), ("sampling a token", "sampling"), ("buffers that MLX keeps", "buffers"),
)  # fmt: skip
_IMAGE = (("vision encoder", "vision_encoder"), ("encoding an image", "encoding"))


def plans(
    checkpoint: Checkpoint, context: int, dtype: str | None, mtp: int, limit: int, kv: KVFormat = UNQUANTIZED
) -> list[MemoryPlan]:
    """For this machine, and for Macs with an M1 and 8, 16 and 32 GB. InputError for a context that is too long.

    limit: bytes that a model may take on this machine. kv: the form of keys and values.
    """
    text, pixels = checkpoint.config.text, PIXELS if checkpoint.has(VISION) else 0
    most = text.max_position_embeddings
    if not 1 <= context <= most:
        raise InputError("option_invalid", f"--context must be 1 to {most:,} tokens for this model, got {context:,}")
    stored = stored_dtype(checkpoint)
    on_m1 = DTYPES[dtype] if dtype else mx.float16 if stored == mx.bfloat16 else stored
    here = this_machine(text, choose_dtype(checkpoint, dtype), limit, kv)
    machines = [here, *(mac(gigabytes, on_m1, kv) for gigabytes in MACS)]
    return [plan_memory(checkpoint, machine, context, pixels=pixels, mtp=mtp) for machine in machines]


def longest_contexts(checkpoint: Checkpoint, found: Sequence[MemoryPlan], mtp: int) -> dict[str, list[int]]:
    """Form of keys and values -> the most tokens of a conversation that fits each plan's machine."""
    forms = [kv for kv in (UNQUANTIZED, *map(KVFormat.of, FORMS)) if kv.fits(checkpoint.config.text.head_dim)]
    return {_form(kv): [longest_context(checkpoint, plan, kv, mtp) for plan in found] for kv in forms}


def _form(kv: KVFormat) -> str:
    return f"{kv.name} bit" if kv.quantized else "the dtype"


def format_plans(name: str, found: Sequence[MemoryPlan], longest: Mapping[str, Sequence[int]]) -> str:
    """The table of --plan. longest: of `longest_contexts`."""
    first = found[0]
    rows = [
        ("GB (10^9 bytes)", *(plan.machine.name for plan in found)),
        ("a model may take", *(_gb(plan.machine.limit) for plan in found)),
        ("dtype", *(dtype_name(plan.machine.dtype) for plan in found)),
        ("keys and values in", *(_form(plan.machine.kv) for plan in found)),
        ("tokens prefilled at a time", *(str(plan.chunk) for plan in found)),
    ]
    rows += [(label, *(_gb(getattr(plan, part)) for plan in found)) for label, part in _PARTS]
    rows.append(("text, at most", *(_gb(plan.text) for plan in found)))
    if first.vision_encoder:
        rows += [(label, *(_gb(getattr(plan, part)) for plan in found)) for label, part in _IMAGE]
        rows.append(("first turn with an image, at most", *(_gb(plan.image) for plan in found)))
    rows.append(("it fits", *(_fits(plan) for plan in found)))
    rows += [(f"most tokens of text in {form}", *(f"{n:,}" for n in most)) for form, most in longest.items()]
    notes = [
        "Prefill and sampling take turns: the larger counts. The state is held twice.",
        "Most tokens: of a conversation, by the form of its keys and values (--kv-bits), in steps of 1,024.",
    ]
    if first.vision_encoder:
        notes.append(
            f"The image has {PIXELS / 2**20:g} x 2^20 pixels. It is encoded before keys and values are allocated; then "
            "the vision encoder is unloaded."
        )
    return "\n".join([f"{name}, a context of {first.context:,} tokens", "", *align(rows), "", *notes])


def _fits(plan: MemoryPlan) -> str:
    if not plan.fits:
        return "no"
    return "yes" if plan.image <= plan.machine.limit else "text only"


def _gb(count: int) -> str:
    return f"{count / 1e9:.3f}"
