"""mlx_qwen35.models: the list of what is on this machine, its removal, and what fits."""

import io
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from terminal import Terminal, needs_tmux, ours

from mlx_qwen35 import load
from mlx_qwen35.budget.plan import mac
from mlx_qwen35.budget.roofline import prefill_speed
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.random import geometry, write_headers
from mlx_qwen35.commands import chat, fit, models
from mlx_qwen35.commands.fit import Fit, format_fits, recommended
from mlx_qwen35.commands.stored import stored
from mlx_qwen35.machine.chip import chip_name, parse_chip
from mlx_qwen35.machine.process import is_locked, show_in_use

HUB_ID, OURS, STUDIO = "Qwen/Qwen3.5-nano", "Qwen/Qwen3.5-4B", "~/.lmstudio/models/someone/nano-mlx"


def link(folder: Path, cache: Path, repository: str) -> Path:
    """A repository in Hugging Face's cache that holds the files of a folder; returns its place."""
    place = cache / f"models--{repository.replace('/', '--')}"
    for part in ("blobs", "refs", "snapshots/abc"):
        (place / part).mkdir(parents=True)
    (place / "refs/main").write_text("abc")
    for file in folder.iterdir():
        shutil.copy(file, place / "blobs" / file.name)
        (place / "snapshots/abc" / file.name).symlink_to(f"../../blobs/{file.name}")
    return place


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's folder with a model in each place, and one of another family."""
    tiny, other = write_headers(tmp_path / "tiny", geometry("tiny")), tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLX_QWEN35_HOME", str(tmp_path / "ours"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    link(tiny, tmp_path / "hub", HUB_ID)
    link(other, tmp_path / "hub", "google/bert")
    shutil.copytree(tiny, tmp_path / "ours/models/Qwen--Qwen3.5-4B/4bit")
    shutil.copytree(tiny, Path(STUDIO).expanduser())
    return tmp_path


@pytest.fixture
def run(capsys, monkeypatch):
    """The words after mlx_qwen35.models -> (exit status, standard output, standard error)."""

    def ran(*words: str) -> tuple[int, str, str]:
        status = 0
        try:
            models.main(words)
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, *capsys.readouterr()

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return ran


def listed(run, *words: str) -> dict[str, dict]:
    return {found["model"]: found for found in json.loads(run("--json", *words)[1])}


# --- list ------------------------------------------------------------------------------------------------------------


def test_the_list_has_what_is_in_each_place(home, run):
    found = listed(run)
    assert {name: model["place"] for name, model in found.items()} == {
        OURS: "converted", HUB_ID: "hub", STUDIO: "lm studio", "nano": "package",
    }  # fmt: skip
    assert found[OURS]["recipe"] == "4bit" and found[HUB_ID]["recipe"] is None
    assert all(model["storage"] == "bfloat16" and not model["fault"] for model in found.values())
    assert all(model["holds"] == ["text", "vision", "drafts"] for model in found.values())
    assert found[STUDIO]["bytes"] == sum(file.stat().st_size for file in Path(STUDIO).expanduser().iterdir())
    assert found[HUB_ID]["last_used"] > 1e9


def test_the_text_of_the_list_says_what_to_type_and_fits_80_columns(home, run):
    status, out, _ = run("list")
    assert status == 0 and max(len(line) for line in out.splitlines() if STUDIO not in line) <= 80  # but for a path
    for name in (f"{OURS} --recipe 4bit", HUB_ID, STUDIO, "nano"):
        assert f"  {name}\n" in out


def test_models_of_other_families_are_shown_with_all_alone(home, run):
    assert "google/bert" not in listed(run)
    assert listed(run, "--all")["google/bert"]["fault"] == "model_type_unsupported"


def test_a_model_whose_weights_are_absent_is_listed_with_what_is_wrong(home, run):
    (home / "hub/models--Qwen--Qwen3.5-nano/snapshots/abc/model.safetensors").unlink()
    assert listed(run)[HUB_ID]["fault"] == "weights_missing"


def test_an_unfinished_conversion_is_listed(home, run):
    (home / "ours/models/Qwen--Qwen3.5-9B/.8bit.converting").mkdir(parents=True)
    assert listed(run)["Qwen/Qwen3.5-9B"]["fault"] == "unfinished"


def test_without_any_cache_nano_is_there(tmp_path, monkeypatch, run):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLX_QWEN35_HOME", str(tmp_path / "ours"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert list(listed(run)) == ["nano"]


