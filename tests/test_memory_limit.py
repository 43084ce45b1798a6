"""The memory limit belongs to the model that was loaded with it."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from refusing import refused

from mlx_qwen35 import Conversation, Model, Processor, VisionOptions, generate, load
from mlx_qwen35.backend import backend
from mlx_qwen35.budget.chunk import suitable_chunk
from mlx_qwen35.budget.plan import plan_memory, this_machine
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.random import geometry

LARGE = np.zeros((1200, 1600, 3), np.uint8)
FRAMES = np.zeros((6, 1200, 1600, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano, with the pixels of the published checkpoints."""
    folder = shutil.copytree(resolve("nano"), tmp_path_factory.mktemp("limit") / "nano")
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["size"] = {"shortest_edge": 4096, "longest_edge": 1 << 24}
        (folder / name).write_text(json.dumps(settings))
    return folder


def told() -> tuple[int, int]:
    """MLX's limits of all memory, and of freed buffers."""
    limits = mx.set_memory_limit(1 << 40), mx.set_cache_limit(0)
    mx.set_memory_limit(limits[0])
    mx.set_cache_limit(limits[1])
    return limits


def told_while_generating(model: Model, processor: Processor) -> set[tuple[int, int]]:
    seen: set[tuple[int, int]] = set()
    generate(model, processor, [5, 6, 7], max_tokens=1, progress=lambda done, total: seen.add(told()))
    return seen


def told_in_a_conversation(model: Model, processor: Processor) -> set[tuple[int, int]]:
    seen: set[tuple[int, int]] = set()
    turn = Conversation(model, processor, max_tokens=1).send("Hi", progress=lambda done, total: seen.add(told()))
    list(turn)
    return seen


def allowed(model: Model, processor: Processor) -> dict[str, Any]:
    """What follows from a model's limit."""
    machine = this_machine(model.config, model.dtype, model.memory_limit)
    return {
        "bytes": (model.memory_limit, processor.memory_limit),
        "chunk": suitable_chunk(parse_config(geometry("4b")).text, mx.float16, model.memory_limit, 4096),
        "plan": plan_memory(open_checkpoint(resolve("nano")), machine, 4096),
        "image": processor.read("image", LARGE, VisionOptions()).grid,
        "video": processor.read("video", FRAMES, VisionOptions(source_fps=2)).grid,
        "MLX": told_while_generating(model, processor),
        "MLX in a conversation": told_in_a_conversation(model, processor),
    }


def test_a_second_load_changes_nothing_about_the_first(folder):
    first = load(folder, memory_limit=1.5)
    before = allowed(*first)
    assert before["bytes"] == (1_500_000_000, 1_500_000_000)
    second = load(folder, memory_limit=13)
    other = allowed(*second)
    assert not [name for name in before if before[name] == other[name]]
    assert allowed(*first) == before and allowed(*second) == other
    assert told_in_a_conversation(*first) == before["MLX"]


def test_a_refused_load_changes_nothing(folder):
    first = load(folder, memory_limit=1.5)
    before, at_mlx = allowed(*first), told()
    with refused("memory_exceeded"):
        load(folder, memory_limit=0.001)
    assert told() == at_mlx and allowed(*first) == before


def test_without_a_limit_a_model_may_take_what_suits_the_machine():
    load("nano", memory_limit=0.05)
    model, processor = load("nano")
    assert model.memory_limit == processor.memory_limit == told()[0] == backend().usable_memory()


def test_a_vision_encoder_keeps_to_the_limit_of_its_model():
    (small, _), (large, processor) = load("nano", memory_limit=0.05), load("nano")
    media = processor.read("image", LARGE[:64, :64], VisionOptions())
    ballast = mx.zeros((16_000_000,))  # 64 MB
    mx.eval(ballast)
    with refused("memory_exceeded", "vision encoder", "0.0500 GB"):
        small.vision.part.encode(media)
    assert len(large.vision.part.encode(media)) == media.tokens
