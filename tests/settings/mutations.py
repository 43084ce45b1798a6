"""JSON files with one value exchanged: for every field of a file, everything that a field should not be."""

import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

_PLACE = "(the value)"
_MOST = 4  # of the members of a long list or object: the first ones and the last

# As they stand in a file: json.dumps does not write all of these.
NASTY = {
    "null": "null", "true": "true", "false": "false", "zero": "0", "one": "1", "three": "3", "minus": "-1",
    "float of a whole": "4.0", "half": "0.5", "below zero": "-0.5", "tiny": "1e-300", "huge": "1e300",
    "NaN": "NaN", "infinity": "Infinity", "minus infinity": "-Infinity", "past infinity": "1e400",
    "million": str(10**6), "10**8": str(10**8), "10**12": str(10**12), "2**63": str(2**63), "10**400": str(10**400),
    "5,000 digits": "9" * 5000, "empty": '""', "word": '"x"', "number as a word": '"4"', "yes": '"yes"',
    "surrogate": r'"\ud800"', "zero byte": r'"\u0000"', "long": '"' + "x" * 5000 + '"',
    "list": "[]", "list of a list": "[[]]", "list of null": "[null]", "counts": "[1, 2, 3]",
    "three NaN": "[NaN, NaN, NaN]",
    "three huge": f"[{10**400}, 1e400, -1]", "object": "{}", "object of an object": '{"x": {"x": []}}',
    "900 deep": "[" * 900 + "]" * 900, "100,000 deep": "[" * 100_000 + "]" * 100_000,
    "900 objects deep": '{"x":' * 900 + "1" + "}" * 900,
}  # fmt: skip


def paths(values: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where there is a value, the outermost left out; of long lists and objects a few members."""
    if not isinstance(values, (dict, list)):
        return
    members = list(values.items()) if isinstance(values, dict) else list(enumerate(values))
    if len(members) > 40 or (isinstance(values, list) and len(members) > _MOST):
        members = members[: _MOST - 1] + members[-1:]
    for key, value in members:
        yield (*path, key)
        yield from paths(value, (*path, key))


def mutants(values: dict[str, Any], step: int = 1) -> Iterator[tuple[str, str]]:
    """What was changed, and the file: every value exchanged for every nasty one, left out, and there twice.

    step: only every so many-th of them is made.
    """
    changes = itertools.product(paths(values), (*NASTY, "left out", "twice"))
    for path, label in itertools.islice(changes, 0, None, step):
        name = ".".join(map(str, path))
        if label in NASTY:
            yield f"{name}: {label}", _with(values, path, NASTY[label])
        elif label == "left out":
            changed, holder = _holder(values, path)
            del holder[path[-1]]
            yield f"{name}: left out", json.dumps(changed)
        elif isinstance(path[-1], str):
            yield f"{name}: twice", _with(values, path, f"1, {json.dumps(path[-1])}: {json.dumps(_at(values, path))}")


def bare() -> Iterator[tuple[str, bytes]]:
    """Files that hold something else than an object."""
    yield from ((label, raw.encode()) for label, raw in NASTY.items() if not raw.startswith("{"))
    yield "nothing", b""
    yield "not UTF-8", b'{"x": "\xff\xfe"}'
    yield "UTF-16", '{"x": 1}'.encode("utf-16")
    yield "cut short", b'{"x": '
    yield "two objects", b"{}{}"
    yield "brackets", b"[" * 1_000_000


def _at(values: Any, path: tuple) -> Any:
    for key in path:
        values = values[key]
    return values


def _holder(values: Any, path: tuple) -> tuple[Any, Any]:
    changed = copy.deepcopy(values)
    return changed, _at(changed, path[:-1])


def _with(values: Any, path: tuple, raw: str) -> str:
    changed, holder = _holder(values, path)
    holder[path[-1]] = _PLACE
    return json.dumps(changed).replace(json.dumps(_PLACE), raw, 1)
