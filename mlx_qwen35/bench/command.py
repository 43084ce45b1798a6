"""The command.

mlx_qwen35.bench --model FOLDER_OR_ID | --geometry mid [--compare mlx-lm,mlx-vlm,transformers | --vision | --mtp]
mlx_qwen35.bench --geometry 4b --dispatches [--recipe mixed] [--compare mlx-lm,mlx-vlm] [--mtp]
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from mlx_qwen35.backend import backend
from mlx_qwen35.bench import dispatches, draft_dispatches, mtp, vision
from mlx_qwen35.bench.expected import expectations
from mlx_qwen35.bench.measure import OURS, PEERS, ProgramError, Settings, measure, started, summarize
from mlx_qwen35.bench.report import describe_machine, draw, format_table, write_json
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.names import MTP
from mlx_qwen35.checkpoint.random import GEOMETRIES, geometry, write_random_checkpoint
from mlx_qwen35.commands.common import Parser, add_version, as_command
from mlx_qwen35.commands.progress import Step
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import DTYPES, choose_dtype, has_tower

# The options of each of the modes, and their defaults; None is no default.
_SPEED = {"prompt_lengths": (128, 1024), "decode_tokens": 32, "repeats": 5, "compare": (), "plot": None}
_VISION = {"image_megapixels": (1, 4, 16), "clip_frames": (8, 64, 512), "clip_size": (512, 512)}
_MTP = {"decode_tokens": 512, "repeats": 3, "revision": None, "dtype": None}
_DISPATCHES = {"compare": (), "recipe": "uniform", "mtp": False}
_WITH_WEIGHTS = {"revision": None, "dtype": None, "prefill_step_size": 1024}  # of the first two


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _megapixels(text: str) -> tuple[float, ...]:
    sizes = tuple(float(part) for part in text.split(","))
    if wrong := [size for size in sizes if not 0 < size < math.inf]:
        raise argparse.ArgumentTypeError(f"must be above 0, got {wrong[0]:g}")
    return sizes


def _size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, got {text}")
    return _positive(parts[0]), _positive(parts[1])


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"must name some of {', '.join(PEERS)}, got {', '.join(unknown)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_qwen35.bench",
        description="Measure prefill and decode speed on this machine, beside other programs on the same weights, the "
        "memory that images and clips take, or what drafts of the MTP head gain; or count GPU launches and the bytes "
        "that they move. Each program, and each image or clip, has a process of its own, all in turn. Ends with status "
        "1 if one that was asked for could not run.",
    )
    add_version(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="local folder, Hugging Face id, or nano, which is the default with --mtp")
    source.add_argument("--geometry", choices=GEOMETRIES, help="random weights of this size, removed afterwards")
    parser.add_argument("--revision", help="branch, tag or commit of the Hugging Face id")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: float32 on the CPU, else the checkpoint's")
    parser.add_argument("--prefill-step-size", type=_positive, help="prompt tokens a pass; default 1024")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    speed = parser.add_argument_group("speed, which is measured without --vision")
    speed.add_argument("--prompt-lengths", type=_lengths, help="default 128,1024")
    speed.add_argument("--decode-tokens", type=_positive, help="tokens timed after the first; default 32, --mtp: 512")
    speed.add_argument("--repeats", type=_positive, help="rounds, each program once in each; default 5, --mtp: 3")
    speed.add_argument("--compare", type=_peers, help=f"some of {','.join(PEERS)}")
    speed.add_argument("--plot", type=Path, help="PNG file for the speeds over the prompt lengths; needs matplotlib")
    memory = parser.add_argument_group("memory of images and clips")
    memory.add_argument("--vision", action="store_true", help="measure it, on random pixels; nothing is resized")
    memory.add_argument(
        "--image-megapixels",
        type=_megapixels,
        help="square images of so many times 2^20 pixels; default 1,4,16, and none where only --clip-frames is given",
    )
    memory.add_argument(
        "--clip-frames", type=_lengths, help="default 8,64,512, and none where only --image-megapixels is given"
    )
    memory.add_argument(
        "--clip-size",
        type=_size,
        help="of every clip; default 512x512, of which 8 frames fill a pass over the prompt",
    )
    said = "measure what they gain here, and what is expected of Macs; with --dispatches, count a step with drafts"
    parser.add_argument_group("drafts of the MTP head").add_argument("--mtp", action="store_true", help=said)
    graph = parser.add_argument_group("GPU launches")
    said = "count those of one decoded token, by --geometry, on any machine"
    graph.add_argument("--dispatches", action="store_true", help=said)
    graph.add_argument(
        "--recipe",
        choices=tuple(dispatches.RECIPES),
        help="uniform, the default: every matrix in 4 bits by groups of 64; mixed: attention's o_proj and DeltaNet's "
        "out_proj in 8 bits, DeltaNet's in_proj_a and in_proj_b not packed",
    )
    return parser


def _choose_mode(options: argparse.Namespace) -> None:
    """Refuse the other modes' options, and set the defaults of this one."""
    if options.dispatches:
        _check_dispatches(options)
        mode = _DISPATCHES
    elif options.mtp:
        _check_idle(options, "--mtp", _MTP)
        mode = _MTP
    else:
        if idle := _given(options, ["recipe"]):
            raise InputError(
                "option_no_effect", f"{idle} has no effect without --dispatches. Add that, or leave it out"
            )
        mode, other = (_VISION, _SPEED) if options.vision else (_SPEED, _VISION)
        if idle := _given(options, other):
            raise InputError(
                "option_no_effect",
                f"{idle} is for speed; with --vision it has no effect. Leave one of them out"
                if options.vision
                else f"{idle} has no effect without --vision. Add that, or leave it out",
            )
        mode = mode | _WITH_WEIGHTS
    shown = [name for name in ("image_megapixels", "clip_frames") if getattr(options, name, None) is not None]
    if options.vision and shown == ["image_megapixels"] and options.clip_size:
        raise InputError(
            "option_no_effect", "--clip-size has no effect without clips. Add --clip-frames, or leave it out"
        )
    for name, default in mode.items():
        if getattr(options, name) is None:
            setattr(options, name, () if shown and name in ("image_megapixels", "clip_frames") else default)


