"""mlx_qwen35.bench: what it runs in which order and what it says of it. No timing is asserted."""

import importlib.metadata
import importlib.util
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import refusing
from mlx.utils import tree_flatten

from mlx_qwen35 import vision as tower
from mlx_qwen35.bench import command, main, vision
from mlx_qwen35.bench.measure import OURS, ProgramError, Run, Settings, in_turn, measure, started, summarize
from mlx_qwen35.bench.report import draw, format_table
from mlx_qwen35.bench.vision import Case, Memory, format_memory, measure_memory, spread
from mlx_qwen35.bench.vision_program import VisionProgram, noise, prompt
from mlx_qwen35.kernels import cpu, elementwise
from mlx_qwen35.kernels.attention import attention

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


def measured(*names: str, **fails_at: int) -> tuple[list[Run], list[tuple[str, dict]], dict[str, str]]:
    asked: list[tuple[str, dict]] = []
    failures: dict[str, str] = {}
    workers = [FakeWorker(name, asked, fails_at.get(name)) for name in names]
    return measure(workers, SETTINGS, failures, lambda line: None), asked, failures


def run_of(program: str, round: int, prefill: float, token: float) -> Run:
    return Run(program, 8, round, prefill, token, 0.25, 10, 20)


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
        ([], "one of the arguments --model --geometry is required"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
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


def test_one_length_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw(tmp_path / "one.png", "one length", summarize([run_of(OURS, 0, 1.0, 0.5)]))
    assert (tmp_path / "one.png").stat().st_size > 1000


# --- memory of images and clips ------------------------------------------------------------------------------------

VISION = vision.Settings((0.01,), (4, 8), (64, 32), 16, "float32")
SHOWN = {
    "tokens": 1, "text_bytes": 100, "tower_bytes": 10, "embeddings_bytes": 5, "cache_bytes": 7, "budget_bytes": 50,
    "encode_peak_bytes": 155, "read_peak_bytes": 132, "released_bytes": 105, "left_bytes": 100,
    "max_rss_bytes": 900, "encode_s": 1.0, "read_s": 2.0,
}  # fmt: skip


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of arguments that it refuses."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_memory_of_images_and_clips_is_measured_on_random_weights(temporary, tmp_path, capsys):
    cases = ("--image-megapixels", "0.01,0.04", "--clip-frames", "4,8", "--clip-size", "64x32")
    main(["--geometry", "tiny", "--vision", *cases, "--json", str(tmp_path / "all.json")])
    written, printed = json.loads((tmp_path / "all.json").read_text()), capsys.readouterr().out
    assert set(written) == {"machine", "model", "settings", "failures", "rows", "spread"}
    shown = [(row["case"]["frames"], row["case"]["width"], row["case"]["height"]) for row in written["rows"]]
    assert shown == [(1, 96, 96), (1, 192, 192), (4, 64, 32), (8, 64, 32)]
    assert [row["tokens"] for row in written["rows"]] == [9 + 16, 36 + 16, 2 * (2 + 8) + 8, 4 * (2 + 8) + 8]
    assert "image 96x96" in printed and "clip 64x32, 8 frames" in printed and "geometry tiny" in printed
    assert f"mlx {importlib.metadata.version('mlx')}" in printed
    assert list(temporary.iterdir()) == []


def test_a_prompt_with_a_clip_leaves_only_the_text_weights_in_memory(checkpoint_folder):
    program = VisionProgram(checkpoint_folder(), "float32")
    held = sum(array.nbytes for _, array in tree_flatten(program.model.parameters()))
    shown = program.show(frames=4, height=32, width=64, step=16)
    assert shown["embeddings_bytes"] == 4 * 4 * program.model.config.hidden_size
    kept = shown["released_bytes"] - shown["text_bytes"]
    assert shown["embeddings_bytes"] <= kept < 2 * shown["embeddings_bytes"]  # in a buffer that was at hand
    assert shown["left_bytes"] == shown["text_bytes"] >= held
    assert shown["tower_bytes"] > 0 and not program.model.vision.loaded


def test_working_memory_does_not_grow_with_the_clip(checkpoint_folder, monkeypatch):
    """MLX frees while it computes, so that a peak varies by some percent; held whole, the long clip would take 16
    times as much."""
    monkeypatch.setattr(tower, "SLICE", 48)  # patches, two pairs of these frames
    monkeypatch.setattr("mlx_qwen35.kernels.cpu.SCORE_BYTES", 1 << 16)
    program = VisionProgram(checkpoint_folder(), "float32")

    def working(frames: int) -> Memory:
        return Memory(Case(frames, 64, 96), max_rss_bytes=0, **program.show(frames, height=64, width=96, step=56))

    short, long = working(8), working(128)
    assert long.encode_working_bytes < 1.3 * short.encode_working_bytes
    assert long.read_working_bytes < 1.5 * short.read_working_bytes
    assert long.encode_working_bytes < long.budget_bytes


def test_working_memory_is_the_peak_less_what_its_phase_keeps():
    row = Memory(Case(4, 32, 64), **SHOWN)
    assert (row.encode_working_bytes, row.read_working_bytes) == (155 - 100 - 10 - 5, 132 - 100 - 5 - 7)


def test_the_spread_is_of_the_clips_alone():
    rows = [Memory(Case(frames, 32, 64), **SHOWN) for frames in (1, 4, 8)]
    assert spread(rows) == {"encoding": 0, "reading": 0}
    rows[0] = replace(rows[0], encode_peak_bytes=1000)
    rows[2] = replace(rows[2], encode_peak_bytes=159, read_peak_bytes=142)
    assert spread(rows) == pytest.approx({"encoding": 0.1, "reading": 0.5})
    assert "exceeds the smallest by 10.0% in encoding, 50.0% in reading" in format_memory({}, "some", VISION, rows)
    assert spread(rows[:2]) == {}


def test_a_clip_that_cannot_be_measured_is_named_and_the_others_go_on(monkeypatch):
    class Fake:
        def __init__(self, *arguments):
            self.environment = {"blas": {"loaded": [], "preloaded": [], "not_found": []}, "torch_threads": None}

        def ask(self, frames: int, **request: int) -> dict:
            if frames == 4:
                raise ProgramError("vision", "out of paper")
            return SHOWN

        def close(self) -> None:
            pass

    monkeypatch.setattr(vision, "Worker", Fake)
    cases, failures = [Case(4, 32, 64), Case(8, 32, 64)], {}
    _, rows = measure_memory(Path(), cases, VISION, failures, lambda line: None)
    assert [row.case.frames for row in rows] == [8] and failures == {"clip 64x32, 4 frames": "out of paper"}
    with refusing.refused("bench_failed", "64x32", "4"):
        measure_memory(Path(), cases[:1], VISION, {}, lambda line: None)


def test_a_prompt_has_text_around_the_placeholders_of_every_pair(checkpoint_folder):
    program = VisionProgram(checkpoint_folder(), "float32")
    media = noise(program.config, 4, 32, 64)
    tokens, runs = prompt(media.grid, 2)
    assert sum(run.stop - run.start for run in runs) == media.tokens == 4
    assert [run.start for run in runs] == [8, 18] and len(tokens) == 28


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--compare", "mlx-lm"], "option_no_effect"),
        (["--prompt-lengths", "5"], "option_no_effect"),
        (["--decode-tokens", "32"], "option_no_effect"),  # the default value, yet given
        (["--repeats", "5"], "option_no_effect"),
        (["--plot", "speeds.png"], "option_no_effect"),
        (["--image-megapixels", "1", "--clip-size", "64x64"], "option_no_effect"),
        (["--image-megapixels", "0"], "must be above 0, got 0"),
        (["--clip-frames", "3"], "option_invalid"),
        (["--clip-size", "64x50"], "option_invalid"),
        (["--clip-size", "64"], "must be WIDTHxHEIGHT, got 64"),
    ],
)
def test_wrong_arguments_with_vision_are_refused(given, message, capsys):
    assert message in refused(["--geometry", "tiny", "--vision", *given], capsys)


