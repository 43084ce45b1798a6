"""The memory plan of a training run, from a checkpoint's headers. `mlx_qwen35.train` keeps to it.

A run holds weights, low-rank parts and what the optimizer keeps. While a batch is trained come the inputs of its
layers, and at a time one of: a layer's way forward and back, the loss of a piece, a step of the optimizer. The numbers
of a layer's arrays are fitted to measured peaks (tests/budget/test_training_plan.py).
"""

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mlx_qwen35.budget.encoding import working_bytes
from mlx_qwen35.budget.plan import PACKED, Machine, in_gb, loaded_bytes, names
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.config import LINEAR, TextConfig
from mlx_qwen35.checkpoint.converted import to_4bit
from mlx_qwen35.checkpoint.names import HEAD, MTP, TEXT
from mlx_qwen35.checkpoint.shapes import mtp_shapes, text_shapes, vision_shapes
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.cpu import PIECE, UNPACKED
from mlx_qwen35.kernels.gated_delta import CHUNK
from mlx_qwen35.kernels.gated_delta_backward import SEGMENT
from mlx_qwen35.options import spelled

Size = tuple[int, int, int]  # of a low-rank part beside a weight (out, width): out, width, rank
MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1, "muon": 1}  # numbers that an optimizer keeps of each that is trained
SLICE = 1 << 22  # logits of which a GPU makes probabilities at a time
STEP = 32  # tokens by which a proposed length or piece is longer than the next
LEAST, RANK = 64, 4  # pieces and rank, proposed where a shorter length alone is not enough