def _given(options: argparse.Namespace, names: Iterable[str]) -> str | None:
    """The first of these options that was given, as it is written."""
    given = [name for name in names if getattr(options, name) not in (None, False)]
    return f"--{given[0].replace('_', '-')}" if given else None


def _check_idle(options: argparse.Namespace, mode: str, own: Iterable[str]) -> None:
    every = ("vision", *_SPEED, *_VISION, *_WITH_WEIGHTS, "recipe")
    if idle := _given(options, [name for name in every if name not in own]):
        raise InputError("option_conflict", f"{idle} has no effect with {mode}. Leave one of them out")


def _check_dispatches(options: argparse.Namespace) -> None:
    if options.model:
        raise InputError(
            "option_conflict",
            "--dispatches counts for a geometry, without weights; give --geometry in the place of --model",
        )
    _check_idle(options, "--dispatches", _DISPATCHES)
    if wrong := [name for name in options.compare or () if name not in dispatches.COUNTED]:
        raise InputError(
            "option_invalid", f"--dispatches can compare with {', '.join(dispatches.COUNTED)}, got {', '.join(wrong)}"
        )


@contextmanager
def _checkpoint(options: argparse.Namespace, step: Step) -> Iterator[Path]:
    """The folder to measure: the model's, or a temporary one with random weights."""
    if options.model:
        yield resolve(options.model, options.revision)
        return
    dtype = options.dtype or ("float32" if backend().slow_half else "bfloat16")
    step.say("writing random weights")
    with tempfile.TemporaryDirectory(prefix="mlx_qwen35-bench-") as folder:
        yield write_random_checkpoint(Path(folder), geometry(options.geometry), dtype=DTYPES[dtype], mtp=options.mtp)


def _check_outputs(options: argparse.Namespace) -> None:
    """What would fail after all the measuring, found before it."""
    if options.plot and find_spec("matplotlib") is None:
        raise InputError(
            "package_missing", "--plot needs matplotlib, which is not installed: pip install 'mlx-qwen35[plot]'"
        )
    for path in (options.json, options.plot):
        if path and not path.absolute().parent.is_dir():
            raise InputError("output_unwritable", f"the folder of {path} must exist")
        if path and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise InputError("output_unwritable", f"{path} must be a file that can be written")
    if options.revision and options.geometry:
        raise InputError(
            "option_no_effect",
            "--revision is for a Hugging Face id given with --model; with --geometry it has no effect",
        )


def bench(options: argparse.Namespace) -> dict[str, str]:
    """Measure, print, write, and return what could not run, each with the reason."""
    _choose_mode(options)
    _check_outputs(options)
    with Step("preparing") as step:
        if options.dispatches:
            return _dispatches(options, step)
        with _checkpoint(options, step) as folder:
            model = options.model or f"random weights of geometry {options.geometry}"
            return (_mtp if options.mtp else _vision if options.vision else _speed)(options, folder, model, step)


