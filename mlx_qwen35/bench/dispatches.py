"""mlx_qwen35.bench --dispatches: how many kernels a program launches on Metal to decode one token.

From the token to the logits, batch 1, with a cache that holds some tokens; every matrix in 4 bits by groups of 64, the
rest bfloat16. Counted from the graph that MLX records, on any machine: each program records its own in a process of its
own (dispatch_worker.py), and what counts how much is written in dispatch_rule.py.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_qwen35.bench.dispatch_rule import BOUNDARY, Node, launches, left_out, stands_for
from mlx_qwen35.bench.layout import Layout, fresh
from mlx_qwen35.bench.measure import ProgramError
from mlx_qwen35.bench.report import align
from mlx_qwen35.config import parse_config

COUNTED = ("mlx-lm", "mlx-vlm")  # what --compare may name here
AROUND = "around"  # before the first layer, after the last, or shared by several


@dataclass
class Count:
    """Launches by place and operation. Places are the indices of layers, and AROUND.

    not_counted: launches that the rule leaves out though MLX makes them, by operation.
    """

    places: dict[int | str, Counter[str]] = field(default_factory=dict)
    not_counted: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(counter.total() for counter in self.places.values())


def count(nodes: Sequence[Mapping[str, Any]], layers: int = 0) -> Count:
    """Count what `markers.record` has recorded of a model with so many layers."""
    readers: Counter[str] = Counter(array[0] for node in nodes for array in node["inputs"])
    places = _places(nodes, layers)
    layouts: dict[str, Layout] = {}
    result = Count()
    for index, raw in enumerate(nodes):
        inputs = [layouts.setdefault(name, fresh(shape)) for name, shape, _ in raw["inputs"]]
        shapes = [tuple(shape) for _, shape, _ in raw["outputs"]]
        sizes = [size for _, _, size in raw["inputs"]]
        shared = bool(inputs) and readers[raw["inputs"][0][0]] > 1
        node = Node(raw["name"], raw["arguments"], inputs, shapes, sizes, shared)
        number, outputs = launches(node)
        layouts |= {output[0]: layout for output, layout in zip(raw["outputs"], outputs, strict=True)}
        if number:
            result.places.setdefault(places[index], Counter())[operation(raw)] += number
        if omitted := left_out(node.name, node.arguments):
            result.not_counted[operation(raw)] += omitted
    return result


_KINDS = {
    "Reduce": ("and", "or", "sum", "prod", "min", "max"),
    "BitwiseBinary": ("and", "or", "xor", "left shift", "right shift"),
    "ArgReduce": ("argmin", "argmax"),
}


def operation(raw: Mapping[str, Any]) -> str:
    """A name for the table: "Multiply", "sum", "rms_norm", "compiled swiglu", "kernel gated_delta_step"."""
    name, arguments = raw["name"], raw["arguments"]
    if label := stands_for(name, arguments):
        return re.sub(r"^compiled_\d+_\d+_", "compiled ", label).removesuffix("_partly")
    if name == "CustomKernel":
        label = arguments[0].removeprefix("custom_kernel_")
        return "kernel " + re.sub(r"_+(bool|u?int\d+_t|float16_t|bfloat16_t|float|\d+).*$", "", label)
    if name in _KINDS:
        return _KINDS[name][arguments[0]]
    return "Rsqrt" if name == "Sqrt" and arguments == [True] else name


def _places(nodes: Sequence[Mapping[str, Any]], layers: int) -> list[int | str]:
    """Where each node belongs: the layer whose beginning it follows, or, following none, the only one that uses it."""
    after: dict[str, int] = {}
    begun = -1
    own: list[int] = []
    for node in nodes:
        place = max((after.get(array[0], -1) for array in node["inputs"]), default=-1)
        if _begins_a_layer(node):
            begun = place = begun + 1
        own.append(place)
        after |= {array[0]: place for array in node["outputs"]}
    users: dict[str, set[int]] = {}
    for index, node in reversed(list(enumerate(nodes))):
        uses = {own[index]}
        if _begins_a_layer(node):
            uses = {-1}
        elif own[index] < 0:
            uses = set().union(*(users.get(array[0], set()) for array in node["outputs"]))
            own[index] = next(iter(uses)) if len(uses) == 1 else -1
        for array in node["inputs"]:
            users.setdefault(array[0], set()).update(uses)
    return [place if 0 <= place < layers else AROUND for place in own]


def _begins_a_layer(node: Mapping[str, Any]) -> bool:
    return stands_for(node["name"], node["arguments"]) == BOUNDARY


# --- programs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Layers of one kind together, or what is around them."""

    layers: int  # 1 of what is around
    operations: Counter[str]

    @property
    def dispatches(self) -> int:
        return self.operations.total()


