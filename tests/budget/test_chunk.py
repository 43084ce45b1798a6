"""How many tokens of a prompt are read at a time: the estimate, its bounds, and how layers are handed over."""

import functools
import math
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_qwen35.backend import METAL, assume
from mlx_qwen35.budget import chunk
from mlx_qwen35.budget.chunk import (
    LAYERS_IN_FLIGHT,
    LENGTHS,
    SUBMISSION_SECONDS,
    Launch,
    chunk_length,
    contexts_up_to,
    layer_launches,
    longest_submission,
    prefill_bytes,
)
from mlx_qwen35.checkpoint.config import FULL, LINEAR, TextConfig, parse_config
from mlx_qwen35.checkpoint.random import GEOMETRIES, geometry
from mlx_qwen35.checkpoint.shapes import text_shapes
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.kernels import attention
from mlx_qwen35.kernels.attention import SCORE_BYTES
from mlx_qwen35.machine.chip import TUNED, CommandBuffers, command_buffers, parse_chip
from mlx_qwen35.machine.memory import prefill_room
from mlx_qwen35.model.pace import Pace

# M5 and later are taken for as fast as M1, see test_machine.py.
CHIPS = [parse_chip(f"Apple M{n}{tier}") for n in range(1, 5) for tier in ("", " Pro", " Max", " Ultra")]
BUFFERS = ("MLX's own", "ours", "one for all")
CONTEXTS = (256, 65_536, 262_144, 1_048_576)
UNLIMITED = 10**15  # bytes
M1_8_GB = 5_700_000_000  # bytes that a model may take there


def text_config(name: str) -> TextConfig:
    return parse_config(geometry(name)).text


def buffers_of(kind: str, chip) -> CommandBuffers:
    ours = CommandBuffers(*TUNED.values())
    return {"MLX's own": command_buffers(chip, {}), "ours": ours, "one for all": CommandBuffers(10**6, 10**6)}[kind]


@pytest.fixture
def remembered(monkeypatch):
    """The launches of a layer are made once for all chips."""
    monkeypatch.setattr(chunk, "layer_launches", functools.cache(lambda *given: tuple(layer_launches(*given))))


# --- the watchdog ----------------------------------------------------------------------------------------------------


@pytest.mark.core(2)
@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("kind", BUFFERS)
@pytest.mark.parametrize(
    "name", ["4b", "27b", *(pytest.param(n, marks=pytest.mark.full) for n in GEOMETRIES if n not in ("4b", "27b"))]
)
def test_no_command_buffer_takes_more_than_a_second_but_with_the_shortest_chunk(name, kind):
    config, over = text_config(name), set()
    for chip in CHIPS:
        lengths = []
        for S in CONTEXTS:
            buffers = buffers_of(kind, chip)
            lengths.append(chunk_length(config, S, UNLIMITED, 2, "tiles", chip, buffers))
            if longest_submission(config, lengths[-1], S, chip, buffers) > SUBMISSION_SECONDS:
                assert lengths[-1] == LENGTHS[-1]
                over.add((chip.name, S))
        assert lengths == sorted(lengths, reverse=True), "a longer context must not be read in longer chunks"
    slow = {("Apple M1", 1_048_576)}  # 1.3 seconds
    assert over == (slow if (name, kind) == ("27b", "one for all") else set())


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("name", ["0.8b", "4b", "27b"])
def test_neither_does_one_on_the_way_to_the_context(name):
    """MLX ends command buffers at so many elements, so there are shorter contexts with longer ones."""
    config, chip = text_config(name), parse_chip("Apple M1")
    buffers = buffers_of("ours", chip)
    T = chunk_length(config, 262_144, UNLIMITED, 2, "tiles", chip, buffers)
    taken = {S: longest_submission(config, T, S, chip, buffers) for S in range(2048, 262_144, 5000)}
    assert max(taken.values()) < 1.1 * SUBMISSION_SECONDS  # between two of the contexts that are looked at
    assert max(taken, key=taken.get) < 200_000


def test_the_contexts_on_the_way_are_the_same_for_every_length():
    longest = contexts_up_to(262_144)
    assert longest[0] == max(LENGTHS) and longest[-1] == 262_144
    for S in (1, 1024, 1025, 5000, 100_000):
        on_the_way = contexts_up_to(S)
        assert on_the_way == longest[: len(on_the_way)] and S <= on_the_way[-1] <= max(1024, 1.2 * S)


def test_the_lengths_for_the_4b_on_an_m1():
    config, chip = text_config("4b"), parse_chip("Apple M1")
    for kind, expected in (("MLX's own", [1024, 1024, 1024]), ("ours", [1024, 512, 512])):
        buffers = buffers_of(kind, chip)
        assert [
            chunk_length(config, S, UNLIMITED, 2, "tiles", chip, buffers) for S in (4096, 65_536, 262_144)
        ] == expected