def _dtype(options: argparse.Namespace, checkpoint: Checkpoint) -> str:
    return str(choose_dtype(checkpoint, options.dtype)).removeprefix("mlx.core.")


def _speed(options: argparse.Namespace, folder: Path, model: str, step: Step) -> dict[str, str]:
    failures: dict[str, str] = {}
    dtype = _dtype(options, open_checkpoint(folder))
    settings = Settings(
        options.prompt_lengths, options.decode_tokens, options.repeats, options.prefill_step_size, dtype
    )
    step.say("loading the programs")
    with started((OURS, *options.compare), folder, dtype, failures) as workers:
        if OURS in failures:
            raise InputError(
                "bench_failed", f"{OURS} could not load {options.model or options.geometry}: {failures[OURS]}"
            )
        runs = measure(workers, settings, failures, step.say)
        environments = {worker.name: worker.environment for worker in workers}
    if OURS in failures:
        raise InputError("bench_failed", f"{OURS} could not run: {failures[OURS]}")
    step.end()
    machine, rows = describe_machine(environments), summarize(runs)
    print(format_table(machine, model, settings, rows, median(run.products for run in runs)))
    if options.json:
        write_json(options.json, machine, model, settings, rows, runs, failures)
    if options.plot:
        draw(options.plot, f"{model}, {dtype}\n{machine['chip']}", rows)
    return failures


def _vision(options: argparse.Namespace, folder: Path, model: str, step: Step) -> dict[str, str]:
    failures: dict[str, str] = {}
    checkpoint = open_checkpoint(folder)
    if not has_tower(checkpoint):
        raise InputError(
            "vision_missing", f"--vision needs a checkpoint with a vision tower; {model} holds text weights only"
        )
    settings = vision.Settings(
        options.image_megapixels, options.clip_frames, options.clip_size, options.prefill_step_size,
        _dtype(options, checkpoint),
    )  # fmt: skip
    cases = settings.cases(checkpoint.config.vision)
    machine, rows = vision.measure_memory(folder, cases, settings, failures, step.say)
    step.end()
    print(vision.format_memory(machine, model, settings, rows))
    if options.json:
        vision.write_memory(options.json, machine, model, settings, rows, failures)
    return failures


def _mtp(options: argparse.Namespace, folder: Path, model: str, step: Step) -> dict[str, str]:
    checkpoint = open_checkpoint(folder)
    if not checkpoint.has(MTP):
        raise InputError(
            "draft_head_missing", f"--mtp needs a checkpoint with a draft head (tensors mtp.*); {model} has none"
        )
    settings = mtp.Settings(options.decode_tokens, options.repeats, _dtype(options, checkpoint))
    found = mtp.measure_mtp(folder, settings, bool(options.model), step.say)
    step.end()
    expected = expectations({f"{model}, measured here": found.acceptance["shares"]}) if options.model else []
    print(mtp.format_mtp(model, checkpoint.config.text, settings, found, expected))
    if options.json:
        mtp.write_mtp(options.json, model, settings, found, expected)
    return {}


def _dispatches(options: argparse.Namespace, step: Step) -> dict[str, str]:
    counts: dict[str, dispatches.Dispatches] = {}
    failures: dict[str, str] = {}
    for program in (OURS, *options.compare):
        step.say(f"counting {program}")
        try:
            counts[program] = dispatches.count_program(program, geometry(options.geometry), options.recipe)
        except ProgramError as error:
            failures[program] = str(error)
    if OURS in failures:
        raise InputError("bench_failed", f"{OURS} could not be counted: {failures[OURS]}")
    drafts = draft_dispatches.count_drafts(geometry(options.geometry), options.recipe) if options.mtp else None
    step.end()
    title = f"dispatches of one decoded token, geometry {options.geometry}, {options.recipe} recipe"
    print(dispatches.format_dispatches(title, counts))
    if drafts:
        print(f"\n{draft_dispatches.format_drafts(drafts)}")
    if options.json:
        dispatches.write_dispatches(options.json, options.recipe, counts, drafts)
    return failures


def main(arguments: Sequence[str] | None = None) -> None:
    with as_command("mlx_qwen35.bench", tuned=False):
        parser = _parser()
        options = parser.parse_args(arguments)
        if not (options.model or options.geometry):
            if options.dispatches or not options.mtp:
                parser.error("one of the arguments --model --geometry is required")
            options.model = "nano"
        failures = bench(options)
        if failures:
            sys.exit("\n".join(f"error: {name} could not run: {reason}" for name, reason in failures.items()))


if __name__ == "__main__":
    main()
