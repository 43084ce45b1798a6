"""The cost of quantizing each group of tensors, measured one group at a time, and the recipe for a byte cap.

All variants of the model go through the layers side by side: memory is one layer and a residual stream a variant (for
the 4B 10 KB a token and variant in float32), time is a forward pass for each. A variant is computed from the first
layer on in which it differs from the source.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.fusing import with_own_head
from mlx_qwen35.checkpoint.names import TEXT
from mlx_qwen35.checkpoint.shapes import is_matrix, text_shapes
from mlx_qwen35.checkpoint.tensors import DTYPE_BYTES
from mlx_qwen35.console.table import markdown
from mlx_qwen35.convert.progress import percent
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import choose_dtype
from mlx_qwen35.measure.divergence import Counted, compare, summary
from mlx_qwen35.measure.layerwise import Batch, Layerwise, Progress, make_batches
from mlx_qwen35.model.weights import Weights
from mlx_qwen35.quantization import Quantization

_LAYERS = f"{TEXT}layers."
CANDIDATES = (Quantization(64, 4, "affine"), Quantization(64, 8, "affine"))

# Matrices that are quantized alike: matrices of one input stand in one product.
GROUPS = {
    "embedding, head": ("*embed_tokens.weight", "lm_head.weight"),
    "attention q, k, v": ("*self_attn.q_proj.weight", "*self_attn.k_proj.weight", "*self_attn.v_proj.weight"),
    "attention o": ("*self_attn.o_proj.weight",),
    "DeltaNet qkv": ("*linear_attn.in_proj_qkv.weight",),
    "DeltaNet z": ("*linear_attn.in_proj_z.weight",),
    "DeltaNet a, b": ("*linear_attn.in_proj_a.weight", "*linear_attn.in_proj_b.weight"),
    "DeltaNet out": ("*linear_attn.out_proj.weight",),
    "MLP gate, up": ("*mlp.gate_proj.weight", "*mlp.up_proj.weight"),
    "MLP down": ("*mlp.down_proj.weight",),
}


@dataclass(frozen=True)
class GroupCost:
    """One group of matrices in one quantization, everything else as in the source."""

    group: str
    names: tuple[str, ...]  # Hugging Face names of its matrices
    quantization: Quantization | None  # None: as in the source
    nbytes: int  # of the group
    kl: float = 0.0  # nats, mean of KL(source || this variant); 0 for the source
    kl_error: float | None = None  # standard error over sequences


def groups(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Group -> Hugging Face names of its matrices."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in _matrices(checkpoint):
        for group, patterns in GROUPS.items():
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                found[group].append(name)
    return {group: tuple(names) for group, names in found.items()}


def _matrices(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    shapes = text_shapes(checkpoint.config.text)
    return {name: shape for name, shape in shapes.items() if is_matrix(name, shape)}


def unmeasured(checkpoint: Checkpoint, candidates: Sequence[Quantization] = CANDIDATES) -> list[GroupCost]:
    """The bytes of each group, from the headers: as in the source, then in each candidate quantization.

    Raises InputError when the source is quantized, or a candidate's group size does not divide a matrix.
    """
    if checkpoint.config.quantization:
        raise InputError("source_quantized", f"sensitivity needs an unquantized checkpoint; {checkpoint.folder} is not")
    shapes = _matrices(checkpoint)
    if wrong := [(q.group_size, name) for q in candidates for name, shape in shapes.items() if shape[1] % q.group_size]:
        size, name = wrong[0]
        raise InputError(
            "quantization_unfit",
            f"group size {size} does not divide {name}, {shapes[name][1]} wide; choose another",
        )
    costs = []
    for group, names in groups(checkpoint).items():
        entries = [checkpoint.entries[name] for name in names]
        costs.append(GroupCost(group, names, None, sum(entry.nbytes for entry in entries)))
        for candidate in candidates:
            nbytes = sum(quantized_nbytes(entry.shape, candidate, entry.dtype) for entry in entries)
            costs.append(GroupCost(group, names, candidate, nbytes))
    return costs


def sensitivity(
    checkpoint: Checkpoint,
    tokens: Sequence[Sequence[int]],
    candidates: Sequence[Quantization] = CANDIDATES,
    adapter: Adapter | None = None,
) -> list[GroupCost]:
    """The KL divergence from the source of every group quantized by itself, in each candidate quantization.

    Matrices are quantized with mx.quantize from the dtype in which they are stored. adapter: fused into the source, and
    into what is quantized, in float32. Of each group the first entry is the source. Raises InputError as `unmeasured`
    does.
    """
    checkpoint = with_own_head(checkpoint, adapter)
    costs = unmeasured(checkpoint, candidates)
    batches = make_batches(tokens, checkpoint.config.text.vocab_size)
    counted = Counted(batches, tokens)
    dtype = choose_dtype(checkpoint, None)
    source = Layerwise(checkpoint, dtype, adapter=adapter)
    variants = {cost: _Variant(source, cost.names, cost.quantization) for cost in costs if cost.quantization}
    work = counted.tokens * sum(source.weights_from(i) for i in (0, *(v.first for v in variants.values())))
    measured = {}
    with percent("measuring", work + 2 * len(variants) * counted.head_work(source)) as progress:
        streams = _through(source, batches, list(variants.values()), progress)
        ours = counted.normed(source, streams)
        for cost, variant in variants.items():
            theirs = counted.normed(variant.model, variant.states or streams)
            variant.states.clear()
            result = summary(compare(source, variant.model, ours, theirs, counted, progress))
            measured[cost] = replace(cost, kl=result.kl, kl_error=result.kl_error)
    return [measured.get(cost, cost) for cost in costs]


class _Variant:
    """The model with some matrices quantized.

    first: the first layer that differs from the source. states: its residual streams; empty before that layer.
    """

    def __init__(self, source: Layerwise, names: tuple[str, ...], quantization: Quantization):
        self.model = Layerwise(
            source.checkpoint,
            source.dtype,
            lambda weights: quantized(weights, names, quantization),
            adapter=source.adapter,
        )
        self.states: list[mx.array] = []
        self.embeds = any(name.endswith("embed_tokens.weight") for name in names)
        layers = [int(name.removeprefix(_LAYERS).split(".")[0]) for name in names if name.startswith(_LAYERS)]
        self.first = 0 if self.embeds else min(layers, default=source.config.num_hidden_layers)


def _through(
    source: Layerwise, batches: Sequence[Batch], variants: Sequence[_Variant], progress: Progress
) -> list[mx.array]:
    """Put the source and all variants through the layers; returns the source's residual streams."""
    streams = source.embed(batches)
    for variant in variants:
        if variant.embeds:
            variant.states = variant.model.embed(batches)
    for i in range(source.config.num_hidden_layers):
        for variant in variants:
            if i == variant.first and not variant.states:
                variant.states = list(streams)
            if variant.states:
                variant.model.advance(i, variant.states, progress)
        source.advance(i, streams, progress)
    return streams


