"""What the commands share: options of a model and of sampling, errors without a traceback, text as it comes."""

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from mlx_qwen35 import __version__
from mlx_qwen35.checkpoint.hub import CHOICES
from mlx_qwen35.commands.interrupt import INTERRUPTED, interruptible
from mlx_qwen35.commands.progress import Step
from mlx_qwen35.commands.streams import OutputError, give_up_output, standard_streams
from mlx_qwen35.engine.drafts.speculate import MODES, MOST_DEPTH, ON_DEPTH
from mlx_qwen35.engine.generation import Result
from mlx_qwen35.engine.sampling import PRESETS
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import load
from mlx_qwen35.machine.chip import tune
from mlx_qwen35.machine.process import check_folder
from mlx_qwen35.media.fetch import is_remote
from mlx_qwen35.media.preprocess import VISION_OPTIONS, Media
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.stream import Piece


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line as every other error is told: in one line, with a code."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help lists the options [option_invalid]\n")


def add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", help=CHOICES)
    group.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of activations and unpacked weights (default: the checkpoint's on a GPU, but float16 for bfloat16 on M1 "
        "and M2; float32 on a CPU)",
    )
    group.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="memory that the model may take, in GB (10^9 bytes; default: what suits the machine)",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    described = "; ".join(f"{name}: {preset.use}" for name, preset in PRESETS.items())
    group.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=f"published settings, which turn thinking on or off ({described}; default: by mode)",
    )
    group.add_argument("--temp", type=float, help="temperature; 0 is greedy")
    group.add_argument("--top-p", type=float, help="keep the smallest set of tokens with this much probability")
    group.add_argument("--top-k", type=int, help="keep this many tokens; 0 is all")
    group.add_argument("--min-p", type=float, help="drop tokens below this fraction of the best one's probability")
    group.add_argument("--presence-penalty", type=float, help="taken off the logits of tokens generated before")
    group.add_argument("--frequency-penalty", type=float, help="taken off as often as they were")
    group.add_argument("--repetition-penalty", type=float, help="divides the logits of tokens generated before")
    group.add_argument("--seed", type=int, help="the same seed gives the same text (default: a random one)")


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--max-tokens", type=int, help="most tokens to generate, thinking included (default: by preset)")
    group.add_argument("--system-prompt", help="system message put before the conversation")
    group.add_argument(
        "--enable-thinking",
        action=argparse.BooleanOptionalAction,
        help="think first, or answer at once (default: as --preset has it, else the model's chat template)",
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")
    group.add_argument("--prefill-step-size", type=int, help="tokens of the prompt read at a time")
    group.add_argument(
        "--mtp",
        choices=MODES,
        help="draft tokens with the checkpoint's multi-token-prediction head and check several at a time; the text is "
        "the same (default: auto, as long as it is measured to be faster)",
    )
    group.add_argument(
        "--mtp-depth",
        type=int,
        metavar="N",
        help=f"tokens drafted at a time, 1 to {MOST_DEPTH}, with auto at most (default: {ON_DEPTH} with --mtp on, "
        f"{MOST_DEPTH} with auto)",
    )


def add_vision_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images and video")
    group.add_argument("--min-pixels", type=int, help="least height x width of an image; smaller ones are enlarged")
    group.add_argument("--max-pixels", type=int, help="most height x width of an image (default: by this machine)")
    group.add_argument("--fps", type=float, help="frames of a clip to read a second (default 2)")
    group.add_argument("--video-num-frames", type=int, help="frames of a clip to read in all, instead of --fps")
    group.add_argument(
        "--video-total-pixels",
        type=int,
        help="most pixels of all frames of a clip together, frames x height x width (default: by this machine)",
    )
    group.add_argument("--source-fps", type=float, help="frames a second of a clip that is a folder of pictures")
    group.add_argument(
        "--published-limits",
        action="store_true",
        default=None,
        help="limit images and clips as the checkpoint does, not as this machine's memory suggests",
    )
    group.add_argument(
        "--keep-vision", action="store_true", help="hold the vision tower in memory between images, once it is there"
    )
    group.add_argument(
        "--outer-vision-tags",
        action="store_true",
        default=None,
        help="keep the vision tags around a whole clip, as transformers 5.10 and later do",
    )
    group.add_argument(
        "--allow-private-urls",
        action="store_true",
        default=None,
        help="follow URLs that lead to this machine or into its network",
    )


GENERATION_OPTIONS = (
    "preset", "temp", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "max_tokens", "system_prompt", "enable_thinking", "stop", "prefill_step_size", "mtp", "mtp_depth",
    *sorted(VISION_OPTIONS),
)  # fmt: skip


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of generate() that were given on the command line."""
    return {name: getattr(args, name) for name in GENERATION_OPTIONS if getattr(args, name) is not None}


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of add_model_options say to load()."""
    return {"revision": args.revision, "dtype": args.dtype, "memory_limit": args.memory_limit}


def require_model(args: argparse.Namespace) -> str:
    if not args.model:
        raise InputError("option_missing", f"--model must be given: {CHOICES}. To try at once: --model nano")
    return args.model


@contextmanager
def as_command(name: str, tuned: bool = True) -> Iterator[None]:
    """What a command runs in: settings of MLX that suit the machine, if `tuned`, and messages in place of tracebacks.

    What the user can mend is printed in one message, and ends with 2, as does standard output that cannot be written; a
    warning is printed and ends nothing. Ctrl-C and a reader that left end in silence.
    """
    if tuned:
        tune()
    try:
        with interruptible(), standard_streams(), _clean_warnings(name):
            check_folder()
            yield
    except InputError as error:
        print(f"{name}: error: {error} [{error.code}]", file=sys.stderr)
        raise SystemExit(2) from None
    except OutputError as error:
        give_up_output()
        print(f"{name}: error: {error} [output_unwritable]", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        give_up_output()
        raise SystemExit(1) from None


@contextmanager
def _clean_warnings(name: str) -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"{name}: warning: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def check_there(media: Sequence[tuple[str, str]]) -> None:
    """Refuse files that are not there, given as pairs of kind and name, before the model is loaded."""
    for kind, name in media:
        if is_remote(name):
            continue
        try:
            there = bool(name) and Path(name).expanduser().exists()
        except (OSError, RuntimeError) as error:  # too long, in a closed folder, a home that is none
            raise InputError("media_unreadable", f"--{kind} must name a file that can be read: {error}") from error
        if not there:
            raise InputError(
                "media_not_found", f"--{kind} must name a file or an http(s) URL; there is no file {name!r}"
            )


def print_media(media: Sequence[Media], before: Sequence[Media] = ()) -> None:
    """What images and clips became, on stderr, one line each, counted behind those before."""
    counts = Counter(item.kind for item in before)
    for item in media:
        counts[item.kind] += 1
        print(f"{item.kind} {counts[item.kind]}: {item}", file=sys.stderr, flush=True)


def print_pieces(pieces: Iterable[Piece], waiting: Step) -> None:
    """Text as it comes; reasoning between the tags that the model itself uses, of which none is left open.

    waiting: the step that ends with the first piece.
    """
    inside = begun = False
    try:
        for piece in pieces:
            waiting.end()
            begun = True
            if piece.reasoning != inside:
                print("<think>" if piece.reasoning else "</think>\n", flush=True)
                inside = piece.reasoning
            print(piece, end="", flush=True)
    finally:
        if begun:
            print("\n</think>" if inside else "", flush=True)  # before what goes to standard error


def tell_cut(result: Result) -> None:
    """Say on stderr that the end came while the model was thinking, so that there is no answer."""
    if result.in_reasoning and result.finish_reason == "length":
        print(
            f"the answer was cut after {result.generation_tokens} tokens, while the model was thinking: allow more "
            "with --max-tokens, or let it answer at once with --no-enable-thinking",
            file=sys.stderr,
            flush=True,
        )


def load_model(args: argparse.Namespace) -> tuple[Model, Processor]:
    """The model that the options name, with progress on stderr."""
    name = require_model(args)
    with Step(f"loading {name}", "B") as progress:
        return load(name, **load_options(args), keep_vision=getattr(args, "keep_vision", False), progress=progress)
