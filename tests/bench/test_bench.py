"""mlx_qwen35.bench: what it runs in which order and what it says of it. No timing is asserted."""

import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_qwen35.bench import command, main
from mlx_qwen35.bench.measure import OURS, Measurement, ProgramError, Settings, in_turn, measure, started, summarize
from mlx_qwen35.bench.plot import claim, draw
from mlx_qwen35.bench.report import format_table
from mlx_qwen35.bench.scatter import NOT_MEASURABLE

ROOT = Path(__file__).parents[2]
SETTINGS = Settings((5, 9), decode_tokens=3, repeats=2, prefill_step_size=4, dtype="float32")
QUICK = ("--prompt-lengths", "5,9", "--decode-tokens", "2", "--repeats", "1", "--prefill-step-size", "4")


class FakeWorker:
    """Answers like a worker, and notes in a list that all share what it was asked."""

    def __init__(self, name: str, asked: list[tuple[str, dict]], fails_at: int | None = None):
        self.name, self.asked, self.fails_at = name, asked, fails_at

    def ask(self, **request: int) -> dict:
        self.asked.append((self.name, request))
        if "products" in request:
            return {"products_s": [0.5, 0.5, 9.0]}
        if request["prompt"] == self.fails_at:
            raise ProgramError(self.name, "out of paper")
        decode = [1.0 if self.name == OURS else 2.0] * request["decode"]
        return {"prefill_s": 2.0, "decode_s": decode, "mlx_peak_bytes": None, "max_rss_bytes": 7}


def measured(*names: str, **fails_at: int) -> tuple[list[Measurement], list[tuple[str, dict]], dict[str, str]]:
    asked: list[tuple[str, dict]] = []
    failures: dict[str, str] = {}
    workers = [FakeWorker(name, asked, fails_at.get(name)) for name in names]
    return measure(workers, SETTINGS, failures, lambda line: None), asked, failures


def run_of(program: str, round: int, prefill: float, token: float) -> Measurement:
    return Measurement(program, 8, round, prefill, token, 0.25, 10, 20)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made during the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_round_goes_forward_and_the_next_one_backward():
    assert [in_turn("abc", round) for round in range(3)] == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


def test_every_program_is_warmed_up_and_then_runs_once_a_round_in_turn():
    runs, asked, failures = measured(OURS, "a", "b")
    order = [name for name, request in asked if request.get("prompt") == 5]
    assert order == ["b", "a", OURS, OURS, "a", "b", "b", "a", OURS]  # the warm-up first
    assert len(runs) == 2 * 3 * 2 and {run.round for run in runs} == {0, 1} and not failures


