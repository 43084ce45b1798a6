"""Every error has a stable code, and every code is raised somewhere."""

import ast
import pickle
from pathlib import Path

import pytest

from mlx_qwen35.errors import CODES, InputError

ROOT = Path(__file__).parent.parent


def _raised() -> dict[str, list[str]]:
    """Literal code -> where an InputError (or a kind of it) is made with it, in the package and the converter."""
    kinds, found = {"InputError"}, {}
    trees = {
        file: ast.parse(file.read_text()) for top in ("mlx_qwen35", "convert") for file in (ROOT / top).rglob("*.py")
    }
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    kinds |= {
        node.name
        for _, node in nodes
        if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "InputError" for base in node.bases)
    }
    for file, node in nodes:
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in kinds:
            continue
        for part in ast.walk(node.args[0]):
            if isinstance(part, ast.Constant):
                found.setdefault(part.value, []).append(f"{file.name}:{node.lineno}")
    return found


def test_every_code_that_is_raised_is_listed_and_the_other_way_round():
    assert set(_raised()) == set(CODES)


def test_an_error_is_its_message_and_keeps_its_code_through_a_pickle():
    error = pickle.loads(pickle.dumps(InputError("option_invalid", "temp must be a number")))
    assert (str(error), error.code) == ("temp must be a number", "option_invalid")
    error = pickle.loads(pickle.dumps(InputError("memory_exceeded", "it needs 9 GB", "Choose another")))
    assert (error.fault, str(error)) == ("it needs 9 GB", "it needs 9 GB. Choose another")


def test_an_unlisted_code_is_our_own_mistake():
    with pytest.raises(AssertionError):
        InputError("misspelt", "words")
