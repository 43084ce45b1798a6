"""What two models are called beside each other, and how a summary says that they were loaded."""

import pytest

from mlx_qwen35.evaluate.labels import labels
from mlx_qwen35.evaluate.subject import Subject
from mlx_qwen35.load import LoadOptions

BARE = {"weights": "a", "dtype": "float32"}


@pytest.mark.parametrize(
    ("models", "called"),
    [
        ([("me/pack", BARE)], ["me/pack"]),
        ([("nano", BARE | {"adapter": "house"}), ("nano", BARE)], ["nano + house", "nano"]),
        ([("nano", BARE | {"kv_bits": "8"}), ("nano", BARE)], ["nano, kv_bits 8", "nano"]),
        ([("me/a", BARE | {"revision": "v1"}), ("me/a", BARE)], ["me/a, revision v1", "me/a"]),
        ([("nano", BARE), ("nano", BARE)], ["nano", "nano again"]),
    ],
)
def test_no_two_models_are_called_alike(models, called):
    assert labels(models) == called


def test_folders_of_one_name_are_called_by_the_parts_that_tell_them_apart(tmp_path):
    folders = [tmp_path / name / "packs" / "4bit" for name in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert labels([(str(folder), BARE) for folder in folders]) == ["a/packs/4bit", "b/packs/4bit"]


def test_how_a_model_is_loaded_is_told_where_it_is_not_the_default(tmp_path):
    plain, other = (
        Subject(LoadOptions("nano", **more), {}, 1, 0, tmp_path).loaded()
        for more in ({}, {"kv_bits": "8", "dtype": "float16", "rope_scaling": "yarn:2.0"})
    )
    assert plain == {"weights": plain["weights"], "dtype": "float32"}
    assert other == plain | {"dtype": "float16", "kv_bits": "8", "rope_scaling": "yarn:2.0"}
