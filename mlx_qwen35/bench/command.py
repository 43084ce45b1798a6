"""mlx_qwen35.bench --model FOLDER_OR_ID | --geometry mid [--compare mlx-lm,mlx-vlm,transformers] [--plot FILE],
mlx_qwen35.bench --model FOLDER_OR_ID --needle LENGTHS and
mlx_qwen35.bench --model FOLDER_OR_ID | --geometry mid --serve [--compare mlx-lm]
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

from mlx_qwen35.backend import backend
from mlx_qwen35.bench import heatmap, needle, plot, serve, serve_model, serve_report, train
from mlx_qwen35.bench.measure import OURS, PEERS, Beside, Settings, measure, started, summarize
from mlx_qwen35.bench.report import as_json, describe_machine, format_table
from mlx_qwen35.bench.worker import blas
from mlx_qwen35.checkpoint.adapter_choice import choose
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.dtypes import DTYPES, dtype_name
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.random import GEOMETRIES, geometry, write_random_checkpoint
from mlx_qwen35.console.interrupt import unwound_when_ended
from mlx_qwen35.console.json_output import add_json, check_json, write_json
from mlx_qwen35.console.options import add_options, check_one_adapter, given_options
from mlx_qwen35.console.parser import Parser
from mlx_qwen35.console.plot import check_plot
from mlx_qwen35.console.progress import Step
from mlx_qwen35.console.run import as_command, load_model
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions, choose_dtype
from mlx_qwen35.machine.chip import tune
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import as_flag, options_of

_COUNT = "launches are counted by python -m tests.dispatches.count, in a clone of the repository"
_IMAGES = "the memory of images and videos is measured by examples/image_memory.py, in a clone of the repository"
REMOVED = {  # option -> where it went
    "--dispatches": _COUNT,
    "--recipe": _COUNT,
    "--mtp": "drafts are measured by examples/drafts.py, in a clone of the repository",
    "--vision": _IMAGES,
    "--image-megapixels": _IMAGES,
    "--clip-frames": _IMAGES,
    "--clip-size": _IMAGES,
}

SPEED: dict[str, Any] = {  # options of the speed alone, with their defaults
    "prompt_lengths": (128, 1024), "decode_tokens": 32, "prefill_step_size": 1024, "compare": (),
}  # fmt: skip
OF_NEEDLES = ("memory_limit", "kv_bits", "kv_rotate")  # options of load that have no effect without --needle
IDLE = {  # what is measured -> options that have no effect on it
    "needle": (*SPEED, "clients"), "serve": (*OF_NEEDLES, "rope_scaling", "prefill_step_size", "plot"),
    "speed": (*OF_NEEDLES, "clients"),
    "train": (*OF_NEEDLES, "rope_scaling", "prefill_step_size", "decode_tokens", "clients", "adapter", "adapter_scale",
              "plot"),
}  # fmt: skip


class _Removed(argparse.Action):
    """Refuses an option of REMOVED, which --help does not show."""

    def __init__(self, option_strings: Sequence[str], dest: str):
        super().__init__(option_strings, dest, nargs="?", help=argparse.SUPPRESS)

    def __call__(self, parser: object, namespace: object, values: object, option: str | None = None) -> NoReturn:
        raise InputError("option_removed", f"{option} was removed: {REMOVED[self.option_strings[0]]}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _lengths(text: str) -> tuple[int, ...]:
    """Counts between commas; k and m are thousands and millions."""
    sizes = {"k": 1000, "m": 1_000_000}
    parts = [(part, sizes.get(part[-1:].lower(), 1)) for part in text.split(",")]
    try:
        return tuple(_positive(part[:-1] if size > 1 else part) * size for part, size in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be counts of tokens as 300,4k, got {text!r}") from None


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"must name some of {', '.join(PEERS)}, got {', '.join(unknown)}")
    return names


def parser() -> Parser:
    parser = Parser(
        prog="mlx_qwen35.bench",
        usage="%(prog)s (--model MODEL | --geometry SIZE) [options]",
        description="Measure prefill and decode speed on this machine, beside other programs on the same weights. Each "
        "program runs in a process of its own, all in turn. Ends with status 1 if one of them could not run.",
        examples=("--model nano", "--model nano --needle 1k,4k", "--geometry mid --compare mlx-lm --json speed.json"),
    )
    loaded = options_of(LoadOptions)
    source = parser.add_mutually_exclusive_group()
    add_options(source, [loaded["model"]])
    source.add_argument("--geometry", choices=GEOMETRIES, help="random weights of this size, removed afterwards")
    add_options(parser, [loaded[name] for name in ("revision", "dtype", "adapter", "adapter_scale", "rope_scaling")])
    add_options(parser.add_argument_group("needles"), [loaded[name] for name in OF_NEEDLES])
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--needle", type=_lengths, metavar="N,N", help="in place of the speed measure how well numbers are found in "
        "texts of so many tokens (4k is 4,000), by their depth",
    )  # fmt: skip
    other.add_argument(
        "--serve", action="store_true", help="in place of the speed measure the server: requests a second, the time to "
        "the first token, and a session that grows, beside mlx-lm's server with --compare mlx-lm",
    )  # fmt: skip
    other.add_argument(
        "--train", action="store_true", help="in place of the speed measure a step of training: tokens a second, and "
        "memory at its highest, beside mlx-lm's trainer with --compare mlx-lm",
    )  # fmt: skip
    parser.add_argument("--clients", type=_lengths, metavar="N,N", help="with --serve: how many ask at once "
                        "(default: 1,2,4,8)")  # fmt: skip
    parser.add_argument(
        "--prompt-lengths", type=_lengths, metavar="N,N", help="tokens of each prompt, of --train of a row "
        "(default: 128,1024; of --train 256,1024; of --serve, which takes one length, 256)",
    )  # fmt: skip
    for option, default, meaning in (
        ("--decode-tokens", "32", "tokens timed after the first; of each answer with --serve"),
        ("--repeats", "5; of needles 1, of others 3", "rounds; each program runs once in each, or all is asked"),
        ("--prefill-step-size", "1024", "prompt tokens of a prefill chunk"),
    ):
        parser.add_argument(option, type=_positive, metavar="N", help=f"{meaning} (default: {default})")
    parser.add_argument("--compare", type=_peers, metavar="NAMES", help=f"some of {','.join(PEERS)}")
    add_json(parser, "every measurement")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the speeds or the needles into this PNG file (needs matplotlib)"
    )
    for option in REMOVED:
        parser.add_argument(option, action=_Removed)
    return parser


@contextmanager
def _checkpoint(options: argparse.Namespace, step: Step) -> Iterator[Path]:
    """The checkpoint's folder: the model's, or a temporary one with random weights."""
    if options.model:
        yield resolve(options.model, options.revision)
        return
    dtype = options.dtype or ("float32" if backend().slow_half else "bfloat16")
    step.say("writing random weights")
    with tempfile.TemporaryDirectory(prefix="mlx_qwen35-bench-") as folder:
        yield write_random_checkpoint(Path(folder), geometry(options.geometry), dtype=DTYPES[dtype], mtp=False)


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse outputs that could not be written, before anything is measured."""
    check_json(options.json)
    if options.plot:
        check_plot(options.plot)


