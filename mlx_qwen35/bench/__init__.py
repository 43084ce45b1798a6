"""mlx_qwen35.bench: prefill and decode speed on this machine, beside other programs on the same weights."""

from mlx_qwen35.bench.command import main

__all__ = ["main"]
