"""What a caller may ask of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from mlx_qwen35.engine.options import GenerationOptions, PromptOptions
from mlx_qwen35.engine.presets import MOST_SEED, Sampling
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.options import Option, check_fields, option, options_of
from mlx_qwen35.values import names, path

OF_ANSWERS: dict[str, Option] = {  # how a model answers; what is not given is the task's, or the published preset's
    **{name: options_of(PromptOptions)[name] for name in ("enable_thinking",)},
    **{name: options_of(GenerationOptions)[name] for name in
       ("preset", "max_tokens", "thinking_budget", "loop_guard", "mtp", "mtp_depth")},
    **{name: own for name, own in options_of(Sampling).items() if not own.python_only},
    **{name: options_of(VisionOptions)[name] for name in ("min_pixels", "max_pixels")},
}  # fmt: skip


@dataclass(frozen=True)
class EvalOptions:
    """What a model is asked, and where the answers go."""

    tasks: Sequence[str] | None = option(
        help="what is asked: kl (how far the model is from --against on a text), nano (the bundled model's own "
        "questions), quick, tasks of lm-eval, mmmu=FOLDER and further sets of image questions, or a task of your own, "
        "FILE.yaml; several with commas", check=partial(names, what="tasks, as kl,nano"), metavar="NAMES",
    )  # fmt: skip
    out: str | None = option(
        help="folder to write: a line for each answer, and summary.json; a run that was ended goes on", check=path,
        metavar="FOLDER",
    )  # fmt: skip
    against: str | None = option(
        help="another model that is asked the same, as the source of a quantized one; it gets no adapter, and keys and "
        "values in the dtype", check=path, metavar="MODEL",
    )  # fmt: skip
    text: str | None = option(
        help="text file that kl is measured on (default: for nano its bundled items)", check=path, metavar="FILE"
    )
    items: int | None = option(
        help="so many questions of each task, evenly spread; of kl windows of 512 tokens (default: all; of kl 8)",
        least=1, metavar="N",
    )  # fmt: skip
    batch_size: int = option(
        8, help="questions at a time, fewer where memory has no room for long answers; it changes no answer "
        "(default: 8)", least=1, most=256, metavar="N",
    )  # fmt: skip
    seed: int = option(
        0, help="each question has a seed of its own, by this one, its task and its key (default: 0)", least=0,
        most=MOST_SEED, metavar="N",
    )  # fmt: skip
    dry_run: bool = option(False, help="print questions, tokens, hours and memory, and read no weights")

    def __post_init__(self) -> None:
        check_fields(self)
