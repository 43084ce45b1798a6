"""A recipe in a file: what is written is read again, and what is none is refused."""

import json

import pytest
from refusing import refused

from mlx_qwen35.convert.recipes import find_recipe, save_recipe
from mlx_qwen35.quantization import Quantization

FOUR, EIGHT = Quantization(64, 4, "affine"), Quantization(64, 8, "affine")


def test_a_saved_recipe_is_found_again(tmp_path):
    file = tmp_path / "own.json"
    save_recipe(file, {"a.weight": EIGHT, "b.weight": None, "c.weight": FOUR}, FOUR, "by KL")
    recipe = find_recipe(str(file))
    assert recipe.bulk == FOUR and recipe.exceptions == {"a.weight": EIGHT, "b.weight": None}
    assert recipe.reasons == ("by KL",) and recipe.vision_bits == 8


@pytest.mark.parametrize(
    "values",
    [
        {"exceptions": {}},
        {"bulk": {"bits": 4}, "exceptions": {}},
        {"bulk": {"bits": 7, "group_size": 64, "mode": "affine"}, "exceptions": {}},
        {"bulk": {"bits": 4, "group_size": 64, "mode": "affine"}, "exceptions": []},
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, values):
    file = tmp_path / "own.json"
    file.write_text(json.dumps(values))
    with refused("recipe_invalid"):
        find_recipe(str(file))


def test_a_recipe_that_cannot_be_written_is_told(tmp_path):
    with refused("output_unwritable", "--save-recipe"):
        save_recipe(tmp_path / "absent" / "own.json", {}, FOUR, "")


def test_what_else_an_entry_says_is_for_people(tmp_path):
    file = tmp_path / "recipe.json"
    bulk = {"group_size": 64, "bits": 4, "mode": "affine"}
    exceptions = {"o_proj.weight": bulk | {"comment": "not mine"}}
    file.write_text(json.dumps({"bulk": bulk | {"comment": "mine"}, "exceptions": exceptions}))
    found = find_recipe(str(file))
    assert found.bulk == found.exceptions["o_proj.weight"] == Quantization(64, 4, "affine")
