"""Decoding with drafts on the kernels: the memory after each token, the tokens of a model, and the check at load."""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import load_text_model
from kernels.backends import EMULATED, OPERATIONS
from kernels.delta_cases import DIFFERENT, DTYPES, ODD, REAL, case, same
from kernels.emulator import Report, emulate, emulated, missing

from mlx_qwen35 import Model, Processor, Result, batch_generate, load
from mlx_qwen35.backend import assume
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.kernels import add_norm, attention, fused, fused_delta, norm_rotary
from mlx_qwen35.kernels.fused_delta import Heads, self_check

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
DEPTHS = (1, 2, 3)
NANO = Heads(Hk=2, Hv=4, Dk=32, Dv=32, K=4)


@pytest.fixture
def as_on_a_mac() -> Iterator[Report]:
    """Kernels can run, and are emulated; the report of their launches."""
    checks = (self_check, add_norm.self_check, norm_rotary.self_check, attention.fused_self_check)
    for known in checks:
        known.cache_clear()
    with assume(EMULATED), emulated() as report:
        yield report
    for known in checks:
        known.cache_clear()


# --- the memory after each token -------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [ODD, DIFFERENT, pytest.param(REAL, marks=pytest.mark.full)], ids=str)
def test_memories_of_several_tokens_are_to_the_bit_those_of_single_ones(heads, dtype, T):
    given, lengths = case(heads, T, dtype, B=3), [T, 0, T - 1]
    at_once = emulate(lambda: given.launch(lengths, stepwise=True))[0]
    assert same(at_once, emulate(lambda: given.one_by_one(lengths))[0])
    _, window, state = emulate(lambda: given.launch(lengths))[0]
    assert same([array[:, -1] for array in at_once[1:]], [window, state])


@pytest.mark.parametrize("T", [2, 4])
def test_padding_repeats_the_last_memory_and_a_row_without_tokens_keeps_its_own(T):
    given = case(ODD, T, mx.float16, B=3)
    real = (mx.arange(T) < mx.array([1, 0, T])[:, None])[..., None]
    spoiled = replace(given, projected=mx.where(real, given.projected, mx.nan).astype(mx.float16))
    _, *memories = emulate(lambda: spoiled.launch([1, 0, T], stepwise=True))[0]
    for memory, before in zip(memories, given.memory, strict=True):
        for t in range(T):
            assert same([memory[0, t], memory[1, t]], [memory[0, 0], before[1]])


def test_lanes_in_backward_order_give_the_same_memories():
    given = case(ODD, 4, mx.float16, B=2)
    forward, backward = (
        emulate(lambda: given.launch([4, 2], stepwise=True), order=order)[0] for order in ("forward", "backward")
    )
    assert same(forward, backward)


# --- the model -------------------------------------------------------------------------------------------------------


def drafted(nano: tuple[Model, Processor], questions: list[str], depth: int, **options) -> list[Result]:
    return batch_generate(*nano, questions, mtp="on", mtp_depth=depth, enable_thinking=False, **options)


