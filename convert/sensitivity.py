"""What packing each group of tensors costs, measured one group at a time, and the recipe that follows for a byte cap.

All variants of the model go through the layers side by side: memory is one layer and a residual stream a variant (for
the 4B 10 KB a token and variant in float32), time is a forward pass for each. A variant is computed from the first
layer on in which it differs from the source.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import mlx.core as mx

from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.names import TEXT
from mlx_qwen35.checkpoint.shapes import is_matrix, text_shapes
from mlx_qwen35.checkpoint.tensors import DTYPE_BYTES
from mlx_qwen35.convert.progress import percent
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import choose_dtype
from mlx_qwen35.measure.divergence import Counted, compare, summary
from mlx_qwen35.measure.layerwise import Batch, Layerwise, Told, make_batches
from mlx_qwen35.model.weights import Weights
from mlx_qwen35.quantization import Quantization

CANDIDATES = (Quantization(64, 4, "affine"), Quantization(64, 8, "affine"))

# Matrices that are packed alike for one reason or another: those that read the same input stand in one product.
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
class Row:
    """One group of matrices, packed one way, everything else as in the source."""

    group: str
    names: tuple[str, ...]  # Hugging Face names of its matrices
    how: Quantization | None  # None: as in the source
    kl: float  # nats, mean of KL(source || this variant); 0 for the source
    kl_error: float | None  # standard error over sequences
    nbytes: int  # of the group packed this way


def groups(checkpoint: Checkpoint, by_layer: bool = False) -> dict[str, tuple[str, ...]]:
    """Group -> Hugging Face names of its matrices; with `by_layer` each layer's are groups of their own."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, shape in text_shapes(checkpoint.config.text).items():
        for group, patterns in GROUPS.items():
            if is_matrix(name, shape) and any(fnmatchcase(name, pattern) for pattern in patterns):
                layer = _layer(name)
                found[group if layer is None or not by_layer else f"layer {layer} {group}"].append(name)
    return {group: tuple(names) for group, names in found.items()}


def forms(checkpoint: Checkpoint, candidates: Sequence[Quantization] = CANDIDATES, by_layer: bool = False) -> list[Row]:
    """What is to be measured, from the headers: each group as it is in the source, then in each of the candidate ways.

    Raises InputError when the source is packed, or a candidate's group size does not divide a matrix.
    """
    if checkpoint.config.quantization:
        raise InputError(
            "source_quantized",
            f"sensitivity is measured on an unquantized checkpoint; {checkpoint.folder} is quantized",
        )
    shapes = {name: shape for name, shape in text_shapes(checkpoint.config.text).items() if is_matrix(name, shape)}
    if wrong := [(how, name) for how in candidates for name, shape in shapes.items() if shape[1] % how.group_size]:
        how, name = wrong[0]
        raise InputError(
            "quantization_unfit",
            f"group size {how.group_size} does not divide {name}, {shapes[name][1]} wide; choose another",
        )
    rows = []
    for group, names in groups(checkpoint, by_layer).items():
        entries = {name: checkpoint.entries[name] for name in names}
        rows.append(Row(group, names, None, 0.0, None, sum(entry.nbytes for entry in entries.values())))
        for how in candidates:
            nbytes = sum(packed_bytes(shapes[name], how, entry.dtype) for name, entry in entries.items())
            rows.append(Row(group, names, how, 0.0, None, nbytes))
    return rows


def sensitivity(
    checkpoint: Checkpoint,
    tokens: Sequence[Sequence[int]],
    candidates: Sequence[Quantization] = CANDIDATES,
    *,
    first: Sequence[int] | None = None,
    by_layer: bool = False,
    dtype: mx.Dtype | None = None,
) -> list[Row]:
    """The KL divergence from the source of every group packed by itself, in each of the candidate ways.

    first: as in `divergence`. Matrices are packed with mx.quantize from the dtype in which they are stored. For each
    group a row comes first with how it is in the source. Raises InputError as `forms` does.
    """
    rows = forms(checkpoint, candidates, by_layer)
    batches = make_batches(tokens, checkpoint.config.text.vocab_size)
    counted = Counted(batches, tokens, first)
    dtype = choose_dtype(checkpoint, dtype)
    source = Layerwise(checkpoint, dtype)
    variants = {row: _Variant(checkpoint, dtype, row) for row in rows if row.how}
    work = counted.tokens * sum(source.weights_from(i) for i in (0, *(v.first for v in variants.values())))
    measured = {}
    with percent("measuring", work + 2 * len(variants) * counted.head_work(source)) as told:
        streams = _through(source, batches, list(variants.values()), told)
        ours = counted.normed(source, streams)
        for row, variant in variants.items():
            theirs = counted.normed(variant.model, variant.states or streams)
            variant.states.clear()
            result = summary(compare(source, variant.model, ours, theirs, counted, told))
            measured[row] = replace(row, kl=result.kl, kl_error=result.kl_error)
    return [measured.get(row, row) for row in rows]


class _Variant:
    """The model with one group packed one way. states: empty as long as they are the source's."""

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype, row: Row):
        self.model = Layerwise(checkpoint, dtype, lambda weights: packed(weights, row.names, row.how))
        self.states: list[mx.array] = []
        self.embeds = any(name.endswith("embed_tokens.weight") for name in row.names)
        layers = [layer for name in row.names if (layer := _layer(name)) is not None]
        self.first = 0 if self.embeds else min(layers, default=checkpoint.config.text.num_hidden_layers)


