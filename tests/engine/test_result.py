"""A result is its text, wherever a program takes a string, and has the rest in fields."""

import ast
import copy
import io
import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import pytest

import mlx_qwen35
from mlx_qwen35 import generate, load
from mlx_qwen35.engine.result import Result


@pytest.fixture(scope="module")
def result() -> Result:
    return generate(*load("nano"), prompt="What is 34 + 58?", temp=0, max_tokens=40)


def test_it_is_a_string_wherever_one_is_taken(result, capsys):
    file = io.StringIO()
    assert file.write(result) == 2 and file.getvalue() == "92"
    print(result)
    assert capsys.readouterr().out == "92\n"
    assert json.loads(result) == 92 and json.dumps({"answer": result}) == '{"answer": "92"}'
    assert f"{result:>4}" == "  92" and result.strip() == "92" and "9" in result and len(result) == 2
    assert re.search(r"\d+", result).group() == "92" and ", ".join([result, result]) == "92, 92"
    for text in (str(result), result + "", "" + result, result[:], result.text):
        assert type(text) is str and text == "92"


def test_equality_hash_and_truth_are_those_of_the_text(result):
    other = replace(result, tokens=(1,), reasoning="")
    assert result == other == "92" and {result: 1}[other] == {"92": 1}[result] == 1
    assert result and not replace(result, text="")


def test_its_fields_are_shown_and_do_not_change(result):
    assert repr(result).startswith("Result(text='92', reasoning='4+8=12")
    for name in ("text", "tokens", "anything"):
        with pytest.raises(FrozenInstanceError):
            setattr(result, name, "x")


def test_a_copy_has_the_text_and_every_field(result):
    for other in (copy.copy(result), copy.deepcopy(result), pickle.loads(pickle.dumps(result)), replace(result)):
        assert other == "92" and type(other) is Result and asdict(other) == asdict(result)


def test_an_answer_can_be_the_next_prompt(result):
    model, processor = load("nano")
    said = generate(model, processor, prompt=result, temp=0, max_tokens=5)
    assert said.tokens == generate(model, processor, prompt="92", temp=0, max_tokens=5).tokens


# --- a result of an empty text is false, so nothing may be asked for by its truth ------------------------------------


def conditions(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.BoolOp):
            yield from node.values
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node.operand


def test_no_code_asks_by_truth_whether_there_is_a_result():
    for path in Path(mlx_qwen35.__file__).parent.rglob("*.py"):
        for condition in conditions(ast.parse(path.read_text())):
            name = getattr(condition, "attr", getattr(condition, "id", None))
            assert name != "result", f"{path.name}:{condition.lineno}: compare with None"
