"""mlx_qwen35.train: LoRA and QLoRA adapters for a model, trained on a folder of rows."""

from mlx_qwen35.train.loop import Line, Training, Watcher
from mlx_qwen35.train.options import TrainOptions
from mlx_qwen35.train.trained import Trained
from mlx_qwen35.train.training import train

__all__ = ["Line", "TrainOptions", "Trained", "Training", "Watcher", "train"]
