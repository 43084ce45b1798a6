"""The emulator's police: each fault is reported in a kernel that has it, in a sound one none; counts are exact."""

import mlx.core as mx
import pytest
from kernels.emulator import KernelFault, Report, missing
from kernels.small import run

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


def policed(source: str, threads: int = 32, count: int | None = None, **options: object) -> Report:
    """Police a launch of one threadgroup with an input x of 64 floats and an output of `count` floats, one a thread."""
    shape = (threads if count is None else count,)
    sizes = {"grid": threads, "threadgroup": threads, "police": True} | options
    return run(source, {"x": mx.arange(64.0)}, (shape, mx.float32), **sizes)[1]


def kinds(report: Report) -> set[str]:
    return {f"{fault.kind}: {fault.what}" for fault in report.faults}


SOUND = """
    threadgroup float s[64];
    uint at = thread_position_in_threadgroup.x;
    s[at] = x[at];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = simd_sum(s[63 - at]);
"""


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_a_sound_kernel_has_no_fault(order: str) -> None:
    report = policed(SOUND, 64, order=order)
    assert report.faults == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("out[i] = x[i + 33];", "out of bounds: x"),
        ("out[i] = x[int(i) - 1];", "out of bounds: x"),
        ("out[i + 1] = 0; if (i == 0) out[0] = 0;", "out of bounds: out"),
        ("out[i] = (x + i)[1ul << 40];", "wild address: the thread was stopped: load"),
        ("threadgroup float s[32]; s[i + 1] = 0; out[i] = 0;", "out of bounds: threadgroup memory"),
        ("((device float*)x)[i] = 0; out[i] = 0;", "write to an input: x"),
        ("out[i] = 0; if (i == 3) out[4] = 1;", "output written by two threads: out"),
        ("if (i != 9) out[i] = 0;", "output never written: out"),
        ("", "output never written: out"),
        ("out[i] += 1;", "output read before it is written: out"),
        ("out[i] = i; simdgroup_barrier(mem_flags::mem_device); float y = out[i ^ 1]; if (y < 0) out[i] = y;",
         "output read that another thread wrote: out"),
        ("threadgroup float s[32]; if (i < 31) s[i] = 0; simdgroup_barrier(mem_flags::mem_threadgroup); out[i] = s[i];",
         "threadgroup memory read before it is written: threadgroup memory"),
        ("threadgroup float s[1]; s[0] += 1; out[i] = s[0];",
         "threadgroup memory read before it is written: threadgroup memory"),
    ],
)  # fmt: skip
def test_fault_of_one_simdgroup(source: str, fault: str) -> None:
    assert fault in kinds(policed(source))


@pytest.mark.parametrize(
    "source",
    [
        SOUND.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
        SOUND.replace("mem_flags::mem_threadgroup", "mem_flags::mem_none"),
        SOUND.replace("threadgroup_barrier", "simdgroup_barrier"),
        SOUND + "s[at] = 0;",
        SOUND + "float y = s[0]; if (i == 63) s[0] = 7; out[i] += y;",
        SOUND + "float y = s[0]; if (i == 0) s[0] = 7; out[i] += y;",
        "threadgroup float s[1]; if (lane == 0) s[0] = i; out[i] = 0;",
    ],
    ids=["no barrier", "of no memory", "of a simdgroup", "write late", "last writes", "first writes", "two writers"],
)
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_race_between_simdgroups(source: str, order: str) -> None:
    assert "race between simdgroups: threadgroup memory" in kinds(policed(source, 64, order=order))


FENCE = "simdgroup_barrier(mem_flags::mem_threadgroup);"
SHUFFLE = "out[i] = simd_shuffle_xor(i, 1);"
# What two lanes of a simdgroup do to a place one after the other, with HERE between.
WITHIN = {
    "write, read": "threadgroup float s[32]; s[i] = i; HERE out[i] = s[i ^ 1];",
    "read, write": f"threadgroup float s[32]; s[i] = i; {FENCE} float y = s[i ^ 1]; HERE s[i] = 7; out[i] = y;",
    "all read, one writes": f"threadgroup float s[1]; if (i == 5) s[0] = 1; {FENCE} float y = s[0]; HERE "
                            "if (i == 5) s[0] = 2; out[i] = y;",
    "write, write": "threadgroup float s[32]; s[i] = i; HERE s[i ^ 1] = 7; out[i] = 0;",
}  # fmt: skip
NO_FENCE = ("", "out[i] = simd_sum(i);", "simdgroup_barrier(mem_flags::mem_none);",
            "threadgroup_barrier(mem_flags::mem_device);")  # fmt: skip
