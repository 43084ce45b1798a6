"""--mtp: GPU launches of a step of our decoding, by part and by the number of drafts.

Depth 0 is a step without drafts: the launches of a token, and sampling. See draft_step.py.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mlx_qwen35.console.table import align
from mlx_qwen35.engine.drafts.speculate import MOST_DEPTH

from .dispatches import AROUND, OURS, count, recorded
from .draft_step import DRAFT_LOGITS, HEAD, LOGITS, ROWS, SAMPLING, SETTLING, parts

_MEANING = {
    HEAD: "the pairs that wait are joined, embedded and read, and the drafts' tokens joined",
    SETTLING: "what the next step starts from; the cache goes back without a launch",
    SAMPLING: "greedy, and whether logits are finite",
}

Steps = Mapping[int, Counter[str]]  # depth -> launches by part


def count_drafts(config: Mapping[str, Any], recipe: str = "uniform", most: int = MOST_DEPTH) -> Steps:
    """Of a model with this config.json, at depths 0 to `most`. CountError where it cannot be recorded."""
    return {depth: _parts(recorded(OURS, config, recipe, depth), depth) for depth in range(most + 1)}


def _parts(nodes: list[Mapping[str, Any]], depth: int) -> Counter[str]:
    """What is in front of the first part, or shared by two, is made for the head."""
    names = parts(depth)
    found: Counter[str] = Counter()
    for place, launches in count(nodes, len(names)).places.items():
        found[(HEAD if depth else ROWS) if place == AROUND else names[place]] += launches.total()
    return found


def format_drafts(steps: Steps) -> str:
    """A table with a column for each depth."""
    title = ("launches of a step", *(f"depth {depth}" if depth else "no drafts" for depth in steps), "depth 1 adds")
    names = (HEAD, DRAFT_LOGITS, ROWS, LOGITS, SETTLING, SAMPLING)
    table = [(name, *(str(own[name] or "") for own in steps.values()), _added(steps, name)) for name in names]
    totals = [own.total() for own in steps.values()]
    table.append(("step", *map(str, totals), f"{totals[1] - totals[0]}"))
    notes = [f"{name}: {meaning}" for name, meaning in _MEANING.items()]
    return "\n".join([*align([title, *table]), *notes])


def _added(steps: Steps, name: str) -> str:
    added = steps[1][name] - steps[0][name]
    return str(added) if added else ""
