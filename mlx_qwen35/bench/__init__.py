"""Prefill and decode speed on this machine, beside other programs on the same weights. The command is in command.py."""

from mlx_qwen35.bench.command import main

__all__ = ["main"]