def _check_effects(options: argparse.Namespace) -> None:
    """Refuse options that what is measured has no use for."""
    kind = next((kind for kind in ("needle", "serve", "train") if getattr(options, kind)), "speed")
    if given := [as_flag(name) for name in IDLE[kind] if getattr(options, name) is not None]:
        where = "with --needle, --serve or --train alone" if kind == "speed" else f"without {as_flag(kind)}"
        raise InputError("option_no_effect", f"{given[0]} must be given {where}: it would have no effect")
    check_one_adapter(options)
    LoadOptions(**given_options(options, [LoadOptions]))
    if options.needle and options.geometry:
        raise InputError("option_conflict", "--needle must be given with --model: random weights find nothing")
    if options.compare and options.rope_scaling:
        raise InputError(
            "option_conflict",
            "--rope-scaling must not be given with --compare: the other programs read the folder's scaling. Convert a "
            "folder with it: mlx_qwen35.convert --rope-scaling",
        )
    if options.revision and options.geometry:
        raise InputError(
            "option_no_effect",
            "--revision is for a Hugging Face id given with --model; with --geometry it has no effect",
        )


def bench(options: argparse.Namespace) -> dict[str, str]:
    """Measure, print and write. Return the programs that could not run, each with the reason."""
    if not options.model and not options.geometry:
        raise InputError("option_missing", "--model MODEL or --geometry SIZE must be given: what is measured")
    _check_outputs(options)
    _check_effects(options)
    if options.needle:
        _needles(options)
        return {}
    with Step("preparing") as step, _checkpoint(options, step) as folder:
        name = options.model or f"random weights of geometry {options.geometry}"
        if options.rope_scaling:
            name += f", --rope-scaling {options.rope_scaling}"
        if beside := _beside(options, folder):
            name += f", adapter {beside.described}"
        if options.train:
            return _train(options, folder, name, step)
        return (_serve if options.serve else _speed)(options, folder, name, step, beside)