def test_no_name_controls_the_terminal_and_json_keeps_it(home, run):
    name = "evil\x1b]0;title\x07\nx"
    Path(STUDIO).expanduser().rename(Path(STUDIO).expanduser().parent / name)
    out = run("list")[1]
    assert out.replace("\n", "").isprintable() and "evil\u241b]0;title\u2407\u240ax" in out
    assert any(found.endswith(name) for found in listed(run))


# --- remove ----------------------------------------------------------------------------------------------------------


def test_a_download_and_a_conversion_are_removed_each_by_its_name(home, run):
    status, out, _ = run("remove", HUB_ID, "--yes")
    assert status == 0 and "freed" in out
    assert HUB_ID not in listed(run) and not (home / "hub/models--Qwen--Qwen3.5-nano").exists()
    assert run("remove", OURS, "--recipe", "4bit", "--yes")[0] == 0
    assert OURS not in listed(run) and not (home / "ours/models/Qwen--Qwen3.5-4B").exists()


def test_what_was_removed_is_told_as_json(home, run):
    status, out, _ = run("remove", HUB_ID, "--yes", "--json")
    assert status == 0 and [model["model"] for model in json.loads(out)] == [HUB_ID]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((STUDIO, "--yes"), "target_refused"), (("nano", "--yes"), "target_refused"),
        (("absent/model", "--yes"), "model_not_found"), ((OURS, "--yes"), "model_not_found"),
        ((HUB_ID, "--recipe", "4bit", "--yes"), "model_not_found"), ((HUB_ID,), "option_missing"),
        ((HUB_ID, "absent/model", "--yes"), "model_not_found"), ((), "option_invalid"),
    ],
)  # fmt: skip
def test_what_must_not_or_cannot_be_removed_is_refused_and_nothing_is_lost(home, run, words, code):
    before = listed(run, "--all")
    status, _, err = run("remove", *words)
    assert status == 2 and err.endswith(f"[{code}]\n") and err.count("\n") == 1
    assert listed(run, "--all").keys() == before.keys()


class Typed(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "stays"), [("y\n", False), ("n\n", True), ("\n", True), ("", True)])
def test_at_a_terminal_it_asks(home, run, monkeypatch, answer, stays):
    monkeypatch.setattr(sys, "stdin", Typed(answer))
    status, _, err = run("remove", HUB_ID)
    assert status == 0 and HUB_ID in err
    assert (f"kept {HUB_ID}" in err) is stays
    assert (HUB_ID in listed(run)) is stays


class Owner:
    """What a model is to a file that it shows in use."""


@pytest.mark.parametrize(("name", "words"), [(HUB_ID, ()), (OURS, ("--recipe", "4bit"))])
def test_a_model_that_is_loaded_stays_until_it_is_let_go(home, run, name, words):
    (folder,) = (model.folder for model in stored() if model.name == name)
    owner = Owner()
    show_in_use(folder / "config.json", owner)
    status, _, err = run("remove", name, *words, "--yes")
    assert status == 2 and err.endswith("[target_busy]\n") and folder.is_dir()
    del owner
    assert run("remove", name, *words, "--yes")[0] == 0 and not folder.exists()


def test_where_one_of_several_is_in_use_none_is_removed(home, run):
    link(home / "tiny", home / "hub", "Qwen/Qwen3.5-other")
    owner = Owner()
    show_in_use(home / "hub/models--Qwen--Qwen3.5-other/snapshots/abc/config.json", owner)
    before = listed(run)
    assert run("remove", HUB_ID, "Qwen/Qwen3.5-other", "--yes")[2].endswith("[target_busy]\n")
    assert listed(run).keys() == before.keys()


def test_a_model_that_is_being_downloaded_stays(home, run):
    lock = home / "hub/.locks/models--Qwen--Qwen3.5-nano/abc.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    owner = Owner()
    show_in_use(lock, owner)
    assert run("remove", HUB_ID, "--yes")[2].endswith("[target_busy]\n")


def test_a_loaded_model_shows_that_it_is_in_use(tmp_path):
    shutil.copytree(resolve("nano"), tmp_path / "model")
    file = tmp_path / "model/config.json"
    model, processor = load(file.parent)
    assert is_locked(file)
    del model, processor
    assert not is_locked(file)


# --- fit -------------------------------------------------------------------------------------------------------------