@pytest.mark.parametrize(
    "given", [["--image-megapixels", "1"], ["--clip-frames", "8"], ["--clip-size", "512x512"]], ids=" ".join
)
def test_options_of_vision_alone_are_refused(given, capsys):
    assert "[option_no_effect]" in (said := refused(["--geometry", "tiny", *given], capsys)) and given[0] in said


def test_only_the_images_or_only_the_clips_can_be_measured():
    def cases(*given: str) -> tuple:
        options = command._parser().parse_args(["--geometry", "tiny", "--vision", *given])
        command._choose_mode(options)
        return options.image_megapixels, options.clip_frames

    assert cases() == ((1, 4, 16), (8, 64, 512))
    assert cases("--image-megapixels", "2") == ((2,), ())
    assert cases("--clip-frames", "6") == ((), (6,))


def test_a_checkpoint_without_a_tower_is_refused(checkpoint_folder, capsys):
    folder = checkpoint_folder(vision=False)
    said = refused(["--model", str(folder), "--vision"], capsys)
    assert "[vision_missing]" in said and str(folder) in said


# --- what the CPU does faster by other means -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, cpu.MANY - 1, cpu.MANY, cpu.PIECE + 3])
def test_exp_sigmoid_and_silu_of_any_number_of_elements(size, capsys):
    x = np.linspace(-30, 30, size, dtype=np.float32)
    true = x.astype(np.float64)
    exact = {"exp": np.exp(true), "sigmoid": 1 / (1 + np.exp(-true)), "silu": true / (1 + np.exp(-true))}
    for name, values in exact.items():
        error = np.abs(np.array(getattr(elementwise, name)(mx.array(x))) - values) / np.maximum(1, np.abs(values))
        assert error.max() < 3e-6, name


def test_exp_and_sigmoid_at_the_ends(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "MANY", 1)
    ends = mx.array([-np.inf, -200.0, 0.0, 200.0, np.inf, np.nan])
    np.testing.assert_allclose(np.array(elementwise.sigmoid(ends)), [0, 0, 0.5, 1, 1, np.nan], atol=1e-37)
    np.testing.assert_allclose(np.array(elementwise.exp(ends))[[0, 1, 2, 5]], [0, 0, 1, np.nan], atol=1e-37)
    assert elementwise.exp(ends)[4].item() > 1e37


@pytest.mark.parametrize(("T", "S"), [(16, 16), (130, 130), (129, 300), (257, 258)])
def test_causal_attention_by_blocks_is_attention(T, S, capsys):
    shapes = ((2, 6, T, 24), (2, 3, S, 24), (2, 3, S, 24))
    q, keys, values = (mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes))
    blocks = attention(q, keys, values, 0.2, "causal")
    whole = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.2, mask="causal")
    assert mx.abs(blocks - whole).max().item() < 2e-6
