"""Load two adapters beside one model, and answer with each, and with none, in one batch."""

import sys
import tempfile
from pathlib import Path

import mlx.core as mx

from mlx_qwen35 import batch_generate, load
from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.checkpoint.adapter_write import write_adapter
from mlx_qwen35.checkpoint.config import TextConfig

name = sys.argv[1] if len(sys.argv) > 1 else "nano"
QUESTION = "What is 34 + 58?"


def write_random(folder: Path, config: TextConfig, seed: int) -> None:
    """An adapter of random numbers for one map of each layer, so that answers differ. Give your own in its place."""
    a = mx.random.normal((2, config.intermediate_size), key=mx.random.key(seed))
    b = mx.random.normal((config.hidden_size, 2), key=mx.random.key(seed + 100))
    layers = range(config.num_hidden_layers)
    write_adapter(folder, {f"model.language_model.layers.{i}.mlp.down_proj.weight": Pair(a, b, 1.0) for i in layers})


config = load(name)[0].config
with tempfile.TemporaryDirectory() as place:
    folders = {"first": Path(place) / "first", "second": Path(place) / "second"}
    for seed, folder in enumerate(folders.values()):
        write_random(folder, config, seed)
    model, processor = load(name, adapter=folders)

print("loaded:", *(f"{own} ({model.adapters[own].format}, rank {model.adapters[own].rank})" for own in folders))
asked = ["base", *model.adapters.names]
answers = batch_generate(model, processor, [QUESTION] * 3, adapter=asked, enable_thinking=False, max_tokens=8, temp=0)
for who, answer in zip(asked, answers, strict=True):
    print(f"{who}: {answer}")
