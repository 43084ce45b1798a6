"""No array of a decoded token is silently promoted: an audit of the graph that MLX records, in both half types.

MLX records a promotion as the cast that it is, so what is asked is which arrays are in float32 at all. Those may be:
what a norm reads and gives, between two casts; the rotary tables; and what is inside the DeltaNet core, which computes
in float32, of which only the state outlives it. The sizes of the model all differ, so that a shape tells what it is.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry

CONFIG = geometry("tiny")
TEXT = parse_config(CONFIG).text
D, INNER = TEXT.hidden_size, TEXT.intermediate_size
H, Hk, SIZE, DIMS = TEXT.attention_heads
HALVES = ("float16", "bfloat16")
# Sizes that arrays inside the DeltaNet core are made of: heads of keys and values, value heads of a key head, head
# sizes, channels, taps. No array of the residual stream, the MLP or attention has these alone.
CORE = {
    1, 2, TEXT.linear_num_key_heads, TEXT.linear_num_value_heads,
    TEXT.linear_num_value_heads // TEXT.linear_num_key_heads, TEXT.linear_key_head_dim, TEXT.linear_value_head_dim,
    TEXT.key_dim, 2 * TEXT.key_dim, TEXT.value_dim, TEXT.conv_dim, TEXT.linear_conv_kernel_dim,
}  # fmt: skip
TABLE = {1, DIMS // 2}
VIEWS = ("Squeeze", "ExpandDims", "Reshape", "Transpose", "Broadcast")
CASES = [f"{d} {r} {p}" for d in HALVES for r in ("uniform", "mixed") for p in ("kernels", "operations")]


class Array(NamedTuple):
    number: int
    shape: tuple[int, ...]
    dtype: str


class Node(NamedTuple):
    name: str
    inputs: list[Array]
    outputs: list[Array]


@pytest.fixture(scope="module")
def graphs() -> dict[str, list[Node]]:
    command = [sys.executable, "-m", "tests.dispatches.dtype_worker"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, input=json.dumps(CONFIG), capture_output=True, text=True, check=True, cwd=root)
    return {case: [_node(node) for node in nodes] for case, nodes in json.loads(done.stdout).items()}


def _node(raw: dict[str, Any]) -> Node:
    sides = [[Array(number, tuple(shape), dtype) for number, shape, dtype in raw[s]] for s in ("inputs", "outputs")]
    custom = raw["name"] == "CustomKernel"
    return Node(raw["arguments"][0].removeprefix("custom_kernel_") if custom else raw["name"], *sides)


def is_norm(node: Node) -> bool:
    return node.name.startswith("marker_rms_norm")


def is_product(node: Node) -> bool:
    """By weights: the core multiplies its state, of five axes."""
    return node.name == "QuantizedMatmul" or (node.name == "Matmul" and len(node.inputs[0].shape) < 5)


def audit(nodes: list[Node], dtype: str) -> list[str]:
    """What is in another dtype than it should be."""
    readers: dict[int, list[Node]] = {}
    for node in nodes:
        for array in node.inputs:
            readers.setdefault(array.number, []).append(node)
    faults = []
    for node in nodes:
        for array in node.inputs + node.outputs:
            if array.dtype not in (dtype, "float32", "uint32", "int32", "bool"):
                faults.append(f"{node.name}: {array.dtype} {array.shape}")
            if is_product(node) and array.dtype not in (dtype, "uint32"):
                faults.append(f"a product of {array.dtype} {array.shape}")
        for array in node.outputs:
            after = readers.get(array.number, [])
            widened = node.name == "AsType" and all(map(is_norm, after))
            narrowed = is_norm(node) and all(n.name == "AsType" and n.outputs[0].dtype == dtype for n in after)
            of_tables = set(array.shape) <= TABLE and (node.name in VIEWS or "_circle_" in node.name)
            inside = set(array.shape) <= CORE
            if array.dtype == "float32" and not (widened or narrowed or of_tables or inside):
                faults.append(f"{node.name}: float32 {array.shape}")
    return faults


@pytest.mark.core(2)
@pytest.mark.parametrize("case", CASES)
def test_only_norms_tables_and_the_core_are_in_float32(graphs, case):
    assert audit(graphs[case], case.split()[0]) == []


def test_the_sizes_tell_apart_what_may_be_float32():
    for others in ({D}, {INNER}, {H, SIZE}, {Hk, SIZE}, {H * SIZE}, {TEXT.vocab_size}, {2 * (H + Hk) * SIZE}):
        assert not others <= CORE and not others <= TABLE


@pytest.mark.parametrize("case", CASES)
def test_every_product_is_there_and_in_the_model_s_dtype(graphs, case):
    dtype, recipe, _ = case.split()
    products = [node for node in graphs[case] if is_product(node)]
    assert Counter(node.name for node in products) == {
        "QuantizedMatmul": 4 * 4 + 1, **({"Matmul": 3} if recipe == "mixed" else {}),
    }  # fmt: skip
    assert all(node.inputs[0].dtype == node.outputs[0].dtype == dtype for node in products)
    widths = [node.outputs[0].shape[-1] for node in products]
    assert widths.count(2 * INNER) == 4 and widths.count(D) == 8 and widths.count(TEXT.vocab_size) == 1


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_into_the_kv_cache_and_read_from_it_is_in_the_model_s_dtype(graphs, case):
    dtype = case.split()[0]
    writes = [node for node in graphs[case] if node.name == "SliceUpdate" and node.outputs[0].shape[1] == Hk]
    assert len(writes) == 2 and {array.dtype for node in writes for array in node.inputs[:2] + node.outputs} == {dtype}
    (attention,) = (n for n in graphs[case] if n.name.startswith("marker_scaled_dot_product_attention"))
    assert {array.dtype for array in attention.inputs + attention.outputs} == {dtype}


@pytest.mark.parametrize("dtype", HALVES)
def test_with_the_kernels_these_alone_are_in_float32(graphs, dtype):
    """Of the embedding, which the first layer's norm reads by operations; tables; and the state after the token."""
    found = Counter()
    for node in graphs[f"{dtype} uniform kernels"]:
        name = node.name.split("_end_")[0].split("__")[0]
        found.update((name, array.shape) for array in node.outputs if array.dtype == "float32")
    state = (1, TEXT.linear_num_value_heads, TEXT.linear_value_head_dim, TEXT.linear_key_head_dim)
    table = DIMS // 2
    assert found == {
        ("AsType", (1, 1, D)): 1, ("marker_rms_norm", (1, 1, D)): 1, ("gated_delta", (1, *state)): 3,
        ("Squeeze", state): 3, ("marker_compiled_2_3", (1, 1, table)): 2, ("ExpandDims", (1, 1, 1, table)): 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("float16 uniform operations norm", "a product of float32"),
        ("float16 uniform kernels gate", f"a product of float32 {(1, H * SIZE)}"),
        ("float16 uniform kernels mlp", f"a product of float32 {(1, INNER)}"),
    ],
)
def test_a_cast_that_is_left_out_is_found(graphs, case, fault):
    assert any(found.startswith(fault) for found in audit(graphs[case], "float16"))
