"""mlx_qwen35.doctor --plan: recipes planned from headers, the answer with its commands, bars, tables and JSON."""

import functools
import io
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from terminal import Terminal, needs_tmux

from mlx_qwen35.backend import METAL, assume
from mlx_qwen35.budget.parts import LABELS, parts
from mlx_qwen35.budget.plan import MemoryPlan
from mlx_qwen35.budget.roofline import DECODE, token_bytes
from mlx_qwen35.cache.kv_format import UNQUANTIZED
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.random import geometry, write_headers
from mlx_qwen35.commands.umbrella import COMMANDS
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.planned import planned
from mlx_qwen35.convert.recipes import RECIPES, StorageOptions
from mlx_qwen35.doctor import main
from mlx_qwen35.doctor.advice import advice
from mlx_qwen35.doctor.bars import BLOCK, LETTERS, LIMIT, bar, coloured, legend
from mlx_qwen35.doctor.picture import draw_planned
from mlx_qwen35.doctor.plan import AS_IS, CONTEXTS, MACS, Planned, plan_model
from mlx_qwen35.doctor.show_plan import show

EIGHT_GB = 5_726_623_061  # bytes that a model may take on a Mac with 8 GB


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The headers of the 4B as it is published."""
    return write_headers(tmp_path_factory.mktemp("headers") / "Qwen 4B", geometry("4b"))


@pytest.fixture(scope="module")
def packed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by recipe 4bit."""
    return make_plan(raw, StorageOptions("4bit")).write_headers(tmp_path_factory.mktemp("4b-4bit"))


@pytest.fixture(autouse=True)
def m1(on_chip) -> None:
    on_chip("Apple M1")


@functools.cache
def on_an_m1(folder: Path, context: int | None = None, limit: int = EIGHT_GB, mtp: int = 0) -> Planned:
    """The plan on a Mac with an M1."""
    with assume(METAL):
        return plan_model(str(folder), folder, context, None, mtp, limit, UNQUANTIZED)


def sentences(planned: Planned) -> str:
    return " ".join(text for text, _ in advice(planned))


def commands(planned: Planned) -> list[list[str]]:
    """The advised commands, each as its words."""
    return [shlex.split(command) for _, command in advice(planned) if command]


def shown(planned: Planned, columns: int, verbose: bool = False, **options: object) -> str:
    out = Console(file=io.StringIO(), width=columns, **options)  # type: ignore[arg-type]
    show(planned, out, verbose)
    return out.file.getvalue()  # type: ignore[attr-defined]


# --- what is planned -------------------------------------------------------------------------------------------------


def test_what_is_planned_is_what_a_conversion_writes(checkpoint_folder, tmp_path):
    source = checkpoint_folder()
    convert(source, tmp_path / "packed", recipe="4bit", rounding="nearest")
    written, expected = open_checkpoint(tmp_path / "packed"), planned(source, StorageOptions("4bit"))
    assert expected.config == written.config and not expected.folder.exists()
    sizes = [{name: (e.dtype, e.shape) for name, e in one.entries.items()} for one in (expected, written)]
    assert sizes[0] == sizes[1]


def test_a_source_in_16_bit_is_planned_by_every_recipe_and_a_quantized_one_as_it_is(raw, packed):
    quantizing = [name for name, recipe in RECIPES.items() if recipe.bulk]
    found = on_an_m1(raw)
    assert list(found.stored) == [AS_IS, *quantizing]
    assert [row.plan.context for row in found.rows][:: len(MACS) + 1] == list(CONTEXTS) * len(found.stored)
    own = on_an_m1(packed)
    assert list(own.stored) == [AS_IS]
    assert [row.plan for row in own.rows] == [row.plan for row in found.rows if row.stored == "4bit"]


def test_the_parts_of_a_plan_add_up_to_what_it_takes_and_have_their_names(raw):
    for row in on_an_m1(raw, mtp=1).rows:
        found = parts(row.plan)
        assert [label for label, _ in found] == list(LABELS) and sum(size for _, size in found) == row.plan.image
        assert dict(found)["weights"] == row.plan.weights and all(size >= 0 for _, size in found)