def test_the_bare_products_are_timed_by_us_after_every_run():
    runs, asked, _ = measured(OURS, "a")
    assert [name for name, request in asked[1::2]] == [OURS] * (len(asked) // 2)
    assert all("products" in request for _, request in asked[1::2])
    assert {(run.program, run.beyond) for run in runs} == {(OURS, 0.5), ("a", 1.5)}  # the median of three is 0.5


def test_a_program_that_fails_is_named_and_the_others_go_on():
    runs, _, failures = measured(OURS, "a", "b", a=9)
    assert failures == {"a": "out of paper"}
    assert {run.program for run in runs} == {OURS, "b"} and {run.prompt for run in runs} == {5, 9}


def test_nothing_is_measured_when_ours_fails():
    runs, _, failures = measured(OURS, "a", **{OURS: 9})
    assert runs == [] and failures == {OURS: "out of paper"}


def test_ratios_are_medians_over_the_pairs_of_a_round_not_ratios_of_medians():
    ours = [run_of(OURS, i, prefill, 1.25) for i, prefill in enumerate((1.0, 2.0, 6.0))]
    theirs = [run_of("a", i, prefill, 2.25) for i, prefill in enumerate((4.0, 2.0, 12.0))]
    us, it = summarize([*ours, *theirs])
    assert (us.ours_prefill, us.ours_decode, us.ours_beyond) == (1, 1, 1)
    assert it.ours_prefill == 2.0  # of 4, 1 and 2; the medians alone would say 4 / 2
    assert it.ours_decode == pytest.approx(1.8) and it.ours_beyond == 0.5
    assert (it.prefill_speed, it.decode_speed, it.beyond) == (2.0, 1 / 2.25, 2.0)


def test_the_table_names_machine_settings_and_every_program():
    rows = summarize([run_of(OURS, 0, 1.0, 0.5), replace(run_of("a", 0, 1.0, 0.5), mlx_peak_bytes=None)])
    text = format_table({"chip": "abacus"}, "some model", SETTINGS, rows, 0.0125)
    for part in (
        "abacus",
        "some model",
        "float32",
        "12.50 ms",
        "prefill tok/s",
        "decode tok/s",
        "max RSS",
        "250.00 ms",
    ):
        assert part in text
    lines = [line.split() for line in text.splitlines()]
    assert [OURS, "8", "8.0", "2.0"] in [line[:4] for line in lines]
    assert ["a", "8", "8.0", "2.0"] in [line[:4] for line in lines]


def test_a_random_geometry_is_measured_and_leaves_only_what_was_asked_for(temporary, tmp_path, capsys):
    plot = ("--plot", str(tmp_path / "speeds.png")) if importlib.util.find_spec("matplotlib") else ()
    main(["--geometry", "tiny", *QUICK, "--json", str(tmp_path / "all.json"), *plot])
    written = json.loads((tmp_path / "all.json").read_text())
    assert set(written) == {"machine", "model", "settings", "failures", "rows", "runs"}
    assert set(written["machine"]) == {"chip", "GPU", "system", "threads", "BLAS", "versions"}
    assert f"mlx {importlib.metadata.version('mlx')}" in written["machine"]["versions"]
    assert written["settings"]["prompt_lengths"] == [5, 9] and written["failures"] == {}
    assert [(row["program"], row["prompt"]) for row in written["rows"]] == [(OURS, 5), (OURS, 9)]
    assert all(row["prefill_speed"] > 0 and row["max_rss_bytes"] > row["mlx_peak_bytes"] > 0 for row in written["rows"])
    assert "geometry tiny" in capsys.readouterr().out
    assert list(temporary.iterdir()) == []
    if plot:
        assert (tmp_path / "speeds.png").read_bytes().startswith(b"\x89PNG")


def test_a_scaling_of_positions_is_named_with_the_model(tmp_path, capsys):
    main(["--model", "nano", "--rope-scaling", "yarn:2", *QUICK, "--json", str(tmp_path / "all.json")])
    name = json.loads((tmp_path / "all.json").read_text())["model"]
    assert name.startswith("nano, --rope-scaling yarn:2") and name in capsys.readouterr().out


def test_a_peer_that_cannot_be_imported_is_named_with_the_reason(temporary, tmp_path, monkeypatch, capsys):
    (tmp_path / "mlx_lm.py").write_text("raise ImportError('mlx_lm was not unpacked')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(SystemExit) as ended:
        main(["--model", "nano", *QUICK, "--compare", "mlx-lm", "--json", str(tmp_path / "all.json")])
    said = "mlx-lm could not run: ImportError: mlx_lm was not unpacked"
    assert said in str(ended.value.code)  # a text as exit code is status 1, and goes to stderr
    assert OURS in capsys.readouterr().out
    assert "ImportError" in json.loads((tmp_path / "all.json").read_text())["failures"]["mlx-lm"]


@pytest.mark.full
@pytest.mark.parametrize(("peer", "module"), [("mlx-lm", "mlx_lm"), ("mlx-vlm", "mlx_vlm"), ("transformers", "torch")])
def test_a_peer_runs_the_same_weights(peer, module, checkpoint_folder):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    failures: dict[str, str] = {}
    with started([peer], checkpoint_folder(), "float32", failures) as workers:
        assert failures == {}
        reply = workers[0].ask(prompt=9, decode=2, step=4)
    assert reply["prefill_s"] > 0 and len(reply["decode_s"]) == 2 and reply["max_rss_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nano", "--geometry", "tiny"], "not allowed with"),
        (["--geometry", "tiny", "--compare", "llama"], "must name some of mlx-lm, mlx-vlm, transformers, got llama"),
        (["--geometry", "tiny", "--prompt-lengths", "0"], "must be at least 1, got 0"),
        ([], "[option_missing]"),
        (["--modle", "nano"], "did you mean --model?"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        main(["--geometry", "tiny", "--plot", str(tmp_path / "speeds.png")])
    assert ended.value.code == 2
    assert "[package_missing]" in capsys.readouterr().err


def test_an_output_into_no_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--geometry", "tiny", "--json", str(tmp_path / "nowhere" / "all.json")])
    assert ended.value.code == 2
    assert "[output_unwritable]" in capsys.readouterr().err


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(tmp_path)])
    assert ended.value.code == 2
    assert "[config_missing]" in capsys.readouterr().err


