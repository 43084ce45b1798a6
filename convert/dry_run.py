"""--dry-run: the tensors that a conversion would write, from the headers alone."""

import math
from collections.abc import Sequence
from typing import Any

from mlx_qwen35.checkpoint.names import MTP, TEXT, VISION
from mlx_qwen35.console.table import align
from mlx_qwen35.convert.fusion import described
from mlx_qwen35.convert.plan import ConversionPlan, Job

_PARTS = {"text model": (TEXT, "lm_head."), "vision encoder": (VISION,), "draft head": (MTP,)}


def describe(plan: ConversionPlan) -> str:
    """A line for each tensor, then the size of each part and of the folder."""
    rows = [("tensor", "shape", "source", "stored as", "MB", "bits per weight")]
    for job in plan.jobs:
        shape, stored = " x ".join(map(str, job.source.shape)), str(job.quantization or job.dtype)
        size = f"{job.nbytes / 1e6:.3f}"
        rows.append((job.outputs[0].name, shape, _source(job), stored, size, f"{_bits([job]):.3f}"))
    lines = [*align(rows), ""]
    if plan.adapter:
        lines.append(f"adapter {described(plan.adapter)}")
    for part, prefixes in _PARTS.items():
        if jobs := [job for job in plan.jobs if job.source.name.startswith(prefixes)]:
            nbytes = sum(job.nbytes for job in jobs)
            lines.append(f"{part}: {nbytes / 1e9:.3f} GB, {_bits(jobs):.3f} bits per weight")
    return "\n".join([*lines, f"{plan.nbytes / 1e9:.3f} GB in all, nothing was written"])


def _source(job: Job) -> str:
    """What is read: the dtype, and what an adapter adds or puts in its place."""
    name, adapter = job.source.name, job.source.adapter
    if adapter is None:
        return job.source.dtype
    stored = f"{job.source.stored.dtype} of the adapter" if name in adapter.stored else job.source.stored.dtype
    return f"{stored} + rank {len(adapter.pairs[name].a)}" if name in adapter.pairs else stored


def planned_tensors(plan: ConversionPlan) -> dict[str, Any]:
    """The same for --json."""
    tensors = [
        {
            "name": job.outputs[0].name, "shape": job.source.shape, "source": _source(job),
            "stored_as": str(job.quantization or job.dtype), "bytes": job.nbytes,
        }
        for job in plan.jobs
    ]  # fmt: skip
    return {"bytes": plan.nbytes, "tensors": tensors} | ({"adapter": plan.adapter} if plan.adapter else {})


def _bits(jobs: Sequence[Job]) -> float:
    """Stored bits of each weight; float32 originals count with the weights that they repeat."""
    weights = sum(math.prod(job.source.shape) for job in jobs if not job.is_original)
    return 8 * sum(job.nbytes for job in jobs) / max(1, weights)
