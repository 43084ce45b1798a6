"""What a grammar costs on the host: python tests/engine/grammar_cost.py [FOLDER]

FOLDER holds the tokenizer of a published checkpoint. Without it a vocabulary of the same size is made of random words.
Printed: making the tables of the tokenizer once (CPU, memory), compiling, and a mask of 248,077 tokens, with each
answer's own text (written) and with random tokens (drawn); then a verify pass of 3 drafts with its going back.
"""

import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np

from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.engine.constraints.compiler import compiler_of
from mlx_qwen35.engine.constraints.constraint import Constraint
from mlx_qwen35.engine.constraints.grammar import compile_grammar
from mlx_qwen35.engine.constraints.raw import Raw
from mlx_qwen35.prompt.processor import Processor

SIZE = 248_077
STEP_MS = 40  # of the 4B in 4 bit on an M1, computed

FIELDS = {
    "type": "object",
    "properties": {
        "title": {"type": "string"}, "year": {"type": "integer"}, "rating": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}}, "kind": {"enum": ["film", "book", "song"]},
    },
    "required": ["title", "year", "rating", "tags", "kind"], "additionalProperties": False,
}  # fmt: skip
VALUE = {
    "title": 'The "long" road, part 2', "year": 1954, "rating": 8.5, "tags": ["war", "épée", "日本"], "kind": "film",
}  # fmt: skip
MANY = {
    "type": "object",
    "properties": {f"part_{i}": FIELDS for i in range(12)},
    "required": [f"part_{i}" for i in range(12)],
    "additionalProperties": False,
}
TOOL = {
    "name": "write_file",
    "parameters": {
        "type": "object",
        "properties": {
            "path": {"type": "string"}, "content": {"type": "string"}, "mode": {"type": "integer"},
            "append": {"type": "boolean"}, "meta": FIELDS,
        },
        "required": ["path", "content", "mode"],
    },
}  # fmt: skip


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def call() -> str:
    values = {"path": "src/main.py", "content": "def f(x):\n    return x < 2\n\n\nprint(f(1))\n" * 8, "mode": "420",
              "append": "true", "meta": as_json(VALUE)}  # fmt: skip
    lines = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    return f"<tool_call>\n<function=write_file>\n{lines}</function>\n</tool_call>"


CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "JSON, 5 fields": ({"json_schema": FIELDS}, [], as_json(VALUE)),
    "JSON, 60 nested": ({"json_schema": MANY}, [], as_json({f"part_{i}": VALUE for i in range(12)})),
    "any object": ({"response_format": {"type": "json_object"}}, [], as_json({"a": [VALUE] * 3})),
    "regex": ({"regex": r"[A-Z][a-z]+( [a-z]+){3,20}\."}, [], "The quick brown fox jumps over the lazy dog."),
    "a call": ({"tool_choice": "required"}, [TOOL], call()),
}


def folder_of_words(folder: Path) -> Path:
    """nano's files with a vocabulary of random words in the place of its own."""
    nano, rng = resolve("nano"), np.random.default_rng(0)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((nano / name).read_bytes())
    description = json.loads((nano / "tokenizer.json").read_text())
    added = [token["content"] for token in description["added_tokens"]]
    words = dict.fromkeys(word for word in description["model"]["vocab"] if word not in added)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxzETAOINS0123_ĠĠĠĠĊé"))
    while len(words) < SIZE - len(added):
        words["".join(rng.choice(letters, rng.integers(2, 12)))] = None
    first = SIZE - len(added)
    description["model"] |= {"vocab": {word: number for number, word in enumerate(words)}, "merges": []}
    for number, token in enumerate(description["added_tokens"], start=first):
        token["id"] = number
    (folder / "tokenizer.json").write_text(json.dumps(description))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def measured(work: Callable[[], Any]) -> tuple[Any, str]:
    """What it gives, and its cost."""
    wall, cpu, before = time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    given = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    megabytes = grown / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return given, f"{wall:.3f} s wall, {cpu:.3f} s of CPU, {megabytes:.0f} MB more at the peak"


def places(constraint: Constraint, tokens: Iterator[int] | None, stops: frozenset[int], size: int) -> Iterator[float]:
    """Seconds of each mask on the way of these tokens, or of random ones; negative in free strings."""
    rng = np.random.default_rng(0)
    while True:
        free = isinstance(cast(Any, constraint)._states[-1], Raw)
        began = time.perf_counter()
        mask = constraint.mask()
        seconds = time.perf_counter() - began
        yield -seconds if free else seconds
        if tokens is None:
            assert mask is not None
            numbers = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:size])
            token = int(rng.choice(numbers))
        else:
            token = next(tokens, -1)
        if token < 0 or token in stops:
            return
        constraint.accept(token)


def told(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    median, high, worst = np.percentile(np.array(seconds) * 1e6, [50, 95, 100])
    return f"{len(seconds):5d} masks: median {median:4.0f} us, p95 {high:5.0f}, worst {worst:6.0f}"


def main() -> None:
    print(platform.machine(), platform.system(), f"Python {platform.python_version()}",
          f"llguidance {version('llguidance')}", f"numpy {np.__version__}", sep=", ")  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else folder_of_words(Path(temporary))
        processor = Processor.from_folder(folder, parse_config(geometry("4b")), has_vision_encoder=False)
    print(f"{processor.vocabulary:,} tokens,", "published" if len(sys.argv) > 1 else "random words")
    import llguidance  # noqa: F401  (its import is not what is measured)

    compiler, cost = measured(lambda: compiler_of(processor))
    print("tables:", cost)
    print("llguidance's tokenizer:", measured(lambda: compiler.vocabulary.guidance)[1])
    print("masks of raw text:", measured(lambda: compiler.raw)[1])
    outside: list[float] = []
    for name, (options, tools, text) in CASES.items():
        made, cost = measured(lambda options=options, tools=tools: compile_grammar(processor, options, tools))
        print(f"\n{name}\n  compiled in {cost.split(' wall')[0]}")
        tokens = processor.tokenizer.encode(text)
        written = list(places(made(), iter(tokens), processor.stop_ids, processor.vocabulary))
        drawn = []
        for _ in range(4):
            walk = places(made(), None, processor.stop_ids, processor.vocabulary)
            drawn += [seconds for seconds, _ in zip(walk, range(200), strict=False)]
        for kind, seconds in (("written", written), ("drawn", drawn)):
            outside += [s for s in seconds if s > 0]
            print(f"  {kind:8s}", told([s for s in seconds if s > 0]))
            if inside := [-s for s in seconds if s < 0]:
                print(f"  {kind:8s}", told(inside), "(free strings)")
        print(f"  3 drafts  {verified(made(), tokens) * 1e6:.0f} us for 4 masks, 3 tokens and going back, median")
    share = np.median(outside) * 1e3 / STEP_MS
    print(f"\nall outside free strings {told(outside)}: {share:.2%} of a step of {STEP_MS} ms")


def verified(constraint: Constraint, tokens: list[int]) -> float:
    """Seconds of a verify pass: the masks of 4 rows, and 3 drafts that are taken back."""
    spent = []
    for place in range(len(tokens) - 3):
        began = time.perf_counter()
        for token in tokens[place : place + 3]:
            constraint.mask()
            constraint.accept(token)
        constraint.mask()
        constraint.rollback(3)
        spent.append(time.perf_counter() - began)
        constraint.accept(tokens[place])
    return float(np.median(spent))


if __name__ == "__main__":
    main()
