"""How many kernels a program launches on Metal to decode one token, and how many bytes they move.

From the token to the logits, batch 1, with a cache that holds some tokens; matrices are packed by one of RECIPES, the
rest is bfloat16. Counted from the graph that MLX records, on any machine: each program records its own in a process of
its own (worker.py). What counts how many launches is written in dispatch_rule.py, how many bytes in
byte_rule.py.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.console.table import align

from .byte_rule import Bytes, moved
from .dispatch_rule import BOUNDARY, Node, launches, left_out, stands_for
from .layout import Layout, fresh

ROOT = Path(__file__).parents[3]  # of the repository
WORKER = "tests.dispatches.count.worker"
OURS, PEERS = "mlx_qwen35", ("mlx-lm", "mlx-vlm")  # what --compare may name here
# Matrices whose name ends so have other bits than 4, None for not packed; groups are of 64.
RECIPES: Mapping[str, Mapping[str, int | None]] = {
    "uniform": {},
    "mixed": {
        "linear_attn.out_proj": 8, "self_attn.o_proj": 8, "linear_attn.in_proj_a": None, "linear_attn.in_proj_b": None
    },
}  # fmt: skip
AROUND = "around"  # before the first layer, after the last, or shared by several


@dataclass
class Count:
    """Launches by place and operation, and the bytes that they move. Places are the indices of layers, and AROUND.

    not_counted: launches that the rule leaves out though MLX makes them, by operation.
    """

    places: dict[int | str, Counter[str]] = field(default_factory=dict)
    bytes: dict[int | str, Bytes] = field(default_factory=dict)
    not_counted: Counter[str] = field(default_factory=Counter)


def count(nodes: Sequence[Mapping[str, Any]], layers: int = 0) -> Count:
    """Count what `markers.record` has recorded of a model with so many layers."""
    readers: Counter[str] = Counter(array[0] for node in nodes for array in node["inputs"])
    places = _places(nodes, layers)
    layouts: dict[str, Layout] = {}
    made: set[str] = set()  # arrays that a launch has written, and views of them
    result = Count()
    for place, raw in zip(places, nodes, strict=True):
        inputs, shapes, sizes = _columns(raw["inputs"])
        outputs, output_shapes, output_sizes = _columns(raw["outputs"])
        lying = [layouts.setdefault(name, fresh(shape)) for name, shape in zip(inputs, shapes, strict=True)]
        given = [name not in made for name in inputs]
        shared = bool(inputs) and readers[inputs[0]] > 1
        node = Node(raw["name"], raw["arguments"], inputs, lying, sizes, given, shared, output_shapes, output_sizes)
        found = launches(node)
        layouts |= zip(outputs, found.outputs, strict=True)
        if found.launches or not all(given):
            made.update(outputs)
        if found.launches:
            result.places.setdefault(place, Counter())[operation(raw)] += found.launches
            result.bytes[place] = result.bytes.get(place, Bytes()) + moved(node, found)
        if omitted := left_out(node.name, node.arguments):
            result.not_counted[operation(raw)] += omitted
    return result


def _columns(ends: Sequence[Any]) -> tuple[list[str], list[tuple[int, ...]], list[int]]:
    """Names, shapes and bytes of an element, of the inputs or outputs of a recorded node."""
    return [name for name, _, _ in ends], [tuple(shape) for _, shape, _ in ends], [size for _, _, size in ends]


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


class CountError(Exception):
    """A program could not be recorded; the message is the reason."""


@dataclass(frozen=True)
class Place:
    """Layers of one kind together, or what is around them."""

    layers: int  # 1 of what is around
    operations: Counter[str]
    bytes: Bytes

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

    @property
    def bytes(self) -> Bytes:
        return sum((place.bytes for place in self.places.values()), Bytes())


def count_program(
    program: str, config: Mapping[str, Any], recipe: str = "uniform", rows: int = 1, rank: int = 0, adapters: int = 1
) -> Dispatches:
    """Count one token of each row of a model with this config.json. CountError where the program cannot record it.

    rank, adapters: the rows have so many adapters of this rank in turn, of our program; 0: none.
    """
    nodes = recorded(program, config, recipe, rows=rows, beside=(rank, adapters) if rank else ())
    return by_kind(nodes, parse_config(config).text.layer_types)


def recorded(
    program: str, config: Mapping[str, Any], recipe: str, depth: int = -1, rows: int = 1, beside: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """The nodes of a token of each row; with a depth from 0 on, of a step of our decoding of one row with so many
    drafts. beside: rank and number of adapters.
    """
    steps = map(str, (rows, depth, *beside))
    command = [sys.executable, "-m", WORKER, program, json.dumps(RECIPES[recipe]), *steps]
    done = subprocess.run(command, input=json.dumps(config), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise CountError(f"{said[-1]} (ended with code {done.returncode})")
    return json.loads(done.stdout)["nodes"]


def by_kind(nodes: Sequence[Mapping[str, Any]], layer_types: Sequence[str]) -> Dispatches:
    """The launches of a recorded token, by the kind of the layers."""
    counted = count(nodes, len(layer_types))
    kinds = (*dict.fromkeys(layer_types), AROUND)
    of_layer = {AROUND: AROUND} | dict(enumerate(layer_types))
    operations = {kind: Counter() for kind in kinds}
    amounts = {kind: Bytes() for kind in kinds}
    for place, counter in counted.places.items():
        operations[of_layer[place]].update(counter)
        amounts[of_layer[place]] += counted.bytes[place]
    layers = Counter(layer_types) | {AROUND: 1}
    places = {kind: Place(layers[kind], operations[kind], amounts[kind]) for kind in kinds}
    return Dispatches(places, counted.not_counted)


def format_dispatches(title: str, counts: Mapping[str, Dispatches]) -> str:
    """Two tables of all programs, launches and bytes, then one of each by operation; figures of layers are of one."""
    kinds = list(next(iter(counts.values())).places)
    heads = [kind if kind == AROUND else f"{kind} layer" for kind in kinds]
    rows = [("program", *heads, "token", "not counted")]
    for program, found in counts.items():
        cells = [_each(place, place.dispatches) for place in found.places.values()]
        rows.append((program, *cells, str(found.total), str(found.not_counted.total())))
    lines = [title, "", *align(rows), "", *align([("MB of device memory", *heads, "token"), *_megabytes(counts)])]
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


def _megabytes(counts: Mapping[str, Dispatches]) -> list[tuple[str, ...]]:
    """Four rows for each program."""
    rows = []
    for program, found in counts.items():
        columns = [
            [f"{number / layers / 1e6:.3f}" for number in (amount.total, amount.read, amount.written, amount.rest)]
            for amount, layers in [*((place.bytes, place.layers) for place in found.places.values()), (found.bytes, 1)]
        ]
        names = (program, "  read", "  written", "  beside matrices")
        rows += [(name, *cells) for name, *cells in zip(names, *columns, strict=True)]
    return rows


def _operations(found: Dispatches) -> list[tuple[str, ...]]:
    """A row for each operation, the most frequent first."""
    every = sum((place.operations for place in found.places.values()), Counter())
    return [
        (name, *(_each(place, place.operations[name]) for place in found.places.values()), str(number))
        for name, number in every.most_common()
    ]


def as_json(
    geometry: str, recipe: str, counts: Mapping[str, Dispatches], drafts: Mapping[int, Counter[str]] | None = None
) -> str:
    """Everything counted, by program; figures of layers are of all layers of the kind.

    drafts: of our steps with drafts, launches by part, by depth.
    """
    content = {
        "dispatches_per_token": counts[OURS].total,
        "geometry": geometry,
        "recipe": recipe,
        "programs": {program: _figures(found) for program, found in counts.items()},
    }
    if drafts:
        content["steps_with_drafts"] = {depth: dict(own) for depth, own in drafts.items()}
    return json.dumps(content, indent=2) + "\n"


def _figures(found: Dispatches) -> dict[str, Any]:
    return {
        "dispatches_per_token": found.total,
        "device_bytes_per_token": found.bytes.total,
        "device_bytes": asdict(found.bytes),
        "places": {
            kind: {
                "layers": place.layers,
                "dispatches": place.dispatches,
                "device_bytes": asdict(place.bytes),
                "operations": dict(place.operations),
            }
            for kind, place in found.places.items()
        },
        "not_counted": dict(found.not_counted),
    }