def test_speeds_are_the_roofline_s_and_unknown_where_the_chip_or_the_launches_are(packed):
    found = on_an_m1(packed)
    row = found.row(AS_IS)
    assert row.decode == DECODE[""] * 68e9 / token_bytes(found.checkpoint, row.plan)
    assert 16 < row.decode < 20 and 140 < row.prefill < 237  # a base M1 by what was published: 20 to 22 when short
    here = plan_model("4b", packed, None, None, 0, EIGHT_GB, UNQUANTIZED)  # computes on the CPU
    assert (here.row(AS_IS).decode, here.row(AS_IS).prefill) == (None, None)
    assert {row.decode for row in on_an_m1(resolve("nano")).rows} == {None}


# --- the answer ------------------------------------------------------------------------------------------------------


def test_a_model_that_fits_is_answered_with_its_speed_and_its_longest_context(packed):
    found = on_an_m1(packed)
    first, *rest = advice(found)
    assert all(fact in first.text for fact in ("runs on this machine (Apple M1)", "8,192", "3.1 GB", "5.7 GB"))
    assert "18 tokens a second" in rest[0].text and "Longest conversation: 87,040 tokens" in sentences(found)
    assert commands(found) == [["mlx_qwen35", "chat", "--model", str(packed), "--kv-bits", "8"]]


def test_a_model_that_does_not_fit_is_answered_with_the_recipe_that_makes_it_fit(raw):
    found = on_an_m1(raw)
    assert "does not fit" in next(advice(found)).text
    (words,) = commands(found)
    assert words == ["mlx_qwen35", "convert", "--hf-path", str(raw), "--mlx-path", "Qwen 4B-4bit", "--recipe", "4bit"]


def test_a_context_that_does_not_fit_is_answered_with_the_bits_that_make_room(packed):
    found = on_an_m1(packed, 131_072)
    assert "does not fit" in next(advice(found)).text and found.row(AS_IS).kv_bits == "8"
    assert "Longest conversation: 87,040" in sentences(found)
    assert commands(found) == [["mlx_qwen35", "chat", "--model", str(packed), "--kv-bits", "8"]]


def test_a_source_that_fits_only_converted_and_with_fewer_bits_of_keys_is_told_both(raw):
    found = on_an_m1(raw, 131_072)
    assert [words[-1] for words in commands(found)] == ["4bit"] and "--kv-bits 8" in sentences(found)


def test_where_nothing_fits_a_smaller_model_is_advised(raw):
    assert commands(on_an_m1(raw, limit=10**9)) == [["mlx_qwen35", "models", "fit"]]


