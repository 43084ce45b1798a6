"""--json of every command: absent, alone, with a file, before another option."""

import importlib
import json
from argparse import ArgumentParser
from pathlib import Path

import pytest
from refusing import refused

from mlx_qwen35.commands import models
from mlx_qwen35.commands.umbrella import COMMANDS
from mlx_qwen35.console.json_output import STDOUT, add_json, check_json, write_json

FORMS = [((), None), (("--json",), STDOUT), (("--json", "a.json"), Path("a.json")), (("--json", "--quiet"), STDOUT)]
PARSERS = {name: importlib.import_module(module).parser for name, (module, _) in COMMANDS.items()}
PARSERS |= {f"models {name}": make for name, (make, _) in models.ACTIONS.items()}


@pytest.mark.parametrize("name", sorted(set(PARSERS) - {"chat", "completion", "models remove"}))
@pytest.mark.parametrize(("words", "value"), FORMS)
def test_every_command_with_a_result_takes_json_alone_and_with_a_file(name, words, value):
    assert PARSERS[name]().parse(words).json == value


def test_alone_it_takes_the_place_of_the_text(capsys):
    assert write_json(STDOUT, {"é": [1, (2,)]})
    assert json.loads(capsys.readouterr().out) == {"é": [1, [2]]}


def test_with_a_file_the_text_stays(capsys, tmp_path):
    assert not write_json(tmp_path / "a.json", {"a": 1}) and not write_json(None, {})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1} and not capsys.readouterr().out


def test_in_a_line_it_is_one_line(capsys):
    write_json(STDOUT, {"tokens": [1, 2, 3]}, in_a_line=True)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    check_json(tmp_path / "new.json")
    for file in (tmp_path, tmp_path / "absent/a.json"):
        with refused("output_unwritable"):
            check_json(file)


def test_the_value_has_no_default_in_a_parser_of_another_kind():
    parser = ArgumentParser()
    add_json(parser)
    assert parser.parse_args([]).json is None
