"""--dry-run: what a conversion would write, tensor by tensor, from the headers alone."""

import math
from collections.abc import Sequence

from mlx_qwen35.checkpoint.checkpoint import FP32_ORIGINAL
from mlx_qwen35.checkpoint.names import MTP, TEXT, VISION
from mlx_qwen35.commands.table import align
from mlx_qwen35.convert.plan import Job, Plan
from mlx_qwen35.convert.sensitivity import form

_PARTS = {"text model": (TEXT, "lm_head."), "vision tower": (VISION,), "draft head": (MTP,)}


def describe(plan: Plan) -> str:
    rows = [("tensor", "shape", "source", "stored as", "MB", "bits per weight")]
    for job in plan.jobs:
        shape = " x ".join(map(str, job.source.shape))
        stored = form(job.quantization) if job.quantization else job.dtype
        size = f"{job.nbytes / 1e6:.3f}"
        rows.append((job.outputs[0].name, shape, job.source.dtype, stored, size, f"{_bits([job]):.3f}"))
    return "\n".join([*align(rows), "", *_totals(plan), f"{plan.nbytes / 1e9:.3f} GB in all, nothing was written"])


def _totals(plan: Plan) -> list[str]:
    lines = []
    for part, prefixes in _PARTS.items():
        if jobs := [job for job in plan.jobs if job.source.name.startswith(prefixes)]:
            nbytes = sum(job.nbytes for job in jobs)
            lines.append(f"{part}: {nbytes / 1e9:.3f} GB, {_bits(jobs):.3f} bits per weight")
    return lines


def _bits(jobs: Sequence[Job]) -> float:
    """Stored bits of each weight; an exact copy counts with what it is a copy of."""
    weights = sum(math.prod(job.source.shape) for job in jobs if not job.outputs[0].name.startswith(FP32_ORIGINAL))
    return 8 * sum(job.nbytes for job in jobs) / max(1, weights)
