"""No test replaces a private name of mlx_qwen35, or a name in a module that only imports it."""

from pathlib import Path
from unittest import mock

import pytest
from patching import UNGUARDED, PatchRefused, assigned

from mlx_qwen35.budget import chunk
from mlx_qwen35.budget.chunk import Launch, chunk_length
from mlx_qwen35.model.decoder import MLP

TESTS = Path(__file__).parent
REFUSED = {
    "private, of a module": (chunk, "_hidden"),
    "private, of a class": (Launch, "_hidden"),
    "private, of an object": (MLP.__new__(MLP), "_hidden"),
    "an imported function": (chunk, "this_chip"),
    "an imported class": (chunk, "Chip"),
    "an imported constant": (chunk, "FULL"),
    "an imported module": (chunk, "math"),
    "a builtin": (chunk, "open"),
}


@pytest.mark.parametrize(("owner", "name"), REFUSED.values(), ids=REFUSED)
def test_a_patch_is_refused(owner, name, monkeypatch):
    with pytest.raises(PatchRefused):
        monkeypatch.setattr(owner, name, None, raising=False)
    with pytest.raises(PatchRefused):
        monkeypatch.delattr(owner, name, raising=False)
    with pytest.raises(PatchRefused):
        mock.patch.object(owner, name, None)
    with pytest.raises(PatchRefused):
        mock.patch.multiple(owner, **{name: None})


@pytest.mark.parametrize("name", ["chunk.this_chip", "chunk._hidden", "chunk.Launch._hidden"])
def test_a_patch_is_refused_by_its_dotted_name(name, monkeypatch):
    with pytest.raises(PatchRefused):
        monkeypatch.setattr(f"mlx_qwen35.budget.{name}", None)
    with pytest.raises(PatchRefused):
        monkeypatch.delattr(f"mlx_qwen35.budget.{name}")
    with pytest.raises(PatchRefused):
        mock.patch(f"mlx_qwen35.budget.{name}", None)


def test_a_patch_of_the_names_of_a_module_is_refused(monkeypatch):
    with pytest.raises(PatchRefused):
        monkeypatch.setitem(chunk_length.__globals__, "this_chip", None)


def test_a_patch_in_a_context_is_refused():
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PatchRefused):
        patch.setattr(chunk, "this_chip", None)


def test_a_public_name_is_replaced_where_it_is_defined(monkeypatch):
    monkeypatch.setattr(chunk, "chunk_length", None)
    monkeypatch.setattr("mlx_qwen35.budget.chunk.LENGTHS", None)
    monkeypatch.setattr(Launch, "flops", None)
    with mock.patch.object(chunk, "SUSTAINED", None):
        assert chunk.chunk_length is chunk.LENGTHS is Launch.flops is chunk.SUSTAINED is None


# --- without monkeypatch ----------------------------------------------------------------------------------------------

IMPORTS = """import mlx_qwen35 as top, mlx_qwen35.budget.chunk as module, os
from mlx_qwen35.budget import chunk
from mlx_qwen35.budget.chunk import Launch
"""
SETS = {
    "chunk.this_chip = None": 1,
    "chunk.Launch._hidden = None": 1,
    "top.budget.chunk.this_chip, x = None, None": 1,
    "x = module.Launch._hidden = None": 1,
    "Launch._hidden += 1": 1,
    "del Launch._hidden": 1,
    "setattr(chunk, 'this_chip', None)": 1,
    "delattr(chunk, 'this_chip')": 1,
    "chunk.LENGTHS = Launch.flops = None": 0,
    "x = chunk.this_chip, os._exit, Launch._hidden": 0,
    "os._exit = None": 0,
}
PROGRAMS = {
    "a test": "{}",
    "a program in a test": "run('''\n{}''')",
    "a program with gaps": "run(f'''\n{}print({{x}})''')",
    "a program in a block": "def test():\n    run('''\n        if 1:\n            {}''')",
}


@pytest.mark.parametrize("statement", SETS)
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_what_a_file_sets_is_found(statement, program):
    indent = program.split("\n")[-1].split("{")[0]
    source = program.format(f"{IMPORTS}{statement}\n".replace("\n", "\n" + indent))
    assert len(list(assigned(source))) == SETS[statement]


def test_no_test_sets_what_it_may_not():
    files = [file for file in TESTS.rglob("*.py") if not any(name in str(file) for name in UNGUARDED)]
    found = [(file.name, line, reason) for file in files for line, reason in assigned(file.read_text())]
    assert found == []
