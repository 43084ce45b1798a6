"""Conversions that are kept: where they lie, how they are listed, sized, removed and guarded."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from refusing import refused

from mlx_qwen35.checkpoint.converted import all_converted, converted, folder_of, hidden, home, owned, to_4bit


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch) -> Path:
    """The place of conversions."""
    monkeypatch.setenv("MLX_QWEN35_HOME", str(tmp_path / "kept"))
    return tmp_path / "kept"


def make(name: str, recipe: str, revision: str | None = None, commit: str = "c0ffee") -> Path:
    folder = folder_of(name, recipe, revision)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "quality.json").write_text(json.dumps({"commit": commit}))
    (folder / "model.safetensors").write_bytes(bytes(100_000))
    return folder


def test_the_place_is_ours_or_in_the_users_cache(kept, monkeypatch, tmp_path):
    assert home() == kept
    monkeypatch.delenv("MLX_QWEN35_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "mlx_qwen35"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "mlx_qwen35"


def test_a_finished_conversion_is_found_by_name_with_recipe_revision_and_commit():
    make("Org/A", "4bit")
    make("Org/A", "8bit", "v1/b", commit="beef")
    make("Org/B", "4bit")
    found = converted("Org/A")
    assert [(c.name, c.recipe, c.revision, c.commit) for c in found] == [
        ("Org/A", "4bit", None, "c0ffee"), ("Org/A", "8bit", "v1/b", "beef"),
    ]  # fmt: skip
    assert [c.name for c in all_converted()] == ["Org/A", "Org/A", "Org/B"]


def test_an_unfinished_conversion_is_listed_and_not_taken_for_a_finished_one():
    folder = folder_of("Org/A", "4bit")
    for place in hidden(folder):
        place.mkdir(parents=True)
    with (hidden(folder)[1] / "part").open("wb") as file:
        file.write(bytes(50_000))
        file.truncate(10**9)  # a hole takes nothing
    assert converted("Org/A") == []
    (found,) = all_converted()
    assert (found.recipe, found.finished) == ("4bit", False)
    assert 50_000 <= found.nbytes < 200_000


def test_what_is_removed_takes_nothing_and_leaves_the_others(kept):
    first, second = make("Org/A", "4bit"), make("Org/A", "8bit")
    found = {c.recipe: c for c in all_converted()}
    assert found["4bit"].nbytes >= 100_000
    found["4bit"].remove()
    assert not first.exists() and second.is_dir()
    found["8bit"].remove()
    assert all_converted() == [] and list((kept / "models").iterdir()) == []


def test_a_removal_that_is_broken_off_leaves_no_half_conversion_and_can_be_given_again(kept, monkeypatch):
    folder = make("Org/A", "4bit")

    def killed(place: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        converted("Org/A")[0].remove()
    assert not folder.exists() and converted("Org/A") == []
    (left,) = all_converted()
    assert not left.finished and left.nbytes >= 100_000
    make("Org/A", "4bit")
    converted("Org/A")[0].remove()
    assert all_converted() == []


def test_the_command_that_converts_a_folder_takes_any_name(tmp_path):
    folder = tmp_path / "my model"
    folder.mkdir()
    words = shlex.split(to_4bit(str(folder)))
    assert words[words.index("--hf-path") + 1] == str(folder)
    assert words[words.index("--mlx-path") + 1] == "my model-4bit"


def test_what_a_process_is_making_is_not_removed_and_the_process_is_named():
    folder = make("Org/A", "4bit")
    (found,) = converted("Org/A")
    with owned(folder), refused("target_busy", str(os.getpid())):
        found.remove()
    assert folder.is_dir()
    found.remove()
    assert not folder.exists()
