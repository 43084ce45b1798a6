"""JSON to a schema: a fact, a small JSON schema that asks for some of what it says, the answer in JSON."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tasks.figures import COLOURS
from tasks.items import Context, Task, Turn, join
from tasks.names import CITIES, NAMES
from tasks.tools import SKIES

GOODS = ("milk", "bread", "eggs", "tea", "rice", "apples")
STRING, INTEGER, NUMBER, BOOLEAN = ({"type": name} for name in ("string", "integer", "number", "boolean"))


@dataclass(frozen=True)
class Kind:
    """A kind of fact: the schema of each thing it tells, values for them, and the sentence that tells them."""

    properties: dict[str, dict[str, Any]]
    draw: Callable[[Random], dict[str, Any]]
    tell: Callable[[dict[str, Any]], str]


def _draw_list(rng: Random) -> dict[str, Any]:
    items = rng.sample(GOODS, rng.randint(1, 4))
    return {"items": items, "count": len(items)}


KINDS = (
    Kind(
        {"name": STRING, "age": INTEGER, "city": STRING},
        lambda rng: {"name": rng.choice(NAMES), "age": rng.randint(5, 99), "city": rng.choice(CITIES)},
        lambda v: f"This is {v['name']}, {v['age']} years old, from {v['city']}.",
    ),
    Kind(
        {"city": STRING, "degrees": NUMBER, "sky": {"type": "string", "enum": list(SKIES)}},
        lambda rng: {
            "city": rng.choice(CITIES),
            "degrees": rng.randint(-9, 39) if rng.random() < 0.5 else rng.randint(0, 38) + 0.5,
            "sky": rng.choice(SKIES),
        },
        lambda v: f"It is {v['degrees']} degrees and {v['sky']} in {v['city']}.",
    ),
    Kind(
        {"item": STRING, "count": INTEGER, "paid": BOOLEAN},
        lambda rng: {"item": rng.choice(GOODS), "count": rng.randint(1, 99), "paid": rng.random() < 0.5},
        lambda v: f"Order: {v['count']} {v['item']}, {'paid' if v['paid'] else 'not paid'}.",
    ),
    Kind(
        {"colour": STRING, "point": {"type": "object", "properties": {"x": INTEGER, "y": INTEGER}}},
        lambda rng: {
            "colour": rng.choice(list(COLOURS)),
            "point": {"x": rng.randint(0, 20), "y": rng.randint(0, 20)},
        },
        lambda v: f"A {v['colour']} point at {v['point']['x']}, {v['point']['y']}.",
    ),
    Kind(
        {"items": {"type": "array", "items": STRING}, "count": INTEGER},
        _draw_list,
        lambda v: f"The list has {join(v['items'])}.",
    ),
)
REQUESTS = (
    "Answer in JSON that fits this schema: {}",
    "Write JSON for this schema: {}",
    "Give me JSON. The schema: {}",
)


def _fact(rng: Random, easy: bool) -> Context:
    """A fact and a schema, which stands in the system message half the time and else in the question."""
    kind = rng.choice(KINDS)
    values = kind.draw(rng)
    keys = rng.sample(list(kind.properties), 1 if easy else rng.randint(1, len(kind.properties)))
    schema = {"type": "object", "properties": {key: kind.properties[key] for key in keys}, "required": keys}
    fact, request = kind.tell(values), rng.choice(REQUESTS).format(json.dumps(schema))
    answer = {key: values[key] for key in keys}
    if rng.random() < 0.5:
        return Context((fact, fact, answer), history=({"role": "system", "content": request},), schema=schema)
    question = rng.choice((f"{fact} {request}", f"{fact}\n{request}", f"{request}\n{fact}"))
    return Context((fact, question, answer), schema=schema)


def _write(rng: Random, context: Context) -> Turn:
    fact, question, answer = context.data
    return Turn(question, f"The schema has {join(list(answer))}.", json.dumps(answer), f"json:{fact}")


JSON_SCHEMA = Task("json_schema", _fact, _write)