def _through(source: Layerwise, batches: Sequence[Batch], variants: Sequence[_Variant], told: Told) -> list[mx.array]:
    """Put the source and all variants through the layers; returns the source's streams."""
    streams = source.embed(batches)
    for variant in variants:
        if variant.embeds:
            variant.states = variant.model.embed(batches)
    for i in range(source.config.num_hidden_layers):
        for variant in variants:
            if i == variant.first and not variant.states:
                variant.states = list(streams)
            if variant.states:
                variant.model.advance(i, variant.states, told)
        source.advance(i, streams, told)
    return streams


def packed(weights: Weights, names: Iterable[str], how: Quantization) -> Weights:
    """The same weights with the named matrices packed, where they are among them."""
    arrays, chosen = dict(weights.arrays), set()
    for name in names:
        if name in arrays:
            chosen.add(name)
            parts = mx.quantize(arrays[name], group_size=how.group_size, bits=how.bits, mode=how.mode)
            suffixes = how.parts((1, how.group_size))
            arrays |= {name.removesuffix("weight") + s: part for s, part in zip(suffixes, parts, strict=True)}

    def packing(name: str) -> Quantization | None:
        return how if name in chosen else weights.packing(name)

    return Weights(arrays, packing, weights.dtype, weights.eps, weights.kept, weights.prefix)


def packed_bytes(shape: tuple[int, ...], how: Quantization, dtype: str) -> int:
    """Bytes of a matrix packed from `dtype` (safetensors' name), scales and biases included."""
    width = {"weight": 4, "scales": DTYPE_BYTES[dtype] if how.mode == "affine" else 1, "biases": DTYPE_BYTES[dtype]}
    return sum(rows * columns * width[suffix] for suffix, (rows, columns) in how.parts(shape).items())


def _layer(name: str) -> int | None:
    prefix = f"{TEXT}layers."
    return int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None


# --- the recipe ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposal:
    """How each group is packed. `kl` is the sum of the groups' own, an estimate: errors of groups also meet."""

    rows: tuple[Row, ...]  # one for each group
    nbytes: int
    kl: float

    @property
    def matrices(self) -> Mapping[str, Quantization | None]:
        """Hugging Face name of each matrix -> how it is packed."""
        return {name: row.how for row in self.rows for name in row.names}


def smallest(rows: Sequence[Row], cap_bytes: int, other_bytes: int = 0) -> dict[str, Row]:
    """The smallest form of every group, measured or not; InputError when even these do not fit under the cap."""
    found: dict[str, Row] = {}
    for row in rows:
        found[row.group] = min(found.get(row.group, row), row, key=lambda row: row.nbytes)
    least = other_bytes + sum(row.nbytes for row in found.values())
    if least > cap_bytes:
        raise InputError(
            "option_invalid",
            f"the cap must be at least {least / 1e9:.6g} GB for these candidates, got {cap_bytes / 1e9:.6g} GB; give "
            "candidates of fewer bits or a higher cap",
        )
    return found


def propose(rows: Sequence[Row], cap_bytes: int, other_bytes: int = 0) -> Proposal:
    """The recipe under a cap: from the smallest form of every group, step by step the most KL saved for a byte.

    other_bytes: of everything that is in no group, such as norms and the vision tower; they count against the cap.
    Raises InputError as `smallest` does.
    """
    chosen = smallest(rows, cap_bytes, other_bytes)
    used = other_bytes + sum(row.nbytes for row in chosen.values())
    while steps := [
        ((now.kl - row.kl) / (row.nbytes - now.nbytes), row)
        for group, now in chosen.items()
        for row in rows
        if row.group == group and row.kl < now.kl and now.nbytes < row.nbytes <= now.nbytes + cap_bytes - used
    ]:
        _, best = max(steps, key=lambda step: step[0])
        used += best.nbytes - chosen[best.group].nbytes
        chosen[best.group] = best
    return Proposal(tuple(chosen.values()), used, sum(row.kl for row in chosen.values()))


def table(rows: Sequence[Row], proposal: Proposal | None = None) -> str:
    """The rows as a markdown table; those that a proposal takes are marked."""
    taken = proposal.rows if proposal else ()
    lines = ["| group | form | MB | KL, 10^-3 nats | standard error |" + (" taken |" if proposal else "")]
    lines.append("|---|---|---|---|---|" + ("---|" if proposal else ""))
    for row in rows:
        error = "" if row.kl_error is None else f"{1e3 * row.kl_error:.3f}"
        cells = [row.group, form(row.how), f"{row.nbytes / 1e6:.2f}", f"{1e3 * row.kl:.3f}", error]
        cells += ["yes" if row in taken else ""] if proposal else []
        lines.append("| " + " | ".join(cells) + " |")
    if proposal:
        lines += ["", f"proposed: {proposal.nbytes / 1e9:.3f} GB, the groups' KL adds up to {proposal.kl:.2e} nats"]
    return "\n".join(lines)


def form(how: Quantization | None) -> str:
    """As one reads it: `4 bit, groups of 64`, `mxfp4`, `as in the source`."""
    if how is None:
        return "as in the source"
    return f"{how.bits} bit, groups of {how.group_size}" if how.mode == "affine" else how.mode