def test_bars_are_medians_and_lines_reach_from_the_slowest_to_the_fastest_round(tmp_path):
    pytest.importorskip("matplotlib")
    seconds = {OURS: (1.0, 2.0, 4.0), "a": (4.0, 4.0, 8.0)}  # for a prompt of 8 tokens
    runs = [run_of(name, i, took, 0.5) for name, all_took in seconds.items() for i, took in enumerate(all_took)]
    figure = draw(tmp_path / "bars.png", "a model", "a note", runs)
    prefill, decode = figure.axes
    assert "They scatter by up to 150%" in figure.get_supxlabel()
    assert figure.get_suptitle().startswith("Rounds scatter by 150%") and "fast as" not in figure.get_suptitle()
    assert {text.get_text(): text.xy[1] for text in prefill.texts} == {"4.00": 0, "2.00": 0}
    assert [bar.get_height() for bar in prefill.patches] == [4.0, 2.0]
    slow = draw(tmp_path / "bars.png", "a model", "", [run_of(OURS, 0, 1.0, 0.5), run_of("a", 0, 16.0, 0.5)])
    assert [text.xy[1] for text in slow.axes[0].texts] == [0, 0.5]  # above a bar that could not hold it
    spread = prefill.collections[0]
    assert [line[:, 1].tolist() for line in spread.get_segments()] == [[2.0, 8.0]]
    assert [text.get_text() for text in prefill.get_legend().texts] == [OURS, "a"] and decode.get_title(loc="left")


def test_programs_are_compared_by_round_where_rounds_scatter_little():
    def runs(*seconds: float) -> list[Measurement]:
        ours = [run_of(OURS, i, took, 0.5) for i, took in enumerate(seconds)]
        return ours + [run_of("a", i, 4.0, 0.5) for i in range(len(seconds))]

    assert claim("a model", runs(2.0, 2.0)) == f"{OURS} prefills 2.00 and decodes 1.00 times as fast as a"
    assert claim("a model", runs(2.0, 2.1)) == f"{OURS} prefills 1.90 to 2.00 and decodes 1.00 times as fast as a"
    assert claim("a model", runs(2.0, 2.4)) == "Rounds scatter by 18%: measure again on a quiet machine"


def test_one_program_is_told_by_its_own_speeds():
    assert claim("nano", [run_of(OURS, 0, 0.0625, 0.5)]) == "nano: prefill at 128 tokens/s, decoding at 2.00"


REMOVED = ("--dispatches", "--recipe", "--mtp", "--vision", "--image-megapixels", "--clip-frames", "--clip-size")


@pytest.mark.parametrize("option", REMOVED)
def test_a_removed_option_is_answered_with_where_it_went(option, capsys):
    for given in ([option], [option, "8"], ["--geometry", "tiny", f"{option}=8"]):
        with pytest.raises(SystemExit, match="2"):
            main(given)
        said = capsys.readouterr().err
        assert "[option_removed]" in said and option in said
    where = re.findall(r"[a-z_./]+\.py|(?<=-m )[a-z_.]+", command.REMOVED[option])
    assert where and all((ROOT / path).exists() or (ROOT / path.replace(".", "/")).is_dir() for path in where)


def test_removed_options_are_not_in_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--plot" in shown and not [option for option in REMOVED if option in shown]


# --- rounds that scatter ---------------------------------------------------------------------------------------------


def test_a_figure_has_its_range_and_how_far_its_rounds_scatter():
    (row,) = summarize([run_of(OURS, i, prefill, 0.5) for i, prefill in enumerate((1.0, 2.0, 4.0))])
    assert (row.prefill_speed, row.prefill_range, row.prefill_scatter) == (4.0, (2.0, 8.0), 1.5)
    assert (row.decode_speed, row.decode_range, row.decode_scatter) == (2.0, (2.0, 2.0), 0.0)


@pytest.mark.parametrize(("slow", "scatters"), [(1.05, False), (1.5, True)])
def test_the_rounds_that_scatter_most_are_told_from_a_tenth_on(slow, scatters):
    rounds = [*enumerate((1.0, 1.0, slow))]
    runs = [run_of(OURS, i, 1.0, token) for i, token in rounds] + [run_of("a", i, token, 1.0) for i, token in rounds]
    text = format_table({}, "some model", SETTINGS, summarize(runs), 0.1)
    assert ("rounds scatter by" in text) == scatters
    assert not scatters or re.search(r"rounds scatter by 33% \(decode of mlx_qwen35 .*--repeats", text)


@pytest.mark.parametrize("token", [0.25, 0.2])  # as long as its products, and shorter
def test_what_is_not_beyond_the_products_is_not_measurable_and_no_ratio_is_negative(token):
    runs = [run_of(name, i, 1.0, 0.5 if i else token) for name in (OURS, "a") for i in range(3)]
    rows = summarize(runs)
    assert [(row.beyond, row.ours_beyond) for row in rows] == [(None, None)] * 2
    text = format_table({}, "some model", SETTINGS, rows, 0.25)
    assert text.count(NOT_MEASURABLE) == 4 and not re.search(r"(?<![\w~])-\d", text)  # three cells and the reason
    assert NOT_MEASURABLE not in format_table({}, "some model", SETTINGS, summarize([runs[1], runs[4]]), 0.25)


def test_json_on_standard_output_takes_the_place_of_the_table(capsys):
    main(["--geometry", "tiny", *QUICK, "--json"])
    written = json.loads(capsys.readouterr().out)
    assert all(row["decode_range"] == [row["decode_speed"]] * 2 for row in written["rows"])
