"""What drafts are expected to gain on Macs, from what others have published. Nothing here was measured by us.

A round at depth k reads k + 1 rows, after k drafts, and gives 1 + p_1 + p_1 p_2 + ... + p_1...p_k tokens, p_j being the
probability that draft j is accepted once those before it were. In steps of plain decoding it costs V(k + 1) + k d, so

    gain(k) = (1 + p_1 + ... + p_1...p_k) / (V(k + 1) + k d)

as in generate/depth.py. V(n) is what a pass over n rows costs: 1 for one row, what was published for four, and a line
between the two for two and three. d is a draft's own cost: the share, in the 4bit recipe, of the bytes of draft head
and output matrix in all of the text model's, for decoding is bound by them. Of published acceptance only p_1 is known,
or a mean that is taken for it; p_(j+1) / p_j is then FALL, as the controller has it before any draft.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from mlx_qwen35.bench.dispatches import RECIPES
from mlx_qwen35.checkpoint.checkpoint import is_matrix, mtp_shapes, text_shapes
from mlx_qwen35.checkpoint.config import TextConfig, parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.engine.drafts.depth import FALL

ULTRA_FOUR = 3.2  # V(4), M1 Ultra, 27B: mlxcel, docs/benchmark_results/qwen38-mtp-m1ultra-2026-08-16.md
MAX_THREE = 227.8 / 133.6  # gain(3), M5 Max, 4B in 4 bit: README of MTPLX 2.2.0
DEPTHS = (1, 2, 3)
PUBLISHED: Mapping[str, float] = {  # p_1
    "35 %, Rapid-MLX, 4B, M3 Ultra (lowest)": 0.35,
    "47 %, Rapid-MLX, 4B, M3 Ultra (highest)": 0.47,
    "75.2 %, vllm-mlx, before the norm": 0.752,
    "80.3 %, vllm-mlx, after the norm": 0.803,
    "85 %, Rapid-MLX, 9B": 0.85,
}


@dataclass(frozen=True)
class Expected:
    """Of one acceptance. Gains and tokens are of depths 1, 2, 3.

    implied: the cost of four rows with which the gain published for the M5 Max at depth 3 goes together; below 1, which
    cannot be, the acceptance there was higher. on_max: gains by a line to that cost; None where it cannot be.
    """

    source: str
    tokens: tuple[float, ...]
    on_ultra: tuple[float, ...]
    implied: float
    on_max: tuple[float, ...] | None


def tokens_a_round(shares: Sequence[float]) -> float:
    """1 + p_1 + p_1 p_2 + ..."""
    return 1 + sum(accumulate(shares, mul))


def cost_of_rows(rows: int, four: float) -> float:
    """V(rows), for what four rows cost."""
    return 1 + (four - 1) * (rows - 1) / 3


def gain(shares: Sequence[float], depth: int, four: float, draft: float) -> float:
    return tokens_a_round(shares[:depth]) / (cost_of_rows(depth + 1, four) + depth * draft)


def expect(source: str, shares: Sequence[float], draft: float) -> Expected:
    """shares: p_1, p_2, p_3."""
    implied = tokens_a_round(shares) / MAX_THREE - 3 * draft
    return Expected(
        source,
        tuple(tokens_a_round(shares[:depth]) for depth in DEPTHS),
        tuple(gain(shares, depth, ULTRA_FOUR, draft) for depth in DEPTHS),
        implied,
        tuple(gain(shares, depth, implied, draft) for depth in DEPTHS) if implied >= 1 else None,
    )


def completed(shares: Sequence[float | None]) -> list[float]:
    """Measured p_1, p_2, p_3, of which the later ones may never have been tried."""
    found: list[float] = []
    for share in shares:
        found.append((FALL * found[-1] if found else 0.0) if share is None else share)
    return found


def expectations(measured: Mapping[str, Sequence[float | None]]) -> list[Expected]:
    """Rows of the table: of what was measured here, and of what was published, for the 4B."""
    draft = draft_cost(parse_config(geometry("4b")).text)
    known = {source: completed(shares) for source, shares in measured.items()}
    known |= {source: [share * FALL**j for j in range(3)] for source, share in PUBLISHED.items()}
    return [expect(source, shares, draft) for source, shares in known.items()]


# --- counted from shapes ---------------------------------------------------------------------------------------------


def packed_bytes(shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Bytes of the matrices among these tensors in the 4bit recipe: groups of 64, or 16 bits where not packed."""
    total = 0.0
    for name, shape in shapes.items():
        ends = [bits for end, bits in RECIPES["mixed"].items() if name.endswith(f".{end}.weight")]
        bits = ends[0] if ends else 4
        total += math.prod(shape) * (16 if bits is None else bits + 32 / 64) / 8 if is_matrix(name, shape) else 0
    return total


def draft_cost(config: TextConfig) -> float:
    """Of one draft, in steps of plain decoding."""
    text = text_shapes(config)
    head = next(name for name in reversed(text) if name.endswith(("embed_tokens.weight", "lm_head.weight")))
    looked_up = 0 if config.tie_word_embeddings else packed_bytes({"embed": next(iter(text.values()))})
    output = packed_bytes({head: text[head]})
    return (packed_bytes(mtp_shapes(config)) + output) / (packed_bytes(text) - looked_up)


def reading_cost(config: TextConfig, joined: bool = False) -> float:
    """Multiply-adds that drafts add to reading a prompt, as a share of those of the model's layers.

    For each token the last layer's MLP, which else is computed for the last token alone, and of the head what its keys
    and values are made of: fc, k_proj, v_proj. joined: on a GPU q_proj is of the same product.
    """
    text, head = text_shapes(config), mtp_shapes(config)
    last = f"layers.{len(config.layer_types) - 1}.mlp."
    ends = ("mtp.fc.weight", "k_proj.weight", "v_proj.weight", *(("q_proj.weight",) if joined else ()))
    layers = {name: shape for name, shape in text.items() if ".layers." in name}
    extra = [shape for name, shape in layers.items() if last in name]
    extra += [shape for name, shape in head.items() if name.endswith(ends)]
    return _products(extra) / (_products(layers.values()) - _products(extra[:3]))


def _products(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes if len(shape) == 2)
