"""mlx_qwen35.eval: how well a model answers, by one command."""

from mlx_qwen35.evaluate.evaluation import evaluate
from mlx_qwen35.evaluate.task import Asked, Item, Published, Task

__all__ = ["Asked", "Item", "Published", "Task", "evaluate"]