def _beside(options: argparse.Namespace, folder: Path) -> Beside | None:
    """The adapter, checked before anything is measured. InputError where a program beside ours cannot load it."""
    if not options.adapter:
        return None
    scale = 1.0 if options.adapter_scale is None else options.adapter_scale
    ((name, adapter),) = choose(options.adapter, scale, open_checkpoint(folder)).adapters.items()
    if options.compare and (set(options.compare) != {"mlx-lm"} or adapter.format == "peft" or scale != 1):
        raise InputError(
            "option_conflict",
            "--adapter must be given without --compare, or with --compare mlx-lm alone, an adapter in mlx-lm's format "
            f"and no --adapter-scale: what is compared must be the same; this one is in the format of {adapter.format}",
        )
    return Beside(name, adapter.path, scale)


def _needles(options: argparse.Namespace) -> None:
    tune()
    model, processor = load_model(options)
    answers: list[needle.Answer] = []
    try:
        for found in needle.measure(model, processor, options.needle, options.repeats or 1):
            answers += found
    except KeyboardInterrupt:
        if answers:
            _report_needles(options, model, answers)
        raise
    _report_needles(options, model, answers)


def _report_needles(options: argparse.Namespace, model: Model, answers: Sequence[needle.Answer]) -> None:
    """Print and write what was measured."""
    machine, rows = describe_machine({OURS: {"blas": blas(), "torch_threads": None}}), heatmap.summarize(answers)
    given, adapter = given_options(options, [LoadOptions]), model.adapters.default
    also = [f"{as_flag(name)} {given[name]}" for name in (*OF_NEEDLES, "rope_scaling") if name in given]
    also += [f"adapter {adapter}"] if adapter else []
    name = ", ".join([options.model, dtype_name(model.dtype), *also])
    if not write_json(options.json, heatmap.as_json(machine, name, rows, answers)):
        print(heatmap.format_table(machine, name, rows))
    if options.plot:
        heatmap.draw(options.plot, options.model, f"{name}\n{machine['chip']}", rows)


