"""A process of its own that goes on from saved caches: python going_on.py FOLDER prints the tokens of each as JSON.

FOLDER/NAME is a cache of one row of nano, its metadata the position, and the last token and options to go on with.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_qwen35 import Cache, Model, Processor, generate, load
from mlx_qwen35.cache.layer import CachePosition
from mlx_qwen35.cache.session_arrays import read_places, session_arrays
from mlx_qwen35.cache.session_file import SessionFile


def save(path: Path, model: Model, cache: Cache, last: int, options: Mapping[str, Any]) -> None:
    """options: of generate, and the kv_bits of the model."""
    position = [cache.row_lengths, cache.next_positions]
    file = SessionFile(path)
    file.write({"go_on": json.dumps([position, last, options])}, session_arrays([cache], model.make_cache()))
    file.close()


def go_on(path: Path, models: dict[str | None, Any]) -> tuple[int, ...]:
    file = SessionFile(path)
    position, last, options = json.loads(file.header().metadata["go_on"])
    bits = options.pop("kv_bits")
    if bits not in models:
        models[bits] = load("nano", kv_bits=bits)
    model, processor = models[bits]
    (cache,), _ = read_places(file.arrays(), model.make_cache(), [CachePosition(*map(tuple, position))])
    bias = never_ending(processor)
    return generate(model, processor, [last], cache=cache, logit_bias=bias, **options).tokens


def never_ending(processor: Processor) -> dict[int, float]:
    """The logit_bias of an answer that goes on to max_tokens."""
    return dict.fromkeys(map(int, processor.stop_ids), -1e9)


if __name__ == "__main__":
    loaded: dict[str | None, Any] = {}
    print(json.dumps({path.name: go_on(path, loaded) for path in sorted(Path(sys.argv[1]).iterdir())}))
