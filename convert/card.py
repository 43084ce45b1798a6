"""README.md, the model card, and quality.json of a converted folder, and a plot of its errors: all from measured data.

The same conversion gives the same bytes: nothing here knows the time or where folders lie.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.converted import QUALITY
from mlx_qwen35.checkpoint.names import MTP, TEXT, VISION
from mlx_qwen35.checkpoint.shapes import is_matrix
from mlx_qwen35.console.table import markdown
from mlx_qwen35.convert.error_plot import plot
from mlx_qwen35.convert.fusion import described
from mlx_qwen35.convert.sensitivity import groups
from mlx_qwen35.convert.verify import Difference
from mlx_qwen35.load import has_vision
from mlx_qwen35.measure.divergence import Evaluation
from mlx_qwen35.quantization import Quantization

CARD, PLOT = "README.md", "error_by_layer.svg"
_PROGRAMS = ("mlx", "mlx-qwen35")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Facts:
    """What a card tells beyond what the folder holds.

    name: of the folder. source: an id or a path, of which the card has the last part. commit: of the id; "" for a path.
    recipe: its name, or the options
    by hand. errors: Hugging Face name -> the errors of that tensor. text: the name of the text of the evaluation.
    license: as Hugging Face writes it, see files.py. adapter: that was fused, see `fusion.facts`.
    """

    name: str
    source: str
    recipe: str
    reasons: tuple[str, ...] = ()
    rounding: str = "nearest"
    errors: Mapping[str, Difference] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    text: str = ""
    license: str | None = None
    commit: str = ""
    adapter: Mapping[str, Any] | None = None


def write_card(folder: Path, facts: Facts) -> None:
    """Write README.md, quality.json and, where errors are known, the plot into a converted folder."""
    checkpoint = open_checkpoint(folder)
    (folder / CARD).write_text(card(checkpoint, facts), encoding="utf-8")
    text = json.dumps(quality(checkpoint, facts), indent=2, ensure_ascii=False)
    (folder / QUALITY).write_text(text + "\n", encoding="utf-8")
    if picture := _plot(checkpoint, facts):
        (folder / PLOT).write_text(picture, encoding="utf-8")


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A part of a folder."""

    parameters: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Per weight, with everything that is stored for it."""
        return 8 * self.nbytes / self.parameters


def sizes(checkpoint: Checkpoint) -> dict[str, Size]:
    """`all`, and the parts that are there: `text`, `vision`, `MTP`. float32 originals count with what they repeat."""
    found = {}
    for part, prefixes in {"text": (TEXT, "lm_head."), "vision": (VISION,), "MTP": (MTP,)}.items():
        counts = [math.prod(shape) for name, shape in checkpoint.shapes.items() if name.startswith(prefixes)]
        originals = [e.nbytes for name, e in checkpoint.fp32_original.items() if name.startswith(prefixes)]
        if counts:
            found[part] = Size(sum(counts), checkpoint.nbytes(prefixes) + sum(originals))
    whole = Size(sum(size.parameters for size in found.values()), sum(size.nbytes for size in found.values()))
    return {"all": whole} | found


def quality(checkpoint: Checkpoint, facts: Facts) -> dict[str, Any]:
    """Everything that was measured, for programs: what stands in quality.json."""
    values: dict[str, Any] = {
        "source": _last(facts.source),
        **({"commit": facts.commit} if facts.commit else {}),
        **({"adapter": facts.adapter} if facts.adapter else {}),
        "recipe": facts.recipe,
        "rounding": facts.rounding,
        "versions": {program: version(program) for program in _PROGRAMS},
        "sizes": {part: asdict(size) | {"bits_per_weight": size.bits} for part, size in sizes(checkpoint).items()},
        "tensors": {name: _tensor(checkpoint, facts, name) for name in _matrices(checkpoint)},
    }
    if facts.evaluation:
        values["evaluation"] = {"text": facts.text} | asdict(facts.evaluation)
    return values


def _tensor(checkpoint: Checkpoint, facts: Facts, name: str) -> dict[str, Any]:
    quantization, error = checkpoint.quantization(name), facts.errors.get(name)
    measured = {"relative_squared_error": error.relative, "largest_error": error.largest} if error else {}
    return {"quantization": quantization and asdict(quantization)} | measured


def _matrices(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every matrix that the folder holds."""
    return {name: shape for name, shape in checkpoint.shapes.items() if is_matrix(name, shape)}