@pytest.mark.parametrize("depth", [2, pytest.param(1, marks=pytest.mark.full), pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "questions",
    [pytest.param(["Who are you?"], marks=pytest.mark.full), ["What is 34 + 58?", "Who are you?"]],
    ids=["one", "batch"],
)
def test_nano_generates_the_same_tokens_with_drafts_on_the_kernels(as_on_a_mac, monkeypatch, questions, depth):
    nano, options = load("nano"), {"temp": 0.8, "seed": 1, "max_tokens": 9, "prefill_step_size": 13}
    before = len(as_on_a_mac.launches)
    by_kernels = drafted(nano, questions, depth, **options)
    launches = len(as_on_a_mac.launches)
    assert launches > before and len({len(result.tokens) for result in by_kernels}) == len(questions)
    with assume(OPERATIONS):
        plain = batch_generate(*nano, questions, mtp="off", enable_thinking=False, **options)
        again = drafted(nano, questions, depth, **options)
    assert [result.tokens for result in by_kernels] == [result.tokens for result in plain]
    assert [result.mtp for result in by_kernels] == [result.mtp for result in again]
    assert len(as_on_a_mac.launches) == launches


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_step_with_drafts_has_one_launch_for_each_layer_and_sum(as_on_a_mac, checkpoint_folder, depth):
    model = load_text_model(checkpoint_folder(geometry("tiny")))
    cache = model.make_cache()
    model.hidden(mx.array([[5, 6, 7]]), cache)
    before = len(as_on_a_mac.launches)
    mx.eval(model.hidden(mx.array([[8, 9, 10, 11][: 1 + depth]]), cache, stepwise=True))
    names = [launch.name for launch in as_on_a_mac.launches[before:]]
    assert len(names) == 3 + 1 + 8  # three DeltaNet layers, one other, eight sums


@pytest.mark.core(2)
@pytest.mark.parametrize("kept", [[1, 4], [3, 0], [4, 4], [2, 2]], ids=str)
def test_what_is_kept_of_a_pass_on_the_kernels_is_what_single_tokens_leave(as_on_a_mac, checkpoint_folder, kept):
    model = load_text_model(checkpoint_folder(geometry("tiny")))
    tokens = mx.array([[8, 9, 10, 11], [21, 22, 23, 24]])

    def begun() -> Cache:
        caches = [model.make_cache() for _ in range(2)]
        for cache, row in zip(caches, (range(40, 49), range(60, 64)), strict=True):
            prefill(model, cache, PromptRow(row), 64)
        return Cache.joined(caches)

    cache, single = begun(), begun()
    place = cache.position
    model.hidden(tokens, cache, [4 if n else 0 for n in kept], stepwise=True)
    cache.rollback(place, kept)
    for t in range(max(kept)):
        model.hidden(tokens[:, t : t + 1], single, [int(n > t) for n in kept])
    assert cache.position == single.position
    for row in range(2):
        theirs = single.arrays(row)
        for name, ours in cache.arrays(row).items():  # products of many rows round otherwise than of one
            assert mx.abs(ours - theirs[name]).max().item() < 1e-4


def test_the_head_reads_and_drafts_the_same_on_the_kernels(as_on_a_mac, monkeypatch, checkpoint_folder):
    model = load_text_model(checkpoint_folder(geometry("tiny")))

    def logits() -> mx.array:
        followers, found = [], []
        for row in (range(40, 60), range(60, 64)):
            cache = model.make_cache()
            cache.follower = DraftFollower(model, cache.row_lengths)
            prefill(model, cache, PromptRow(row), 7)
            followers.append(cache.follower)

        def draw(logits: mx.array, _) -> mx.array:
            found.append(logits)
            return mx.argmax(logits, axis=-1)

        DraftFollower.joined(model, followers).propose(model, mx.array([[8], [9]]), [1, 1], 3, draw)
        return mx.concatenate(found, axis=1)

    before = len(as_on_a_mac.launches)
    by_kernels = logits()
    mx.eval(by_kernels)
    # Three chunks and one through model and head, then three drafts: of the head one norm_rotary and two sums each.
    assert len(as_on_a_mac.launches) - before == (3 + 1) * (12 + 3) + 3 * 3
    with assume(OPERATIONS):
        assert mx.abs(by_kernels - logits()).max().item() < 1e-4


# --- the check at load -----------------------------------------------------------------------------------------------

AT = "const size_t at = (size_t(batch) * T + start + s) * VALUE_HEADS + head;"
WRONG = {
    "the last state in all slots": (
        AT + "\n        const size_t row", AT + "\n        if (s + 1 < count) continue;\n        const size_t row"
    ),
    "the first window in all slots": ("min(p + 1, length) : length", "min(1, length) : length"),
    "the last window in all slots": ("SNAPSHOTS ? min(p + 1, length) : length", "length"),
    "the states a token late": (AT, AT.replace("start + s)", "max(start + s - 1, 0))")),
    "the states of a stage in its first slots": (AT, AT.replace("start + s)", "s)")),
    "nothing written to the states": (
        "        S[n][i] = fma(k[i], float4(change), S[n][i] * decay);\n",
        "        S[n][i] = fma(k[i], float4(SNAPSHOTS ? 0.0f : change), S[n][i] * decay);\n",
    ),
    "the states rounded": (
        "        for (int m = 0; m < MINE; ++m) {\n            to[i * PARTS + m * LANES + part] = S[n][i * MINE + m];",
        "        for (int m = 0; m < MINE; ++m) {\n"
        "            to[i * PARTS + m * LANES + part] = float4(half4(S[n][i * MINE + m]));",
    ),
}  # fmt: skip
FIRST = ["the last state in all slots", "the last window in all slots"]
REST = [pytest.param(name, marks=pytest.mark.full) for name in WRONG if name not in FIRST]


@pytest.mark.parametrize("fault", [*FIRST, *REST])
def test_a_kernel_whose_stepwise_states_are_wrong_is_switched_off_with_a_warning(as_on_a_mac, monkeypatch, fault):
    right, wrong = WRONG[fault]
    real = fused.source
    text = real("gated_delta")
    assert text.count(right) == 1
    broken = text.replace(right, wrong)
    monkeypatch.setattr(fused, "source", lambda name: broken if name == "gated_delta" else real(name))
    off = r"gated_delta is switched off: its \w+_state after token 1[89] of 20"
    with pytest.warns(RuntimeWarning, match=off):
        assert not self_check(NANO, mx.float32)


def test_the_check_at_load_launches_a_stepwise_call(as_on_a_mac, monkeypatch):
    launched = []
    real = fused_delta.fused_gated_delta

    def spy(*arguments, **options):
        launched.append((arguments[0][0].shape[1], options.get("stepwise", False)))
        return real(*arguments, **options)

    monkeypatch.setattr(fused_delta, "fused_gated_delta", spy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert self_check(NANO, mx.float32)
    assert (20, True) in launched and {T for T, stepwise in launched if not stepwise} == {19, 1, 20}