@dataclass(frozen=True)
class Dispatches:
    """Of one token. places: "linear_attention", "full_attention" and AROUND."""

    places: Mapping[str, Place]
    not_counted: Counter[str]

    @property
    def total(self) -> int:
        return sum(place.dispatches for place in self.places.values())


def count_program(program: str, config: Mapping[str, Any]) -> Dispatches:
    """Count one token of a model with this config.json. ProgramError where the program cannot record it."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("dispatch_worker.py")), program]
    done = subprocess.run(command, input=json.dumps(config), capture_output=True, text=True)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise ProgramError(program, f"{said[-1]} (ended with code {done.returncode})")
    return by_kind(json.loads(done.stdout)["nodes"], parse_config(config).text.layer_types)


def by_kind(nodes: Sequence[Mapping[str, Any]], layer_types: Sequence[str]) -> Dispatches:
    """The launches of a recorded token, by the kind of the layers."""
    counted = count(nodes, len(layer_types))
    kinds = (*dict.fromkeys(layer_types), AROUND)
    of_layer = {AROUND: AROUND} | dict(enumerate(layer_types))
    operations = {kind: Counter() for kind in kinds}
    for place, counter in counted.places.items():
        operations[of_layer[place]].update(counter)
    layers = Counter(layer_types) | {AROUND: 1}
    return Dispatches({kind: Place(layers[kind], operations[kind]) for kind in kinds}, counted.not_counted)


def format_dispatches(title: str, counts: Mapping[str, Dispatches]) -> str:
    """A table of all programs, then one of each by operation; figures of layers are of one layer."""
    kinds = list(next(iter(counts.values())).places)
    heads = [kind if kind == AROUND else f"{kind} layer" for kind in kinds]
    rows = [("program", *heads, "token", "not counted")]
    for program, found in counts.items():
        cells = [_each(place, place.dispatches) for place in found.places.values()]
        rows.append((program, *cells, str(found.total), str(found.not_counted.total())))
    lines = [title, "", *align(rows)]
    for program, found in counts.items():
        lines += ["", *align([(program, *heads, "token"), *_operations(found)])]
    for program, found in counts.items():
        if more := found.not_counted.total():
            said = ", ".join(f"{number} of {name}" for name, number in found.not_counted.most_common())
            lines += ["", f"{program}: MLX launches {more} more, which the rule leaves out: {said}"]
    return "\n".join(lines)


def _each(place: Place, number: int) -> str:
    """Of one of its layers."""
    return f"{number / place.layers:.4g}" if number else ""


def _operations(found: Dispatches) -> list[tuple[str, ...]]:
    """A row for each operation, the most frequent first."""
    every = sum((place.operations for place in found.places.values()), Counter())
    return [
        (name, *(_each(place, place.operations[name]) for place in found.places.values()), str(number))
        for name, number in every.most_common()
    ]


def write_dispatches(path: Path, counts: Mapping[str, Dispatches]) -> None:
    """Everything counted, as JSON by program; figures of layers are of all layers of the kind."""
    content = {
        program: {
            "dispatches_per_token": found.total,
            "places": {
                kind: {"layers": place.layers, "dispatches": place.dispatches, "operations": dict(place.operations)}
                for kind, place in found.places.items()
            },
            "not_counted": dict(found.not_counted),
        }
        for program, found in counts.items()
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
