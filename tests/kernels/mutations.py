"""Breaks the kernels in stated ways and shows that each fault is caught: python tests/kernels/mutations.py [kernel ...]

A mutant is the text of a kernel with one thing changed. Small cases are run by the emulator, under police, and compared
with the operations; the first case in which anything is wrong catches the mutant. The unbroken kernels must pass them
all. Prints a table; the exit status is 1 where a mutant survived, or an unbroken kernel was found wrong.

Every barrier is among what is removed: four of gated_delta, two of packed_attention, one of its join and of add_norm
(norm_rotary has none); none is redundant.
Not in the lists is what changes no answer: which of the lanes that hold a sum writes it (`part == 0`, `lane == 0`).
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx
from kernels import delta_cases, norm_cases, packed_cases, rotary_cases
from kernels.delta_cases import DIFFERENT, ODD, REAL
from kernels.emulator import CompileError, emulate, missing
from kernels.mutants import MUTANTS, Mutant

from mlx_qwen35.kernels import fused
from mlx_qwen35.kernels.add_norm import fused_add_norm, plain_add_norm

Check = Callable[[], list[str]]  # -> what is wrong


def policed(function: Callable[..., Any], *arrays: Any) -> tuple[Any, list[str]]:
    """What it gives, and which rules it broke."""
    outputs, report = emulate(function, *arrays, police=True)
    kinds = dict.fromkeys(fault.kind for fault in report.faults)
    return outputs, [f"police: {', '.join(kinds)}"] if kinds else []


# --- gated_delta -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Delta:
    """A call of gated_delta, against the operations."""

    case: delta_cases.Case
    lengths: list[int] | None = None
    apart: bool = False
    magnified: float = 1.0  # where all is small, so that the bounds are relative to it

    def __call__(self) -> list[str]:
        (out, window, state), wrong = policed(lambda: self.case.launch(self.lengths, self.apart))
        want, want_window, want_state = self.case.plain(self.lengths)
        by = self.magnified
        wrong += delta_cases.differences(out * by, want * by, state * by, want_state * by)
        return wrong + ([] if delta_cases.same([window], [want_window]) else ["window differs"])


def stepwise() -> list[str]:
    """The memory after each token, against that of the operations for the text up to there."""
    T, lengths, given = 5, [5, 2, 0], delta_cases.case(ODD, 5, mx.float32, 3)
    (_, windows, states), wrong = policed(lambda: given.launch(lengths, stepwise=True))
    wants = [given.rows(slice(None), slice(t + 1)).plain([min(t + 1, n) for n in lengths]) for t in range(T)]
    out, want_windows, want_states = wants[-1][0], *(mx.stack([want[i] for want in wants], axis=1) for i in (1, 2))
    wrong += delta_cases.differences(out, out, states, want_states)
    return wrong + ([] if delta_cases.same([windows], [want_windows]) else ["window differs"])


def one_by_one() -> list[str]:
    """The bits of two tokens at once, against those of one after the other."""
    given = delta_cases.case(ODD, 2, mx.float32)
    at_once, wrong = policed(given.launch)
    (first, *memory), _ = policed(given.rows(slice(None), slice(1)).launch)
    rest = delta_cases.Case(ODD, given.projected[:, 1:], given.weights, delta_cases.DeltaState(*memory))
    (second, *memory), _ = policed(rest.launch)
    same = delta_cases.same(at_once, [mx.concatenate([first, second], axis=1), *memory])
    return wrong + ([] if same else ["bits differ from token by token"])


def delta_checks() -> list[Check]:
    case = delta_cases.case
    return [
        Delta(case(DIFFERENT, 17, mx.float32, 3), [17, 0, 8]),
        Delta(case(ODD, 1, mx.float32, 2), [1, 0]),
        Delta(case(ODD, 17, mx.float32, 2), [17, 16], apart=True),
        Delta(case(ODD, 17, mx.float32).small(), magnified=1e2),
        Delta(case(ODD, 17, mx.float32, kind="fading")),
        Delta(case(REAL, 3, mx.float16, 2), [3, 1]),
        stepwise,
        one_by_one,
    ]


# --- the others ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AddNorm:
    """A call of add_norm, against the operations; rounding elsewhere than they do shows in many numbers."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    scale: float = 1.0

    def __call__(self) -> list[str]:
        given = norm_cases.case(self.shape, self.dtype, self.scale)
        ours, wrong = policed(fused_add_norm, *given)
        want = plain_add_norm(*given)
        return wrong + norm_cases.differences(ours, want) + _rounding(norm_cases.unequal(ours, want), self.dtype)


