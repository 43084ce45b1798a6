"""Attention over quantized keys and values in two launches, run by the emulator, gives the answer in float64."""

import mlx.core as mx
import pytest
from kernels.backends import EMULATED
from kernels.emulator import emulate, missing
from kernels.emulator import emulated as emulation
from kernels.packed_cases import DTYPES, ODD, Case, case, differences, two_blocks

from mlx_qwen35.backend import assume
from mlx_qwen35.kernels import fused
from mlx_qwen35.kernels.packed_attention import BLOCK, FEW_QUERIES, Geometry, packed_attention, self_check

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
full = pytest.mark.full
BITS = [(8, 8), (8, 4), (4, 4)]
BYTES = {(8, 8): 544, (8, 4): 416, (4, 4): 288}  # of a key and its value; 16 bit has 1,024


def run(given: Case, **options) -> mx.array:
    return emulate(given.launch, **options)[0]


def assert_close(given: Case) -> None:
    found = differences(run(given), given.plain())
    assert not found, found


# --- the answer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("S", [1, 63, 64, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("T", [1, pytest.param(2, marks=full), pytest.param(3, marks=full), 4])
def test_kernel_gives_the_answer_for_any_number_of_keys(T, S):
    assert_close(case(ODD, min(T, S), S, mx.float32))


@full
@pytest.mark.parametrize("T", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", BITS)
def test_kernel_gives_the_answer_over_4096_keys_of_the_4b(bits, T):
    assert_close(case(Geometry(4, 256, *bits), T, 4096, mx.float32, Hk=2))


@full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [*BITS, (4, 8)])
@pytest.mark.parametrize(("rows", "D"), [(1, 64), (8, 64), (2, 128), (6, 128), (4, 256)])
def test_kernel_gives_the_answer_for_each_form(rows, D, bits, dtype):
    for T in (1, 5):
        assert_close(case(Geometry(rows, D, *bits), T, BLOCK + 9, dtype, Hk=2))


@full
@pytest.mark.parametrize("T", range(1, FEW_QUERIES + 1))
def test_kernel_takes_up_to_eight_queries_of_several_rows(T):
    assert_close(case(ODD, T, BLOCK + 2, mx.float16, B=2, Hk=2))


@full
def test_keys_that_count_alike_are_summed_over_many_blocks():
    assert_close(case(ODD, 4, 40 * BLOCK + 7, mx.float32, Hk=1, sharp=0.01))


# --- the same bits ---------------------------------------------------------------------------------------------------


def test_a_query_has_the_same_bits_among_others_and_alone():
    given = two_blocks(mx.float32)
    out = run(given)
    for t in range(4):
        assert mx.array_equal(run(given.alone(t)), out[:, :, t : t + 1])


def test_lanes_in_backward_order_give_the_same_bits():
    given = two_blocks(mx.float32)
    assert mx.array_equal(run(given, order="backward"), run(given))


# --- police and traffic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [pytest.param((8, 8), marks=full), (8, 4), pytest.param((4, 4), marks=full)])
@pytest.mark.parametrize("T", [1, pytest.param(4, marks=full)])
def test_police_finds_nothing_and_a_key_of_the_4b_takes_its_bytes_once(T, bits):
    S, Hk = 2 * BLOCK - 56, 2
    _, report = emulate(case(Geometry(4, 256, *bits), T, S, mx.bfloat16, Hk=Hk).launch, police=True)
    assert not report.faults
    first, join = report.launches
    packed = [traffic for name, traffic in first.buffers.items() if name.startswith(("key", "value"))]
    assert sum(traffic.unique_read for traffic in packed) == S * Hk * BYTES[bits]
    assert first.buffers["value_words"].read == T * first.buffers["value_words"].unique_read - ahead(T, bits[1])
    assert first.collectives == 4 * 5 * Hk * sum(S - t for t in range(T))  # 4 heads of a key head, 5 steps of a sum
    assert first.device().written == join.device().unique_read == 4 * 2 * Hk * 4 * T * (256 + 2)
    assert (first.threadgroup_memory, join.threadgroup_memory) == (T * 4128, 2080)


def ahead(T: int, bits: int) -> int:
    """Bytes of the words of values that the first of T queries do not read, of two key heads."""
    return 2 * sum(range(T)) * 256 * bits // 8


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_mac():
    """The kernels can run, and are emulated; the report of their launches."""
    self_check.cache_clear()
    with assume(EMULATED), emulation() as report:
        yield report
    self_check.cache_clear()


def chosen(given: Case, causal: bool = True) -> mx.array:
    return packed_attention(given.q, given.keys, given.values, given.scale, causal, given.S)


@pytest.mark.parametrize("T", [1, 4])
def test_a_few_queries_read_packed_keys_once_the_kernels_passed_their_check(as_on_a_mac, T):
    given = two_blocks(mx.float32).first(T)
    out = chosen(given)
    assert len(as_on_a_mac.launches) == 2 * 2 + 2  # two cases of the check, one call
    assert mx.array_equal(out, given.launch())


@pytest.mark.parametrize(
    ("sizes", "T", "causal"), [(ODD, FEW_QUERIES + 1, True), (ODD, 2, False), (Geometry(9, 64, 8, 8), 1, True)]
)
def test_many_queries_and_other_sizes_are_computed_by_operations(as_on_a_mac, sizes, T, causal):
    given = case(sizes, T, 40, mx.float32, Hk=1)
    out = chosen(given, causal)
    assert not as_on_a_mac.launches
    if causal:
        assert not differences(out, given.plain())


@pytest.mark.parametrize(
    ("kernel", "right", "wrong"),
    [("packed_attention", "score_scale *", "2 * score_scale *"), ("packed_attention_join", "value / sum", "value")],
)
def test_a_kernel_that_disagrees_is_switched_off_with_a_warning(as_on_a_mac, monkeypatch, kernel, right, wrong):
    text = fused.source
    assert right in text(kernel)
    broken = {kernel: text(kernel).replace(right, wrong)}
    monkeypatch.setattr(fused, "source", lambda name: broken.get(name) or text(name))
    given = two_blocks(mx.float32)
    with pytest.warns(RuntimeWarning, match="packed_attention is switched off: its output differs"):
        out = chosen(given)
    assert len(as_on_a_mac.launches) == 2
    assert not differences(out, given.plain())


def test_sizes_that_the_kernel_has_not_do_not_pass_its_check():
    for sizes in (Geometry(4, 192, 8, 8), Geometry(9, 256, 8, 8), Geometry(4, 256, 6, 8)):
        with pytest.warns(RuntimeWarning, match="it does not support"):
            assert not self_check(sizes, mx.float32)
    self_check.cache_clear()