def quantized(weights: Weights, names: Iterable[str], quantization: Quantization) -> Weights:
    """The same weights with the named matrices quantized, where they are among them."""
    arrays, chosen = dict(weights.arrays), set()
    for name in names:
        if name in arrays:
            chosen.add(name)
            parts = mx.quantize(arrays[name], **asdict(quantization))
            suffixes = quantization.parts((1, quantization.group_size))
            arrays |= {name.removesuffix("weight") + s: part for s, part in zip(suffixes, parts, strict=True)}

    def quantization_of(name: str) -> Quantization | None:
        return quantization if name in chosen else weights.quantization(name)

    return Weights(arrays, quantization_of, weights.dtype, weights.eps, weights.keep_fp32, weights.prefix)


def quantized_nbytes(shape: tuple[int, ...], quantization: Quantization, dtype: str) -> int:
    """Bytes of a matrix quantized from `dtype` (safetensors' name), scales and biases included."""
    scale = DTYPE_BYTES[dtype] if quantization.mode == "affine" else 1
    parts = quantization.parts(shape)
    return sum(math.prod(part) * (4 if suffix == "weight" else scale) for suffix, part in parts.items())


# --- the recipe ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposal:
    """A quantization for each group. kl: the sum of the groups' own, an estimate: errors of groups also meet."""

    groups: tuple[GroupCost, ...]
    nbytes: int
    kl: float

    @property
    def matrices(self) -> Mapping[str, Quantization | None]:
        """Hugging Face name of each matrix -> its quantization."""
        return {name: chosen.quantization for chosen in self.groups for name in chosen.names}