def test_an_m1_with_8_gb_is_given_the_4b_in_4_bit(run, monkeypatch):
    monkeypatch.setattr(fit, "SIZES", ("4b",))
    found = json.loads(run("fit", "--json", "--memory", "8")[1])["fits"]
    (best,) = (row for row in found if row["recommended"])
    assert (best["model"], best["recipe"]) == ("Qwen/Qwen3.5-4B", "4bit")
    assert best["memory_bytes"] < 3.3e9 and best["longest_context"] > 65_536
    assert 15 < best["computed_decode_tokens_per_second"] < 22
    assert [row["recipe"] for row in found if not row["fits"]] == ["bf16"]


def a_fit(size: str, recipe: str, memory: float = 3e9, left: float = 9e9, longest: int = 65_536, speed=20.0) -> Fit:
    return Fit(size, recipe, int(memory), int(memory), int(left), longest, speed)


SMALL = a_fit("2b", "4bit", left=5e9)


@pytest.mark.parametrize(
    "large",
    [a_fit("4b", "4bit", left=4.9e9), a_fit("4b", "4bit", longest=32_767), a_fit("4b", "4bit", speed=9.9),
     a_fit("4b", "4bit", longest=0)],
    ids=["no memory for others", "short context", "slow", "too large"],
)  # fmt: skip
def test_a_larger_model_is_recommended_where_it_is_good_enough(large):
    assert recommended([large, SMALL]) is SMALL
    for enough in (a_fit("4b", "4bit"), a_fit("4b", "4bit", speed=None)):
        assert recommended([enough, SMALL]) is enough


def test_where_none_is_good_enough_the_smallest_that_fits_is_recommended():
    slow = a_fit("4b", "4bit", speed=2), a_fit("2b", "4bit", speed=5)
    assert recommended(slow) is slow[1]


def test_the_text_names_what_is_too_large_and_what_to_type():
    text = format_fits(mac(8), [a_fit("4b", "8bit", 9e9, longest=0), a_fit("4b", "4bit", 7e9, longest=0), SMALL])
    assert text.endswith(f"\n  {SMALL.command}") and "4B (4bit takes 7.0 GB)" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("recipe", fit.RECIPES)
def test_the_command_to_type_is_one_that_chat_takes(recipe):
    words = shlex.split(a_fit("4b", recipe).command)
    assert words[:2] == ["mlx_qwen35", "chat"]
    args = chat.parser().parse(words[2:])
    assert (args.model, args.recipe) == ("Qwen/Qwen3.5-4B", None if recipe == "bf16" else recipe)


def test_where_nothing_fits_nano_does():
    assert format_fits(mac(2), [a_fit("4b", "4bit", longest=0)]).endswith("mlx_qwen35 chat --model nano")


@pytest.mark.parametrize(
    ("words", "code"),
    [(("--chip", "M4"), "option_no_effect"), (("--memory", "0"), "option_invalid"),
     (("--memory", "x"), "option_invalid"),
     *((("--memory", "8", "--chip", chip), "option_invalid") for chip in ("X1", "M0", "M6", "M1 Foo", "M5 Ultra"))],
)  # fmt: skip
def test_a_mac_that_is_none_is_refused(run, words, code):
    status, _, err = run("fit", *words)
    assert status == 2 and err.endswith(f"[{code}]\n")


def test_a_chip_is_known_however_its_letters_are_written():
    assert [chip_name("--chip", name) for name in ("M2 max", "m5", "M3 ULTRA")] == ["M2 Max", "M5", "M3 Ultra"]


def test_of_m5_no_prefill_speed_is_computed():
    config = parse_config(geometry("4b")).text
    assert prefill_speed(config, 1024, parse_chip("Apple M5")) is None
    assert prefill_speed(config, 1024, parse_chip("Apple M4"))


# --- a terminal ------------------------------------------------------------------------------------------------------


@needs_tmux
def test_in_a_terminal_a_download_is_removed_with_a_y(home):
    place = home / "hub/models--Qwen--Qwen3.5-nano"
    settings = {"HF_HUB_CACHE": str(home / "hub"), "MLX_QWEN35_HOME": str(home / "ours")}
    with Terminal(ours("mlx_qwen35", "models", "remove", HUB_ID), home, environment=settings) as terminal:
        terminal.wait("[y/N]")
        assert place.exists()
        terminal.type("y")
        assert terminal.ended() == 0
        assert f"removed {HUB_ID}" in terminal.screen() and not place.exists()
