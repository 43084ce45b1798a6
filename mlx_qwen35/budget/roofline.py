"""Speeds that are computed from a chip's figures, before anything is measured: a roofline times an efficiency.

Decoding is bound by memory: tokens/s = DECODE[tier] x bandwidth / bytes of a token. A token reads the text weights (of
an embedding that is not the output matrix, one row), reads and writes the DeltaNet states, and reads the keys and
values of its context.

Prefill is bound by arithmetic: tokens/s = PREFILL x peak operations a second / operations of a token. A token takes
two operations for each weight of a layer's matrices, and in the attention layers some for each token before it.
"""

import math

from mlx_qwen35.budget.plan import MemoryPlan, loaded_bytes, state_bytes
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.config import FULL, LINEAR, TextConfig
from mlx_qwen35.checkpoint.shapes import is_matrix, text_shapes
from mlx_qwen35.machine.chip import Chip

# The part of the bound that published runs of 4-bit models of 4B reach. Larger chips wait longer for launches.
# Decoding: M4 0.80, M5 0.75, M3 Pro 0.66, M4 Max 0.58, M5 Max 0.54, M1 Ultra 0.35.
DECODE = {"": 0.75, "Pro": 0.65, "Max": 0.55, "Ultra": 0.35}
PREFILL = 0.6  # M1 in float16 and M4: 0.55 to 0.7


def token_bytes(checkpoint: Checkpoint, plan: MemoryPlan) -> int:
    """Bytes that decoding a token moves at the context of a plan, without drafts."""
    text, dtype = checkpoint.config.text, plan.machine.dtype
    embedding = [] if text.tie_word_embeddings else [name for name in checkpoint.entries if ".embed_tokens." in name]
    return plan.weights - loaded_bytes(checkpoint, embedding, dtype) + 2 * state_bytes(text, dtype.size) + plan.kv


def decode_speed(nbytes: int, chip: Chip) -> float:
    """Tokens a second of decoding. nbytes: of a token, by `token_bytes`."""
    return DECODE[chip.tier] * chip.bandwidth / nbytes


def prefill_operations(config: TextConfig, tokens: int) -> float:
    """Operations of a prompt of so many tokens, in one conversation; the output matrix, used once, is left out."""
    H, _, D, _ = config.attention_heads
    _, Hv, Dk, Dv, _ = config.delta_heads
    shapes = text_shapes(config).items()
    weights = sum(math.prod(shape) for name, shape in shapes if ".layers." in name and is_matrix(name, shape))
    rule = 8 * Hv * Dk * Dv * config.layer_types.count(LINEAR)
    attention = 4 * H * D * config.layer_types.count(FULL) * tokens / 2  # a token sees half of them on average
    return tokens * (2 * weights + rule + attention)


def prefill_speed(config: TextConfig, tokens: int, chip: Chip) -> float | None:
    """Tokens a second of the prefill of a prompt of so many tokens; None where the chip's peak is not known."""
    if not chip.knows_flops:
        return None
    return tokens * PREFILL * chip.flops / prefill_operations(config, tokens)
