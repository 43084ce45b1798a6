"""mlx_qwen35.doctor: this machine, what runs on it and how fast, to paste into an issue."""

from mlx_qwen35.doctor.command import main

__all__ = ["main"]
