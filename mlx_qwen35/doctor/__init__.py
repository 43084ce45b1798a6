"""mlx_qwen35.doctor: what this machine is, what runs on it and how fast, in a form to paste into an issue."""

from mlx_qwen35.doctor.command import main

__all__ = ["main"]