# --- the plot --------------------------------------------------------------------------------------------------------


def _plot(checkpoint: Checkpoint, facts: Facts) -> str:
    """An SVG; "" where nothing was measured."""
    errors: dict[str, dict[int, float]] = defaultdict(dict)
    for (group, layer), names in _by_layer(checkpoint, facts).items():
        sizes = [math.prod(checkpoint.shapes[name]) for name in names]
        squares = sum(facts.errors[name].relative * size for name, size in zip(names, sizes, strict=True))
        errors[group][layer] = math.sqrt(squares / sum(sizes))
    stream = facts.evaluation.layers if facts.evaluation else ()
    return plot(checkpoint.config.text.layer_types, errors, stream) if errors or stream else ""


def _by_layer(checkpoint: Checkpoint, facts: Facts) -> dict[tuple[str, int], list[str]]:
    """(group, layer) -> the names of its matrices whose errors are known."""
    found: dict[tuple[str, int], list[str]] = defaultdict(list)
    for group, names in groups(checkpoint).items():
        for name in names:
            if name in facts.errors and name.startswith(f"{TEXT}layers."):
                found[group, int(name.removeprefix(f"{TEXT}layers.").split(".")[0])].append(name)
    return found


# --- the card --------------------------------------------------------------------------------------------------------


