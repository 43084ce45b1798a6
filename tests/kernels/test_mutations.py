"""A kernel that is broken is caught by the checks of mutations.py, whatever the fault."""

import pytest
from kernels import mutations
from kernels.emulator import missing
from kernels.mutants import MUTANTS, Mutant

from mlx_qwen35.kernels import fused

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
FIRST = [next(mutant for mutant in MUTANTS if mutant.kernel == kernel) for kernel in mutations.CHECKS]
EACH = [pytest.param(m, marks=[] if m in FIRST else pytest.mark.full) for m in MUTANTS]


@pytest.mark.parametrize("mutant", EACH, ids=str)
def test_a_broken_kernel_is_caught_when_it_runs(mutant):
    found = mutations.wrong(mutant.kernel, mutations.broken(mutant))
    assert found and not found.startswith("does not compile")


@pytest.mark.full
@pytest.mark.parametrize("kernel", mutations.CHECKS)
def test_the_unbroken_kernel_passes_the_same_checks(kernel):
    assert mutations.wrong(kernel, fused.source(kernel)) == ""


@pytest.mark.full
@pytest.mark.parametrize(
    ("mutant", "status", "shown"),
    [
        (Mutant("add_norm", "the fault", "no such text", ""), 1, "NOT APPLIED: 'no such text' is 0 times"),
        (Mutant("add_norm", "the fault", "== 0", "== 5"), 1, "SURVIVED"),
        (Mutant("add_norm", "the fault", "partial[i]", "partial(i)"), 0, "does not compile"),
    ],
)
def test_the_script_fails_where_a_mutant_is_not_caught(monkeypatch, capsys, mutant, status, shown):
    monkeypatch.setattr(mutations, "MUTANTS", [mutant])
    assert mutations.main(["add_norm"]) == status
    assert f"the fault {shown}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.full
def test_the_script_fails_where_the_unbroken_kernel_does(monkeypatch, capsys):
    monkeypatch.setattr(mutations, "MUTANTS", [])
    text = fused.source("add_norm").replace("WIDTH + epsilon", "WIDTH + 1.0f")
    monkeypatch.setattr(fused, "source", lambda name: text)
    assert mutations.main(["add_norm"]) == 1
    assert "(unbroken)" in (out := capsys.readouterr().out) and "WRONG: norm differs" in out