# --- the estimate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("S", [1024, 50_000])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_operations_of_a_layer_are_two_for_each_weight_and_those_of_its_mixer(name, S, fused):
    config, T = text_config(name), 512
    D, inner = config.hidden_size, config.intermediate_size
    H, Hk, size, _ = config.attention_heads
    key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    Dk, Dv = config.linear_key_head_dim, config.linear_value_head_dim
    weights = {
        FULL: D * 2 * H * size + 2 * D * Hk * size + H * size * D,
        LINEAR: D * (2 * key_heads * Dk + 2 * value_heads * Dv + 2 * value_heads) + value_heads * Dv * D,
    }
    mixing = {FULL: 2 * 2 * T * S * H * size, LINEAR: 8 * T * value_heads * Dk * Dv}
    for kind in (FULL, LINEAR):
        expected = 2 * T * (weights[kind] + 3 * D * inner) + mixing[kind]
        total = sum(launch.flops for launch in layer_launches(config, kind, T, S, fused))
        written = 8 * 2 * T * S * H if kind == FULL and not fused else 0  # passes over scores
        small = 8 * T * (4 * D + inner + 2 * (H + Hk) * size + 2 * Hk * size)  # norms, gates, cache
        assert expected + written <= total <= expected + written + small


def test_weights_counted_are_those_of_a_checkpoint():
    """The same, from the shapes that a checkpoint has."""
    for name in set(GEOMETRIES) - {"tiny"}:
        config = text_config(name)
        shapes = text_shapes(config)
        for i, kind in ((0, LINEAR), (3, FULL)):
            matrices = [s for n, s in shapes.items() if f"layers.{i}." in n and len(s) == 2]
            least = 2 * 64 * sum(map(math.prod, matrices))
            total = sum(launch.flops for launch in layer_launches(config, kind, 64, 64, True))
            assert least < total < 1.2 * least  # norms, gates and states beside


def test_a_command_buffer_ends_behind_the_launch_that_goes_over_a_number():
    chip = parse_chip("Apple M1")
    launches = [Launch(chip.flops * chunk.SUSTAINED, 0, 2**20)] * 7  # a second, and a million elements each
    for buffers, expected in (
        (CommandBuffers(100, 100), [7, 0]), (CommandBuffers(2, 100), [3, 3, 1]), (CommandBuffers(100, 1), [2, 2, 2, 1]),
    ):  # fmt: skip
        found = [round(seconds, 6) for seconds in chunk._submissions(iter(launches), chip, buffers)]
        assert [s for s in found if s] == [s for s in expected if s]


def test_a_launch_takes_as_long_as_its_operations_or_its_bytes():
    chip, buffers = parse_chip("Apple M1"), CommandBuffers(100, 100)
    for launch in (Launch(2 * chip.flops, chip.bandwidth, 1), Launch(chip.flops, 2 * chip.bandwidth, 1)):
        (seconds,) = chunk._submissions(iter([launch]), chip, buffers)
        assert seconds == pytest.approx(2 / chunk.SUSTAINED)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "fused", "tiles"])
@pytest.mark.parametrize("name", ["tiny", "4b", "27b"])
def test_reading_takes_no_more_than_the_room_but_with_the_shortest_chunk(name, impl):
    config = text_config(name)
    for room in (1e6, 5e7, 2e8, 1e9):
        for S in (1024, 100_000, 262_144):
            T = chunk_length(config, S, room, 2, impl)
            takes = [prefill_bytes(config, T, at, 2, impl) for at in contexts_up_to(S)]
            assert max(takes) <= room or LENGTHS[-1] == T