def smallest(costs: Sequence[GroupCost], cap_bytes: int, other_bytes: int = 0) -> dict[str, GroupCost]:
    """Group -> its entry of the fewest bytes; InputError when even these do not fit under the cap."""
    found: dict[str, GroupCost] = {}
    for cost in costs:
        found[cost.group] = min(found.get(cost.group, cost), cost, key=lambda cost: cost.nbytes)
    least = other_bytes + sum(cost.nbytes for cost in found.values())
    if least > cap_bytes:
        raise InputError(
            "option_invalid",
            f"the cap must be at least {least / 1e9:.6g} GB for these candidates, got {cap_bytes / 1e9:.6g} GB; give "
            "candidates of fewer bits or a higher cap",
        )
    return found


def propose(costs: Sequence[GroupCost], cap_bytes: int, other_bytes: int = 0) -> Proposal:
    """The recipe under a cap: from the fewest bytes of every group, step by step the most KL saved for a byte.

    other_bytes: of everything that is in no group, such as norms and the vision encoder; they count against the cap.
    Raises InputError as `smallest` does.
    """
    chosen = smallest(costs, cap_bytes, other_bytes)
    used = other_bytes + sum(cost.nbytes for cost in chosen.values())
    while steps := [
        ((now.kl - cost.kl) / (cost.nbytes - now.nbytes), cost)
        for group, now in chosen.items()
        for cost in costs
        if cost.group == group and cost.kl < now.kl and now.nbytes < cost.nbytes <= now.nbytes + cap_bytes - used
    ]:
        _, best = max(steps, key=lambda step: step[0])
        used += best.nbytes - chosen[best.group].nbytes
        chosen[best.group] = best
    return Proposal(tuple(chosen.values()), used, sum(cost.kl for cost in chosen.values()))


def table(costs: Sequence[GroupCost], proposal: Proposal | None = None) -> str:
    """The groups as a markdown table; a proposal's are marked."""
    rows = []
    for cost in costs:
        error = "" if cost.kl_error is None else f"{1e3 * cost.kl_error:.3f}"
        stored = str(cost.quantization or "as in the source")
        row = [cost.group, stored, f"{cost.nbytes / 1e6:.2f}", f"{1e3 * cost.kl:.3f}", error]
        rows.append(row + (["yes" if cost in proposal.groups else ""] if proposal else []))
    header = ["group", "form", "MB", "KL, 10^-3 nats", "standard error", *(["taken"] if proposal else [])]
    text = markdown(header, rows)
    if proposal:
        text += f"\n\nproposed: {proposal.nbytes / 1e9:.3f} GB, the groups' KL adds up to {proposal.kl:.2e} nats"
    return text


def measured(costs: Sequence[GroupCost], proposal: Proposal | None = None) -> dict[str, Any]:
    """The groups, and the proposal, for --json."""
    groups = [
        {
            "group": cost.group, "form": str(cost.quantization) if cost.quantization else None, "bytes": cost.nbytes,
            "kl": cost.kl, "kl_standard_error": cost.kl_error, "taken": bool(proposal and cost in proposal.groups),
        }
        for cost in costs
    ]  # fmt: skip
    return {"groups": groups, "proposal": proposal and {"bytes": proposal.nbytes, "kl": proposal.kl}}