def test_a_model_without_room_for_images_is_said_to_run_with_text(packed):
    plan = on_an_m1(packed).row(AS_IS).plan
    found = on_an_m1(packed, limit=(plan.text + plan.image) // 2)
    assert found.row(AS_IS).plan.fits and "Images do not fit" in next(advice(found)).text


def test_where_a_chip_is_unknown_the_command_that_measures_is_told(packed):
    found = plan_model("4b", packed, None, None, 0, EIGHT_GB, UNQUANTIZED)
    assert ["mlx_qwen35", "doctor", "--model", "4b"] in commands(found)


def test_every_advised_command_is_one_of_the_umbrella_s(raw, packed):
    cases = [on_an_m1(raw), on_an_m1(packed), on_an_m1(raw, limit=10**9)]
    assert all(words[0] == "mlx_qwen35" and words[1] in COMMANDS for found in cases for words in commands(found))


def test_advised_commands_keep_the_options_that_the_plan_was_computed_with(raw, packed, capsys):
    def told(folder: Path, *options: str) -> dict[str, list[str]]:
        """Command -> its words after the model."""
        main(["--plan", str(folder), "--json", *options])
        found = [shlex.split(one["command"]) for one in json.loads(capsys.readouterr().out)["advice"] if one["command"]]
        return {words[1]: words[4:] for words in found}

    scaled = ("--dtype", "float16", "--rope-scaling", "yarn:2.0")
    small = ("--memory-limit", "5.5")
    assert told(raw, *scaled, *small)["convert"] == ["--mlx-path", "Qwen 4B-4bit", *scaled, "--recipe", "4bit"]
    found = told(packed, *scaled, *small, "--kv-bits", "8/4", "--kv-rotate")
    assert found["doctor"] == ["--dtype", "float16", *small, "--kv-bits", "8/4", "--kv-rotate", *scaled[2:]]
    assert found["chat"] == ["--dtype", "float16", *small, "--kv-rotate", *scaled[2:], "--kv-bits", "4"]


def test_an_advised_command_can_be_pasted_into_a_shell(packed):
    found = replace(on_an_m1(packed), given={"revision": "a b; c", "keep_vision": True})
    assert commands(found) == [
        ["mlx_qwen35", "chat", "--model", str(packed), "--revision", "a b; c", "--kv-bits", "8"]
    ]


# --- bars ------------------------------------------------------------------------------------------------------------


def plan_of(found: Planned, stored: str, gigabytes: str) -> MemoryPlan:
    machine = next(machine for machine in found.machines if gigabytes in machine.name)
    return found.row(stored, machine=machine).plan


@pytest.mark.parametrize("width", [10, 35, 80])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_bar_is_as_wide_as_it_may_be_and_its_limit_stands_where_memory_ends(raw, width, blocks):
    found = on_an_m1(raw, mtp=1)
    fitting, large = (bar(plan_of(found, stored, "8 GB"), width, blocks).plain for stored in ("4bit", AS_IS))
    assert len(fitting) == len(large) == width
    assert fitting[-1] == LIMIT and fitting.count(LIMIT) == large.count(LIMIT) == 1
    plan = plan_of(found, AS_IS, "8 GB")
    assert abs(large.index(LIMIT) / (width - 1) - plan.machine.limit / plan.image) <= 1 / width


@pytest.mark.parametrize("width", [10, 20, 80])
def test_what_is_over_the_limit_stands_beyond_the_mark_however_little(raw, width):
    plan = plan_of(on_an_m1(raw), AS_IS, "8 GB")
    for limit, beyond in ((plan.image, 0), (plan.image - 1, 1)):
        text = bar(replace(plan, machine=replace(plan.machine, limit=limit)), width, False).plain
        assert len(text) == width and len(text) - 1 - text.index(LIMIT) == beyond


@pytest.mark.parametrize(("columns", "verbose"), [(40, False), (64, False), (64, True), (80, True)])
def test_a_bar_has_room_or_a_line_of_its_own(raw, columns, verbose):
    found = re.findall(r"[wvdksm]{2,}\.*\|[wvdksm]*", shown(on_an_m1(raw), columns, verbose))
    assert {len(text) for text in found} == {max(map(len, found))} and len(found[0]) >= 20


def test_parts_have_their_share_of_a_bar_in_letters_or_in_colours(raw):
    plan = replace(plan_of(on_an_m1(raw, mtp=1), "4bit", "8 GB"), adapters=10**8)
    letters = bar(plan, 1001, False).plain
    for label, nbytes in parts(plan):
        assert abs(letters.count(LETTERS[label]) - 1000 * nbytes / plan.machine.limit) <= 1, label
    coloured_bar = bar(plan, 1001, True)
    assert coloured_bar.plain.count(BLOCK) == sum(letters.count(letter) for letter in LETTERS.values())
    assert len({span.style for span in coloured_bar.spans}) == len(LABELS) + 2  # what is free, and the limit


def test_letters_take_the_place_of_colours_in_a_pipe_with_no_color_and_without_unicode():
    def terminal(encoding: str = "utf-8", **options: object) -> Console:
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        return Console(file=file, force_terminal=True, color_system="standard", **options)  # type: ignore[arg-type]

    assert coloured(terminal())
    assert not coloured(terminal(no_color=True)) and not coloured(terminal("ascii"))
    assert not coloured(Console(file=io.StringIO()))


def test_the_legend_names_what_is_shown_and_keeps_to_the_width(raw):
    plan = plan_of(on_an_m1(raw), "4bit", "8 GB")
    text = legend([plan], False, 40).plain
    assert max(map(len, text.splitlines())) <= 40
    assert "k keys and values" in text and "draft head" not in text  # it is not counted


# --- what is printed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "verbose"), [(40, False), (40, True), (80, True), (132, False)])
def test_nothing_but_commands_is_wider_than_the_terminal(raw, columns, verbose):
    named = replace(on_an_m1(raw), name="Qwen 4B")  # as it is typed; the folder's path is as long as that of the tests
    lines = shown(named, columns, verbose).splitlines()
    tables = next((i for i, line in enumerate(lines) if verbose and line.startswith("GB (")), len(lines))
    wide = [line for line in lines[: tables - 2] if len(line) > columns]
    assert all(line.startswith("  mlx_qwen35 ") for line in wide), wide


def test_there_is_a_bar_for_each_mac_and_a_row_for_each_recipe_and_context(raw):
    text = shown(replace(on_an_m1(raw), name="Qwen 4B"), 80)
    for gigabytes, chip in MACS:
        assert re.search(rf"^{chip}, {gigabytes} GB +[wvdksm]+\.*\|", text, re.MULTILINE)
    for context in CONTEXTS:
        assert re.search(rf"^4bit, nvfp4 +{context:,} ", text, re.MULTILINE)
    assert "\033" not in text and max(map(len, text.splitlines()[6:])) <= 80
    assert len(text.splitlines()) <= 40


def test_a_cell_is_a_speed_an_option_or_no(raw):
    rows = {tuple(line.split()[:-1]): line for line in shown(on_an_m1(raw), 400).splitlines()}
    row = next(line for line in rows.values() if line.startswith("8bit") and "32,768" in line)
    assert re.split(r"  +", row)[2:4] == ["kv 8"] * 2
    assert any(re.split(r"  +", line)[:4] == [AS_IS, "8,192", "no", "no"] for line in rows.values())


def test_the_command_prints_the_answer_first_and_json_in_its_place(capsys):
    main(["--plan", "nano", "--context", "4096"])
    assert capsys.readouterr().out.startswith("nano runs on this machine")
    main(["--plan", "nano", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "model", "adapters", "context", "max_context", "draft_tokens", "longest_contexts", "speeds", "advice",
        "machines", "plans",
    }  # fmt: skip
    assert set(found["advice"][0]) == {"text", "command"}
    assert {key for machine in found["machines"] for key in machine} == {"name", "chip", "limit", "dtype", "kv_bits"}
    assert {key for plan in found["plans"] for key in plan} == {
        "machine", "recipe", "context", "fits", "fits_with_image", "fits_with_kv_bits", "bytes", "bytes_with_image",
        "parts", "decode", "prefill", "chunk",
    }  # fmt: skip
    for plan in found["plans"]:
        assert list(plan["parts"]) == [label.replace(" ", "_") for label in LABELS]
        assert sum(plan["parts"].values()) == plan["bytes_with_image"]


def test_json_into_a_file_leaves_the_text(tmp_path, capsys):
    main(["--plan", "nano", "--json", str(tmp_path / "plan.json")])
    assert capsys.readouterr().out.startswith("nano ") and json.loads((tmp_path / "plan.json").read_text())["plans"]


@needs_tmux
def test_on_a_terminal_bars_have_colours_and_with_no_color_letters(tmp_path):
    command = [sys.executable, "-m", "mlx_qwen35.doctor", "--plan", "nano", "--memory-limit", "0.1"]
    for setting, mark in (({}, BLOCK), ({"NO_COLOR": "1"}, "m")):
        with Terminal(command, tmp_path / "home", (80, 40), setting) as terminal:
            terminal.wait("TFLOPS")
            assert f"{mark * 3}" in terminal.screen()
            assert bool(re.search(r"\033\[3[1-6]m", terminal.screen(colours=True))) != bool(setting)


# --- the picture -----------------------------------------------------------------------------------------------------


def test_the_parts_of_each_bar_add_up_to_its_share_of_the_limit(packed, tmp_path):
    pytest.importorskip("matplotlib")
    planned = on_an_m1(packed)
    figure = draw_planned(tmp_path / "plan.png", planned)
    (axes,) = figure.axes
    rows = [planned.row(AS_IS, machine=machine) for machine in planned.machines]
    ends = [sum(bar.get_width() for bar in axes.patches if bar.get_y() < place < bar.get_y() + 1) for place in range(4)]
    assert ends == pytest.approx([100 * row.plan.image / row.plan.machine.limit for row in rows])
    assert figure.get_suptitle().endswith("fits 4 of 4 machines")
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [machine.name for machine in planned.machines]


def test_the_claim_counts_the_bars_that_end_before_the_line(packed, tmp_path):
    pytest.importorskip("matplotlib")
    plan = on_an_m1(packed).row(AS_IS).plan
    planned = on_an_m1(packed, limit=(plan.text + plan.image) // 2)
    assert planned.row(AS_IS).plan.fits  # text alone
    assert draw_planned(tmp_path / "plan.png", planned).get_suptitle().endswith("fits 3 of 4 machines")