def card(checkpoint: Checkpoint, facts: Facts) -> str:
    """The model card: front matter as Hugging Face reads it, then what was done and measured, then how to use it."""
    sections = [
        _front_matter(checkpoint, facts),
        f"# {facts.name}\n\n{_opening(facts)}",
        _sizes(checkpoint),
        _settings(checkpoint, facts),
        _measured(checkpoint, facts),
        _context(checkpoint),
        _use(checkpoint, facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(checkpoint: Checkpoint, facts: Facts) -> str:
    task = "image-text-to-text" if has_vision(checkpoint) else "text-generation"
    bits = checkpoint.config.quantization.get("bits")
    base = facts.source if _is_hub_id(facts.source) else None
    lines = ["---"]
    lines += [f"license: {facts.license}"] if facts.license else []
    lines += [f"base_model: {base}"] if base else []
    relation = "finetune" if facts.adapter else "quantized" if bits else ""
    lines += [f"base_model_relation: {relation}"] if base and relation else []
    lines += ["library_name: mlx", f"pipeline_tag: {task}", "tags:"]
    return "\n".join([*lines, "- mlx", "- qwen3_5", *([f"- {bits}-bit"] if bits else []), "---"])


def _opening(facts: Facts) -> str:
    versions = " with ".join(f"{program} {version(program)}" for program in reversed(_PROGRAMS))
    made = f"{_last(facts.source)} for MLX, converted by {versions}"
    lines = [f"{made}: recipe `{facts.recipe}`, rounding `{facts.rounding}`.", ""]
    if facts.adapter:
        lines += [f"An adapter is fused into the weights of {_last(facts.source)}: {described(facts.adapter)}.", ""]
    return "\n".join([*lines, *(f"- {reason}" for reason in facts.reasons)]).rstrip()


def _sizes(checkpoint: Checkpoint) -> str:
    rows = [
        [part, f"{size.parameters / 1e6:,.1f} M", f"{size.nbytes / 1e9:#.4g}", f"{size.bits:.3f}"]
        for part, size in sizes(checkpoint).items()
    ]
    return "## Size\n\nGB is 10^9 bytes.\n\n" + markdown(["part", "weights", "GB", "bits per weight"], rows)


def _settings(checkpoint: Checkpoint, facts: Facts) -> str:
    """A row for the matrices of one kind and one quantization, with their layers where these are not all."""
    kinds: dict[str, dict[Quantization | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in _matrices(checkpoint):
        kinds[re.sub(r"\.\d+\.", ".N.", name.removesuffix(".weight"))][checkpoint.quantization(name)].append(name)
    rows = []
    for kind, variants in kinds.items():
        for quantization, names in variants.items():
            found = [n for name in names for n in re.findall(r"\.(\d+)\.", name)]
            layers = "all" if found and len(variants) == 1 else ", ".join(found)
            squares = [facts.errors[name].relative for name in names if name in facts.errors]
            error = [f"{100 * math.sqrt(sum(squares) / len(squares)):.2f} %"] if squares else [""]
            stored = str(quantization or checkpoint.entries[names[0]].dtype.replace("F", "float").lower())
            rows.append([f"`{kind}`", layers, stored, str(len(names)), *(error if facts.errors else [])])
    note = " `error` is the root of the relative squared error, over the matrices of a row." if facts.errors else ""
    header = ["matrices", "N", "stored as", "count", *(["error"] if facts.errors else [])]
    opening = f"Norms, convolutions, `A_log`, `dt_bias` and biases are not quantized.{note}"
    return f"## How it is stored\n\n{opening}\n\n{markdown(header, rows)}"


def _measured(checkpoint: Checkpoint, facts: Facts) -> str:
    e, parts = facts.evaluation, []
    if e:
        rows = [
            ["perplexity of the source", f"{e.source_perplexity:.4f}"],
            ["perplexity", f"{e.perplexity:.4f}"],
            ["KL divergence from the source, mean, nats", f"{e.kl:.5f}{_plus_minus(e.kl_error, 5)}"],
            ["KL divergence, 99th percentile", f"{e.kl_99:.5f}"],
            ["same most likely token", f"{100 * e.top1:.2f} %" + _plus_minus(e.top1_error and 100 * e.top1_error, 2)],
        ]
        error = "; ± is one standard error" if e.kl_error is not None else ""
        source = "the source with the adapter" if facts.adapter else "the source"
        told = f"{e.positions} tokens of {facts.text or 'a text'} in {e.sequences} pieces, against {source}{error}."
        parts.append(f"{told}\n\n{markdown(['figure', ''], rows)}")
    if _plot(checkpoint, facts):
        parts.append(f"Error, root of its mean square as a share of the source's, layer by layer:\n\n![]({PLOT})")
    if not parts:
        return ""
    return "## Measured\n\n" + "\n\n".join([*parts, f"All figures, tensor by tensor, are in `{QUALITY}`."])


def _plus_minus(error: float | None, digits: int) -> str:
    return "" if error is None else f" ± {error:.{digits}f}"


def _context(checkpoint: Checkpoint) -> str:
    yarn, window = checkpoint.config.text.rope.yarn, checkpoint.config.text.max_position_embeddings
    if yarn is None:
        return ""
    return (
        f"## Context\n\n{window:,} tokens: `config.json` scales positions by YaRN, factor {yarn.factor:g} over the "
        f"{yarn.original:,} of training. That changes answers to short texts too; `mlx_qwen35.generate --rope-scaling "
        "none` leaves it out. transformers and mlx-lm scale alike; mlx-vlm ignores it, and vLLM has another ramp."
    )


def _use(checkpoint: Checkpoint, facts: Facts) -> str:
    sees = has_vision(checkpoint)
    image = ' --image photo.jpg --prompt "What do you see?"' if sees else ' --prompt "Hello"'
    lines = [
        f"mlx_qwen35.generate --model {facts.name}{image}",
        f'mlx_lm.generate --model {facts.name} --prompt "Hello"',
        *([f"mlx_vlm.generate --model {facts.name}{image}"] if sees else []),
    ]
    return "## Use\n\n```\n" + "\n".join(lines) + "\n```"


def _last(source: str) -> str:
    return source if _is_hub_id(source) else Path(source).name


def _is_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).expanduser().exists()