def test_less_room_never_gives_longer_chunks():
    config = text_config("4b")
    lengths = [chunk_length(config, 32_768, room, 2, "tiles") for room in (1e9, 3e8, 1e8, 5e7, 1e7)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


def test_where_scores_are_not_written_out_they_take_nothing():
    config, T, S = text_config("4b"), 1024, 100_000
    fused, tiles = (prefill_bytes(config, T, S, 2, impl) for impl in ("fused", "tiles"))
    assert tiles - fused == 3 * 2 * 16 * S * max(16, SCORE_BYTES // (4 * 16 * S))
    few = 2048  # of a context in which 64 tokens have few scores: there MLX writes them out all the same
    assert prefill_bytes(config, 64, few, 2, "fused") == prefill_bytes(config, 64, few, 2, "tiles")


def test_reading_takes_about_what_is_estimated(text_model):
    model, T = text_model(), 256
    cache = model.make_cache()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    prefill(model, cache, PromptRow([5] * T), T)
    estimate = prefill_bytes(model.config, T, T, 4, "cpu")
    assert estimate / 1.5 < mx.get_peak_memory() - before - cache.nbytes < 1.5 * estimate


# --- the choice on this machine --------------------------------------------------------------------------------------


@pytest.fixture
def on_an_m1(monkeypatch, on_chip):
    """The way of attention is that of a GPU on which MLX has no kernel without scores."""
    on_chip("Apple M1")
    for name, value in TUNED.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(mx, "get_active_memory", lambda: 3 * 10**9)
    with assume(METAL):
        yield


def test_on_a_cpu_no_watchdog_looks_on(on_chip, monkeypatch):
    config, chip, S = text_config("4b"), parse_chip("Apple M1"), 262_144
    on_chip("Apple M1")
    for name in TUNED:  # command buffers that the watchdog would end
        monkeypatch.setenv(name, "1000000")
    assert chunk_length(config, S, prefill_room(UNLIMITED), 2, "cpu", chip, command_buffers(chip)) < LENGTHS[0]
    assert chunk.suitable_chunk(config, mx.float16, UNLIMITED, S) == LENGTHS[0]


@pytest.mark.usefixtures("on_an_m1")
@pytest.mark.parametrize("impl", ["fused", "tiles"])
def test_on_an_m1_chip_and_memory_bound_the_chunk(monkeypatch, impl):
    config, chip, found = text_config("4b"), parse_chip("Apple M1"), set()
    monkeypatch.setattr(attention, "fused_self_check", lambda *_: impl == "fused")
    for limit in (M1_8_GB, 11_500_000_000, 30_000_000_000):
        for left, S in ((1e9, 4096), (1e9, 262_144), (6e7, 4096), (1e7, 262_144)):
            monkeypatch.setattr(mx, "get_active_memory", lambda used=limit - left: used)
            room = min(prefill_room(limit), left)
            expected = chunk_length(config, S, room, 2, impl, chip, CommandBuffers(*TUNED.values()))
            assert chunk.suitable_chunk(config, mx.float16, limit, S) == expected
            found.add(expected)
    assert len(found) > 3


@pytest.mark.usefixtures("on_an_m1")
def test_weights_that_fill_the_memory_leave_the_shortest_chunk(monkeypatch):
    monkeypatch.setattr(mx, "get_active_memory", lambda: 5.699e9)
    assert chunk.suitable_chunk(text_config("4b"), mx.float16, M1_8_GB, 4096) == LENGTHS[-1]


# --- layers handed over one by one -----------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """What is handed over, how many of it are under way at once at most, and in which order it is waited for."""
    found = SimpleNamespace(handed=0, most=0, under_way=[])
    evaluate, hand_over = mx.eval, mx.async_eval

    def handed_over(arrays):
        hand_over(arrays)
        found.under_way.append(arrays)
        found.handed += 1
        found.most = max(found.most, len(found.under_way))

    def waited_for(*arrays):
        if any(arrays[0] is known for known in found.under_way):
            assert arrays[0] is found.under_way.pop(0), "the oldest must be waited for first"
        else:  # the cache, at the end of a chunk
            found.under_way.clear()
        evaluate(*arrays)

    monkeypatch.setattr(mx, "async_eval", handed_over)
    monkeypatch.setattr(mx, "eval", waited_for)
    return found


@pytest.fixture
def handed_to_a_gpu(monkeypatch):
    """The function makes the backend a GPU while layers are handed over; they themselves are computed here."""
    hand_over = Pace.__call__

    def on_a_gpu(pace, arrays):
        with assume(METAL):
            hand_over(pace, arrays)

    return lambda: monkeypatch.setattr(Pace, "__call__", on_a_gpu)


def test_on_a_gpu_each_layer_is_handed_over_and_few_are_under_way(text_model, handed_to_a_gpu, recorded):
    model, tokens = text_model(), list(range(5, 75))
    expected = prefill(model, model.make_cache(), PromptRow(tokens), 32)
    assert recorded.handed == 0
    handed_to_a_gpu()
    out = prefill(model, model.make_cache(), PromptRow(tokens), 32)
    assert recorded.handed == 3 * len(model.layers) and recorded.most == LAYERS_IN_FLIGHT
    assert mx.array_equal(out, expected)


def test_what_a_layer_remembers_is_handed_over_with_it(text_model):
    model, handed = text_model(), []
    cache = model.make_cache()
    model.hidden(mx.array([[5, 6, 7]]), cache, pace=handed.append)
    for arrays, memory in zip(handed, cache.layers, strict=True):
        assert [a.shape for a in arrays[:2]] == [(1, 3, model.config.hidden_size)] * 2
        assert all(any(array is known for known in arrays) for array in memory.arrays())


def test_on_a_cpu_no_layer_is_handed_over(text_model, recorded):
    model = text_model()
    prefill(model, model.make_cache(), PromptRow([5, 6, 7]), 32)
    assert recorded.handed == 0
