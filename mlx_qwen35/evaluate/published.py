"""Tasks of lm-eval by the names of the published tables, and the figures that were published of Qwen3.5-4B."""

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.evaluate.task import Published

CARD = "the model card of Qwen3.5-4B (huggingface.co/Qwen/Qwen3.5-4B), self-reported"
PROMPTS = "with thinking; prompts and extraction of answers were not published, and may differ from these"


@dataclass(frozen=True)
class Named:
    """A task of lm-eval under a name of ours.

    task: its name there. folder: among lm-eval's tasks. metric, filter: of the figure that was published.
    """

    task: str
    folder: str
    metric: str
    filter: str
    published: Published | None


NAMED: Mapping[str, Named] = {
    "mmlu_pro": Named(
        "mmlu_pro", "mmlu_pro", "exact_match", "custom-extract", Published(0.791, CARD, f"MMLU-Pro, {PROMPTS}")
    ),
    "gpqa_diamond": Named(
        "gpqa_diamond_cot_zeroshot", "gpqa", "exact_match", "flexible-extract",
        Published(0.762, CARD, f"GPQA Diamond, {PROMPTS}"),
    ),
    "ifeval": Named(
        "ifeval", "ifeval", "prompt_level_strict_acc", "none", Published(0.898, CARD, f"IFEval, {PROMPTS}")
    ),
    "mmmu_val": Named("mmmu_val", "mmmu", "acc", "none", Published(0.776, CARD, f"MMMU, {PROMPTS}")),
}  # fmt: skip


def published_of(figure: Published | None, config: TextConfig) -> Published | None:
    """The figure of a task to show beside a model's score: those of the card beside a model of the 4B's size alone."""
    is_4b = (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (32, 2560, 248320)
    return figure if figure is None or figure.source != CARD or is_4b else None
