"""Launches and bytes of whole programs."""

import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys

import pytest
from dispatches.count.dispatches import AROUND, RECIPES, ROOT, WORKER, Dispatches, count_program

from mlx_qwen35.checkpoint.config import FULL, LINEAR, parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.shapes import text_shapes

OURS_4B = {LINEAR: 8, FULL: 12, AROUND: 10}  # of one layer; 298 in all
MIXED_4B = {LINEAR: 9, FULL: 12, AROUND: 10}  # 322: one more product a DeltaNet layer, of b and a


def version(package: str) -> str | None:
    return importlib.metadata.version(package) if importlib.util.find_spec(package.replace("-", "_")) else None


needs_mlx_lm = pytest.mark.skipif(version("mlx-lm") != "0.32.2", reason="needs mlx-lm 0.32.2")
needs_mlx_vlm = pytest.mark.skipif(version("mlx-vlm") != "0.7.10", reason="needs mlx-vlm 0.7.10")


def by_place(found: Dispatches) -> dict[str, float]:
    return {kind: place.dispatches / place.layers for kind, place in found.places.items()}


@pytest.fixture(scope="module")
def ours() -> Dispatches:
    return count_program("mlx_qwen35", geometry("4b"))


@pytest.fixture(scope="module")
def ours_mixed() -> Dispatches:
    return count_program("mlx_qwen35", geometry("4b"), "mixed")


EITHER = ["uniform", *(pytest.param(name, marks=pytest.mark.full) for name in RECIPES if name != "uniform")]


@pytest.fixture(scope="module", params=EITHER)
def mlx_lm(request) -> tuple[str, Dispatches]:
    return request.param, count_program("mlx-lm", geometry("4b"), request.param)


@pytest.fixture(scope="module", params=EITHER)
def mlx_vlm(request) -> tuple[str, Dispatches]:
    return request.param, count_program("mlx-vlm", geometry("4b"), request.param)


# --- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.full
@needs_mlx_lm
def test_mlx_lm_takes_814_with_either_recipe(mlx_lm):
    _, found = mlx_lm
    assert found.total == 814 and by_place(found) == {LINEAR: 26, FULL: 23, AROUND: 6}
    assert found.places[LINEAR].operations["kernel gated_delta_step_packed_btree"] == 24  # the path of a Mac
    assert found.not_counted == {"rope": 16}


@needs_mlx_vlm
def test_mlx_vlm_takes_831_within_a_percent_with_either_recipe(mlx_vlm):
    _, found = mlx_vlm
    assert abs(found.total - 831) < 8.31 and by_place(found) == {LINEAR: 27, FULL: 22, AROUND: 10}
    assert found.places[LINEAR].operations["kernel gated_delta_step"] == 24


def test_ours_takes_what_is_pinned(ours):
    assert by_place(ours) == OURS_4B and ours.not_counted == {"compiled _circle": 1}


def test_ours_takes_one_product_more_a_deltanet_layer_for_gates_that_are_not_packed(ours_mixed):
    assert by_place(ours_mixed) == MIXED_4B and ours_mixed.total == 322
    operations = ours_mixed.places[LINEAR].operations
    assert operations["QuantizedMatmul"] == 4 * 24 and operations["Matmul"] == 24  # b and a are one product


@pytest.mark.parametrize(("rows", "total"), [(2, 338), pytest.param(4, 402, marks=pytest.mark.full)])
def test_each_further_row_takes_its_own_attention_and_its_own_cache_writes(rows, total):
    found = count_program("mlx_qwen35", geometry("4b"), rows=rows)
    assert found.total == total
    assert {kind: n for kind, n in by_place(found).items() if kind != FULL} == {LINEAR: 8, AROUND: 10}
    operations = found.places[FULL].operations
    assert operations["scaled_dot_product_attention"] == 8 * rows and operations["SliceUpdate"] == 16 * rows
    assert operations["Concatenate"] == 8 * rows  # the rows' outputs in one array


def test_the_deltanet_kernel_is_one_launch_a_layer_with_either_recipe(ours, ours_mixed):
    for found in (ours, ours_mixed):
        assert found.places[LINEAR].operations["kernel gated_delta"] == 24


def test_the_figures_of_the_places_add_up(ours):
    assert ours.total == sum(sum(place.operations.values()) for place in ours.places.values())
    assert {kind: place.layers for kind, place in ours.places.items()} == {LINEAR: 24, FULL: 8, AROUND: 1}


def test_bytes_of_the_places_add_up(ours):
    assert ours.bytes.total == sum(place.bytes.read + place.bytes.written for place in ours.places.values())