@dataclass(frozen=True)
class TrainingNeeds:
    """What a run asks of memory.

    parts: what is trained, by the weight's name. length: tokens of the longest row. accumulates: whether a step has
    several batches. keeps_best: whether the best parameters are kept beside the last. rank: of all parts; None: it
    cannot be chosen. patches: of the largest image, or of what is encoded of a video at a time; 0: no row shows any.
    """

    parts: Mapping[str, Size]
    length: int
    batch: int = 1
    pieces: int = 256
    optimizer: str = "adamw"
    accumulates: bool = True
    keeps_best: bool = False
    rank: int | None = None
    patches: int = 0

    def with_rank(self, rank: int) -> "TrainingNeeds":
        """The same with parts of another rank."""
        return replace(self, rank=rank, parts={name: (*own[:2], rank) for name, own in self.parts.items()})


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes of each part of a run."""

    machine: Machine
    needs: TrainingNeeds
    weights: int  # of the draft head too, where it is trained
    trained: int  # the low-rank parts
    moments: int  # what the optimizer keeps
    best: int  # the best parameters, beside the last
    gradients: int  # of a batch, and the sums of those before
    inputs: int  # of the layers, from the lowest trained one on
    layer: int  # one layer's arrays, forward and back
    loss: int  # of a piece: its logits and what is made of them
    update: int  # what a step of the optimizer takes, which makes all anew
    images: int  # the vision encoder and what it computes, before the first step
    buffers: int  # freed ones, which MLX keeps

    @property
    def held(self) -> int:
        """What the run holds all the time."""
        return self.weights + self.trained + self.moments + self.best

    @property
    def working(self) -> int:
        """What a step takes at most beside."""
        return max(self.gradients + self.inputs + max(self.layer, self.loss), self.update)

    @property
    def peak(self) -> int:
        return max(self.held + self.working, self.weights + self.images) + self.buffers

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine.limit


def plan_training(checkpoint: Checkpoint, machine: Machine, needs: TrainingNeeds) -> TrainingPlan:
    """The plan of a run."""
    text, parts = checkpoint.config.text, needs.parts
    drafts = names(checkpoint, mtp_shapes(text)) if any(name.startswith(MTP) for name in parts) else []
    trained, known = _bytes(parts), MOMENTS.get(needs.optimizer)
    moments = _factors(parts) if known is None else known * trained
    kept = _layers_kept(text, parts)
    hidden = needs.batch * needs.length * text.hidden_size * machine.dtype.size
    return TrainingPlan(
        machine, needs,
        weights=loaded_bytes(checkpoint, names(checkpoint, text_shapes(text)) + drafts, machine.dtype),
        trained=trained, moments=moments, best=trained * needs.keeps_best,
        gradients=trained * (1 + needs.accumulates), inputs=(kept + 2) * hidden,
        layer=max(_layer_bytes(checkpoint, machine, needs, kind) for kind in set(text.layer_types)) * bool(kept),
        loss=_loss_bytes(checkpoint, machine, needs), update=3 * trained + moments,
        images=_image_bytes(checkpoint, machine, needs.patches), buffers=machine.kept,
    )  # fmt: skip


def _bytes(parts: Mapping[str, Size]) -> int:
    """Of low-rank parts, in float32."""
    return 4 * sum(rank * (out + width) for out, width, rank in parts.values())


def _factors(parts: Mapping[str, Size]) -> int:
    """What Adafactor keeps: of each matrix a number for each row and each column."""
    return 4 * sum(out + width + 2 * rank for out, width, rank in parts.values())


def _layers_kept(text: TextConfig, parts: Mapping[str, Size]) -> int:
    """Layers whose inputs are kept: from the lowest that is trained on, all for the table of tokens."""
    layers, depth = f"{TEXT}layers.", text.num_hidden_layers
    numbers = [int(name.removeprefix(layers).split(".")[0]) for name in parts if name.startswith(layers)]
    return depth - (0 if f"{TEXT}embed_tokens.weight" in parts else min(numbers, default=depth))


def _layer_bytes(checkpoint: Checkpoint, machine: Machine, needs: TrainingNeeds, kind: str) -> int:
    """The most that a layer takes on the way back, which runs forward first: while its MLP is there, or its mixer."""
    text, size = checkpoint.config.text, machine.dtype.size
    tokens, D, inner = needs.batch * needs.length, text.hidden_size, text.intermediate_size
    own = [of for name, of in needs.parts.items() if f".layers.{text.layer_types.index(kind)}." in name]
    if kind == LINEAR:
        K, V = text.key_dim, text.value_dim
        mlp = tokens * ((11 * D + 8 * inner) * size + 8 * (K + V) * 4)
        mixer = tokens * ((4 * D + 2 * inner) * size + (17 * K + 8 * V) * 4) + min(tokens, SEGMENT * CHUNK) * 40 * V * 4
    else:
        H, Hk, dim, _ = text.attention_heads
        mlp = tokens * ((4 * D + 8 * inner) * size + (9 * H + 9 * Hk) * dim * 4)
        mixer = tokens * (13 * D * size + 18 * H * dim * 4)
    unpacked = _unpacked_bytes(checkpoint, machine, f"{TEXT}layers.0.mlp.up_proj.weight", D * inner)
    return max(mlp, mixer) + unpacked + 4 * sum(rank * (out + width) for out, width, rank in own)


def _unpacked_bytes(checkpoint: Checkpoint, machine: Machine, name: str, elements: int) -> int:
    """Of a slice of a quantized matrix that the CPU dequantizes: an element takes 8 bytes on the way."""
    return 8 * min(UNPACKED, elements) if machine.on_cpu and checkpoint.quantization(name) else 0


def _loss_bytes(checkpoint: Checkpoint, machine: Machine, needs: TrainingNeeds) -> int:
    """Of a piece: logits, in whose place the gradients come, and a part of them in float32."""
    text, size = checkpoint.config.text, machine.dtype.size
    head = f"{TEXT}embed_tokens.weight" if text.tie_word_embeddings else HEAD
    V, D, rows = text.vocab_size, text.hidden_size, min(needs.pieces, needs.batch * needs.length)
    part = min(rows * V, max(V, PIECE if machine.on_cpu else SLICE))
    beside = rows * V * 4 * (HEAD in needs.parts)  # what the head's low-rank part adds
    chosen = 3 * needs.batch * needs.length * D * size
    return rows * V * size + beside + 5 * 4 * part + chosen + _unpacked_bytes(checkpoint, machine, head, V * D)


def _image_bytes(checkpoint: Checkpoint, machine: Machine, patches: int) -> int:
    vision = checkpoint.config.vision
    if not patches or vision is None:
        return 0
    encoder = loaded_bytes(checkpoint, names(checkpoint, vision_shapes(vision)), machine.dtype)
    return encoder + working_bytes(vision, machine.dtype, patches, machine.attention_impl)


# --- the guard -------------------------------------------------------------------------------------------------------


def check_training_fits(checkpoint: Checkpoint, machine: Machine, needs: TrainingNeeds, name: str) -> TrainingPlan:
    """The plan of a run that fits. InputError memory_exceeded for one that does not, before weights are read.

    The message proposes what would fit: a change of one option, or else of all of them. name: of the model.
    """
    plan = plan_training(checkpoint, machine, needs)
    if plan.fits:
        return plan
    need = (
        f"training {name} on rows of up to {needs.length:,} tokens needs {in_gb(plan.peak)}, of which "
        f"{in_gb(plan.weights)} are its weights"
    )
    has = f"it may take {in_gb(machine.limit)}"
    ways = proposals(checkpoint, machine, needs)
    if ways:
        raise InputError("memory_exceeded", f"{need}; {has}", "Any of these fits:\n  " + "\n  ".join(ways))
    packed = replace(plan, weights=int(plan.weights * PACKED))
    if checkpoint.raw and not checkpoint.config.quantization and packed.fits:
        raise InputError("memory_exceeded", f"{need}; {has}", f"Train on it in 4 bit. First type\n  {to_4bit(name)}")
    raise InputError(
        "memory_exceeded", f"{need}; {has}", "Choose a folder with fewer bits, or a smaller model of the family"
    )


def proposals(checkpoint: Checkpoint, machine: Machine, needs: TrainingNeeds) -> list[str]:
    """Options that fit, each as it is typed: the largest value of one, or where no one is enough, of several."""

    def fits(changed: TrainingNeeds) -> bool:
        return plan_training(checkpoint, machine, changed).fits

    def largest(of: TrainingNeeds, name: str) -> list[str]:
        values, change = _smaller(of)[name]
        found = bisect.bisect_left(values, True, key=lambda value: not fits(change(value)))
        return [spelled(name, values[found - 1])] if found else []

    if ways := [way for name in _smaller(needs) for way in largest(needs, name)]:
        return ways
    least = replace(needs, batch=1, pieces=min(needs.pieces, LEAST))
    typed = [spelled("batch_size", 1)] * (needs.batch > 1) + [spelled("pieces", LEAST)] * (needs.pieces > LEAST)
    lower = [(least, typed)]
    if needs.rank and needs.rank > RANK:
        lower.append((least.with_rank(RANK), [*typed, spelled("rank", RANK)]))
    for changed, said in lower:
        shorter = [] if fits(changed) else largest(changed, "max_length")
        if fits(changed) or shorter:
            return [" ".join([*said, *shorter])]
    return []


def _smaller(needs: TrainingNeeds) -> dict[str, tuple[range, Callable[[int], TrainingNeeds]]]:
    """Of each option that memory depends on, its smaller values, and what is needed then."""
    found: dict[str, tuple[range, Callable[[int], TrainingNeeds]]] = {
        "batch_size": (range(1, needs.batch), lambda n: replace(needs, batch=n)),
        "max_length": (range(STEP, needs.length, STEP), lambda n: replace(needs, length=n)),
        "pieces": (range(STEP, needs.pieces, STEP), lambda n: replace(needs, pieces=n)),
    }
    return found | ({"rank": (range(1, needs.rank), needs.with_rank)} if needs.rank else {})