RACES = [*((what, SHUFFLE) for what in WITHIN), *(("all read, one writes", between) for between in NO_FENCE)]


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize(("what", "between"), RACES)
def test_lanes_of_a_simdgroup_race_where_no_barrier_orders_the_memory(what: str, between: str, order: str) -> None:
    found = kinds(policed(WITHIN[what].replace("HERE", between), order=order))
    assert found == {"race within a simdgroup: threadgroup memory"}


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("what", WITHIN)
def test_a_simdgroup_barrier_orders_a_simdgroup(what: str, order: str) -> None:
    assert policed(WITHIN[what].replace("HERE", FENCE), order=order).faults == []


def test_a_lane_may_read_and_write_its_own_place_without_a_barrier() -> None:
    assert policed("threadgroup float s[32]; s[i] = i; s[i] += simd_sum(s[i]); out[i] = s[i];").faults == []


def test_the_barrier_of_one_simdgroup_does_not_order_another() -> None:
    report = policed(f"threadgroup float s[64]; s[i] = i; if (i < 32) {FENCE} else {SHUFFLE} out[i] = s[i ^ 1];", 64)
    assert [(fault.kind, fault.position) for fault in report.faults] == [("race within a simdgroup", 4 * 33)]


# These the runtime sees by itself: without police they are an exception.
CONTROL = {
    "barrier not reached by all threads": "if (i < 32) threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = 0;",
    "collective reached by a part of the simdgroup": "float y = 1; if (lane < 16) y = simd_sum(y); out[i] = y;",
    "shuffle from a lane that is not there": "out[i] = simd_shuffle(1.0f, lane + 1);",
    "more than 32 KB of threadgroup memory": "threadgroup float s[8193]; s[i] = i; out[i] = s[i];",
}


@pytest.mark.parametrize("kind", CONTROL)
def test_fault_of_control_is_reported(kind: str) -> None:
    assert kind in {fault.kind for fault in policed(CONTROL[kind], 64).faults}


@pytest.mark.parametrize("kind", CONTROL)
def test_fault_of_control_is_raised_without_police(kind: str) -> None:
    with pytest.raises(KernelFault, match=kind):
        policed(CONTROL[kind], 64, police=False)


def test_barriers_in_two_branches_are_not_one_barrier() -> None:
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    report = policed(f"if (i < 32) {{ {barrier} out[i] = 0; }} else {{ {barrier} out[i] = 1; }}", 64)
    assert "barrier not reached by all threads" in {fault.kind for fault in report.faults}


def test_collectives_in_two_branches_are_not_one_collective() -> None:
    report = policed("float y = i; if (lane < 16) y = simd_sum(y); else y = simd_sum(y * 2); out[i] = y;")
    assert "collective reached by a part of the simdgroup" in {fault.kind for fault in report.faults}


def test_more_than_1024_threads_are_refused() -> None:
    assert kinds(policed("out[i] = 0;", 1056)) >= {"more than 1024 threads in a threadgroup: threads"}


def test_1024_threads_with_32_kb_are_allowed() -> None:
    assert policed("threadgroup float s[8192]; s[i] = i; out[i] = s[i];", 1024).faults == []


def test_a_fault_names_the_first_thread_and_the_place() -> None:
    (fault,) = policed("out[i] = x[i == 5 ? 70 : i];", 64, threadgroup=16).faults
    assert (fault.position, fault.times, fault.threadgroup, fault.thread) == (280, 1, (0, 0, 0), (5, 0, 0))


def test_half_a_grid_leaves_output_unwritten() -> None:
    assert kinds(policed("out[i] = 0;", 32, count=64)) == {"output never written: out"}


# --- counts ----------------------------------------------------------------------------------------------------------


def test_device_bytes_are_counted_as_requested_and_unique() -> None:
    traffic = policed("out[i] = x[i / 2] + x[3];").launches[0].buffers
    assert (traffic["x"].read, traffic["x"].unique_read) == (32 * 8, 16 * 4)
    assert (traffic["out"].written, traffic["out"].unique_written) == (32 * 4, 32 * 4)
    assert (traffic["x"].unique_written, traffic["out"].unique_read) == (0, 0)


def test_a_vector_counts_all_its_bytes() -> None:
    launch = policed("float4 v = ((const device float4*)x)[i % 16]; out[i] = v.x + v.y + v.z + v.w;").launches[0]
    assert (launch.device().read, launch.device("x").read) == (32 * 16, 0)


def test_small_inputs_count_as_constants() -> None:
    report = run("out[i] = few[i % 2];", {"few": mx.array([1.0, 2.0])}, ((32,), mx.float32), police=True)[1]
    assert report.launches[0].constants["few"].unique_read == 8
    assert report.launches[0].device().read == 0


def test_threadgroup_bytes_barriers_and_collectives_are_counted() -> None:
    launch = policed(SOUND, 128, threadgroup=64, count=128).launches[0]
    assert launch.threadgroups == 2
    assert (launch.barriers, launch.collectives, launch.threadgroup_memory) == (2, 4, 256)
    assert (launch.threadgroup_written, launch.threadgroup_read) == (128 * 4, 128 * 4)
