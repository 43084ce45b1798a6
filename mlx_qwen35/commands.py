"""What the commands share: options of a model and of sampling, errors without a traceback, a bar for long prompts."""

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.fetch import is_remote
from mlx_qwen35.generate.speculate import MODES, MOST_DEPTH, ON_DEPTH
from mlx_qwen35.hub import CHOICES
from mlx_qwen35.machine import tune
from mlx_qwen35.preprocess import VISION_OPTIONS, Media
from mlx_qwen35.processor import Piece
from mlx_qwen35.sampling import PRESETS

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


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
    group.add_argument("--preset", choices=tuple(PRESETS), help=f"published settings ({described}; default: by mode)")
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
        help="think first, or answer at once (default: as the model's chat template has it)",
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

    What the user can mend is printed in one message, and ends with 2; a warning is printed and ends nothing. Ctrl-C and
    a reader that left end in silence.
    """
    if tuned:
        tune()
    try:
        with _clean_warnings(name):
            yield
    except InputError as error:
        print(f"{name}: error: {error} [{error.code}]", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
        if not is_remote(name) and (not name or not Path(name).expanduser().exists()):
            raise InputError(
                "media_not_found", f"--{kind} must name a file or an http(s) URL; there is no file {name!r}"
            )


def print_media(media: Sequence[Media], before: Sequence[Media] = ()) -> None:
    """What images and clips became, on stderr, one line each, counted behind those before."""
    counts = Counter(item.kind for item in before)
    for item in media:
        counts[item.kind] += 1
        print(f"{item.kind} {counts[item.kind]}: {item}", file=sys.stderr, flush=True)


def print_pieces(pieces: Iterable[Piece]) -> None:
    """Text as it comes; reasoning between the tags that the model itself uses."""
    inside = False
    for piece in pieces:
        if piece.reasoning != inside:
            print("<think>" if piece.reasoning else "</think>\n", flush=True)
            inside = piece.reasoning
        print(piece, end="", flush=True)
    print(flush=True)  # before what goes to standard error


@contextmanager
def prompt_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr for prompts longer than one chunk."""
    from tqdm import tqdm

    bars: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if done < total and not bars:
            bars.append(tqdm(total=total, desc="reading", unit=" tokens", leave=False))
        if bars:
            bars[0].update(done - bars[0].n)
            if done == total:
                bars[0].close()

    try:
        yield progress
    finally:
        if bars:
            bars[0].close()