def _speed(
    options: argparse.Namespace, folder: Path, model: str, step: Step, beside: Beside | None
) -> dict[str, str]:
    failures: dict[str, str] = {}
    dtype = dtype_name(choose_dtype(open_checkpoint(folder, rope_scaling=options.rope_scaling), options.dtype))
    lengths, decode, chunk, peers = (getattr(options, name) or default for name, default in SPEED.items())
    settings = Settings(lengths, decode, options.repeats or 5, chunk, dtype)
    step.say("loading the programs")
    loading: dict[str, dict[str, Any]] = {OURS: {"rope_scaling": options.rope_scaling}}
    if beside:
        loading[OURS] |= {"adapter": {beside.name: str(beside.path)}, "adapter_scale": beside.scale}
        loading["mlx-lm"] = {"adapter": str(beside.path)}
    with started((OURS, *peers), folder, dtype, failures, loading) as workers:
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
    if not write_json(options.json, as_json(machine, model, settings, rows, runs, failures)):
        print(format_table(machine, model, settings, rows, median(run.products for run in runs)))
    if options.plot:
        plot.draw(options.plot, model, f"{model}, {dtype}, {settings.repeats} rounds\n{machine['chip']}", runs)
    return failures


def _serve(
    options: argparse.Namespace, folder: Path, model: str, step: Step, beside: Beside | None
) -> dict[str, str]:
    lengths, peers = options.prompt_lengths or (256,), options.compare or ()
    if len(lengths) > 1 or set(peers) - set(serve.MODULES):
        raise InputError("option_conflict", "--serve takes one of --prompt-lengths, and --compare mlx-lm")
    if absent := [name for name in peers if find_spec(serve.MODULES[name].partition(".")[0]) is None]:
        raise InputError("package_missing", f"{absent[0]} is not installed: pip install 'mlx-qwen35[peers]'")
    if options.geometry:
        serve_model.add_tokenizer(folder)
    dtype, failures = choose_dtype(open_checkpoint(folder), options.dtype), dict[str, str]()
    settings = serve.Settings(
        lengths[0], options.decode_tokens or 32, options.clients or (1, 2, 4, 8), options.repeats or 3,
        dtype_name(dtype),
    )  # fmt: skip
    with serve_model.prepared(folder, dtype) as served:
        step.say("starting the servers")
        with unwound_when_ended(), serve.serving(
            (OURS, *peers), served, settings.dtype, failures, beside
        ) as servers:
            runs = [] if OURS in failures else serve.measure(servers, settings, failures, step.say)
            environment = {"blas": {} if OURS in failures else blas(servers[0].pid), "torch_threads": None}
    if OURS in failures:
        raise InputError("bench_failed", f"{OURS} could not run: {failures[OURS]}")
    step.end()
    machine, rows = describe_machine({OURS: environment}), serve_report.summarize(runs)
    if not write_json(options.json, as_json(machine, model, settings, rows, runs, failures)):
        print(serve_report.format_tables(machine, model, settings, rows))
    return failures


def _train(options: argparse.Namespace, folder: Path, model: str, step: Step) -> dict[str, str]:
    peers, failures = train.peers(options.compare or ()), dict[str, str]()
    dtype = dtype_name(choose_dtype(open_checkpoint(folder), options.dtype))
    settings = train.Settings(options.prompt_lengths or (256, 1024), options.repeats or 3, dtype)
    step.say("loading the programs")
    loading = {name: {"train": True} for name in (OURS, *peers)}
    with started((OURS, *peers), folder, dtype, failures, loading) as workers:
        runs = [] if OURS in failures else train.measure(workers, settings, failures, step.say)
        environments = {worker.name: worker.environment for worker in workers}
    if OURS in failures:
        raise InputError("bench_failed", f"{OURS} could not train {model}: {failures[OURS]}")
    step.end()
    machine, rows = describe_machine(environments), train.summarize(runs)
    if not write_json(options.json, as_json(machine, model, settings, rows, runs, failures)):
        print(train.format_table(machine, model, settings, rows))
    return failures


def main(arguments: Sequence[str] | None = None) -> None:
    with as_command("mlx_qwen35.bench", tuned=False):
        failures = bench(parser().parse(arguments))
        if failures:
            sys.exit("\n".join(f"error: {name} could not run: {reason}" for name, reason in failures.items()))


if __name__ == "__main__":
    main()