@dataclass(frozen=True)
class NormRotary:
    """A call of norm_rotary, against the operations, likewise."""

    case: rotary_cases.Case

    def __call__(self) -> list[str]:
        ours, wrong = policed(self.case.launch)
        want = self.case.plain()
        share = _rounding(rotary_cases.unequal(ours, want), self.case.projected.dtype)
        return wrong + rotary_cases.differences(ours, want, self.case.sizes.dims) + share


def _rounding(share: float, dtype: mx.Dtype) -> list[str]:
    return [f"{share:.0%} of the numbers differ"] if dtype != mx.float32 and not share < 1e-2 else []


def norm_checks() -> list[Check]:
    return [
        AddNorm((2, 17, 520), mx.float32),
        AddNorm((1, 1, 257), mx.float32, 1e-3),
        AddNorm((2, 2, 2560), mx.bfloat16),
    ]


def rotary_checks() -> list[Check]:
    case, small = rotary_cases.case, rotary_cases.ODD
    return [
        NormRotary(case(small, 17, mx.float32, 2)),
        NormRotary(case(small, 2, mx.float32, 2).first_table()),
        NormRotary(case(small, 1, mx.float32, scale=1e-3)),
        NormRotary(case(small, 17, mx.float16, 2)),
    ]


@dataclass(frozen=True)
class PackedAttention:
    """A call of packed_attention and its join, against float64."""

    case: packed_cases.Case
    scores: float = 1.0  # larger than elsewhere by this

    def __call__(self) -> list[str]:
        ours, wrong = policed(self.case.launch)
        return wrong + packed_cases.differences(ours, self.case.plain(), self.scores)


def packed_checks() -> list[Check]:
    case, small, large = packed_cases.case, packed_cases.ODD, packed_cases.Geometry(2, 128, 4, 8)
    return [
        PackedAttention(packed_cases.two_blocks(mx.float32)),
        PackedAttention(case(large, 1, 5 * packed_cases.BLOCK + 9, mx.float32, Hk=2, spare=0)),
        PackedAttention(case(small, 4, 6, mx.float32, sharp=1000), scores=300),
        PackedAttention(case(small, 4, 70, mx.float16)),
    ]


# --- mutants ---------------------------------------------------------------------------------------------------------

ROW = "{:<21}  {:<58}  {}"
CHECKS: dict[str, Callable[[], list[Check]]] = {
    "gated_delta": delta_checks,
    "add_norm": norm_checks,
    "norm_rotary": rotary_checks,
    "packed_attention": packed_checks,
    "packed_attention_join": packed_checks,
}


@contextlib.contextmanager
def source(kernel: str, text: str) -> Iterator[None]:
    """Within, the kernel has this text."""
    real = fused.source
    with mock.patch.object(fused, "source", lambda name: text if name == kernel else real(name)):
        yield


def broken(mutant: Mutant) -> str:
    """The mutant's text. ValueError if what it replaces is not there as often as stated."""
    text = fused.source(mutant.kernel)
    times = text.count(mutant.find)
    if times != mutant.times:
        raise ValueError(f"NOT APPLIED: {mutant.find!r} is {times} times in the kernel, not {mutant.times}")
    return text.replace(mutant.find, mutant.put)


def wrong(kernel: str, text: str) -> str:
    """What the first check to find anything finds in a kernel with this text; "" where none does."""
    with source(kernel, text):
        for check in CHECKS[kernel]():
            try:
                found = check()
            except CompileError as error:
                return f"does not compile: {str(error).splitlines()[0]}"
            if found:
                return "; ".join(found)
    return ""


def verdict(mutant: Mutant) -> tuple[bool, str]:
    """Whether the mutant is caught, and by what."""
    try:
        found = wrong(mutant.kernel, broken(mutant))
    except ValueError as error:
        return False, str(error)
    return bool(found), found or "SURVIVED"


def main(kernels: list[str]) -> int:
    """Print the table; 1 where an unbroken kernel is found wrong or a mutant is not caught."""
    failed = False
    for kernel in kernels:
        found = wrong(kernel, fused.source(kernel))
        failed |= bool(found)
        print(ROW.format(kernel, "(unbroken)", f"WRONG: {found}" if found else "passes all checks"), flush=True)
    for mutant in MUTANTS:
        if mutant.kernel in kernels:
            caught, found = verdict(mutant)
            failed |= not caught
            print(ROW.format(mutant.kernel, mutant.fault, found), flush=True)
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Break the kernels in stated ways; show what catches each.")
    parser.add_argument("kernels", nargs="*", metavar="kernel", help=f"of {', '.join(CHECKS)}; default: all")
    chosen = parser.parse_args().kernels or list(CHECKS)
    if missing() or not set(chosen) <= set(CHECKS):
        parser.error(missing() or f"the kernels are {', '.join(CHECKS)}")
    sys.exit(main(chosen))