def test_the_embedding_is_around_the_layers_and_the_cache_write_in_them(ours):
    assert ours.places[AROUND].operations["Gather"] == 3 and ours.places[AROUND].operations["dequantize"] == 1
    assert ours.places[FULL].operations["SliceUpdate"] == 16


# --- bytes -----------------------------------------------------------------------------------------------------------


def bytes_of_matrices(recipe: str) -> int:
    """Of the 4B: packed numbers, and a scale and a bias of 16 bits for each 64; or 16 bits a number."""
    total = 0
    for name, shape in text_shapes(parse_config(geometry("4b")).text).items():
        bits = {"linear_attn.out_proj": 8, "self_attn.o_proj": 8}.get(".".join(name.split(".")[-3:-1]), 4)
        plain = recipe == "mixed" and name.endswith(("in_proj_a.weight", "in_proj_b.weight"))
        if len(shape) == 2:
            per_number = 16 if plain else (bits if recipe == "mixed" else 4) + 32 / 64
            total += math.prod(shape) * per_number / 8
    return int(total)


def test_ours_reads_each_matrix_once(ours, ours_mixed):
    assert ours.bytes.matrices == bytes_of_matrices("uniform") == 2_365_194_240
    assert ours_mixed.bytes.matrices == bytes_of_matrices("mixed") == 2_538_618_880


@pytest.mark.full
@needs_mlx_lm
def test_mlx_lm_reads_the_same_matrices(mlx_lm):
    recipe, found = mlx_lm
    assert found.bytes.matrices == bytes_of_matrices(recipe)


@needs_mlx_vlm
def test_mlx_vlm_reads_the_same_matrices(mlx_vlm):
    recipe, found = mlx_vlm
    assert found.bytes.matrices == bytes_of_matrices(recipe)


STREAM, INNER = 2560 * 2, 9216 * 2  # bytes of a token: hidden, and between the products of the MLP
MLP = STREAM + 2 * INNER + 2 * INNER + INNER + INNER + STREAM  # gate and up, activation, down
SUMS = 2 * (4 * STREAM + 2560 * 4 + 4)  # add and norm, twice: two rows in, two out, gamma, epsilon


def rest(found: Dispatches, kind: str) -> float:
    """Of one layer."""
    return found.places[kind].bytes.rest / found.places[kind].layers


def test_beside_its_matrices_a_deltanet_layer_moves_this(ours):
    state, window, conv = 32 * 128 * 128 * 4, 3 * 8192 * 2, 4 * 8192 * 4
    projected, core = (8192 + 4096 + 64) * 2, 4096 * 2
    scalars = 2 * 32 * 4 + 128 * 4 + 12  # A_log, dt_bias, norm; lengths, tokens, epsilon
    products = STREAM + projected + core + STREAM  # into the core, and back
    kernel = projected + core + 2 * (state + window) + conv + scalars
    assert rest(ours, LINEAR) == products + kernel + SUMS + MLP


def test_beside_its_matrices_an_attention_layer_moves_this(ours):
    row = 256 * 2  # of a head
    projected, q, k = (32 + 8) * row, 16 * row, 4 * row
    norms = 2 * 32 * 4 + 2 * 256 * 4 + 8  # cosines, sines; two gammas; scalars
    products = STREAM + projected + q + STREAM
    cached = 4 * 2 * k  # keys and values of 3 tokens and this one, of a buffer for 256
    attention = projected + norms + q + k + 2 * (k + k) + q + cached + q
    assert rest(ours, FULL) == products + attention + 3 * q + SUMS + MLP  # 3: the gate


def test_gates_that_are_not_packed_are_a_product_that_reads_the_layers_input_again(ours, ours_mixed):
    assert ours_mixed.bytes.rest - ours.bytes.rest == 24 * STREAM
    assert rest(ours_mixed, FULL) == rest(ours, FULL)


def test_ours_moves_what_is_pinned(ours, ours_mixed):
    assert (ours.bytes.total, ours_mixed.bytes.total) == (2_480_711_888, 2_654_259_408)


# --- the worker ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_matrix_is_in_memory():
    code = (  # VmHWM, since ru_maxrss starts with what the process had that started this one
        "import runpy, sys; sys.argv = ['worker', 'mlx_qwen35', '{}'];"
        f"runpy.run_module({WORKER!r}, run_name='__main__');"
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    given = json.dumps(geometry("4b"))
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True, cwd=ROOT)
    peak = int(done.stderr.split()[-1]) * 1024
    assert peak < 600e6  # the weights would be 2.4 GB
