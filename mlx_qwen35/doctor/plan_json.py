"""--plan as JSON. Its keys are stable (docs/memory.md lists them); sizes are in bytes, speeds in tokens a second."""

from typing import Any

from mlx_qwen35.budget.parts import parts
from mlx_qwen35.budget.plan import Machine
from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.doctor.advice import advice
from mlx_qwen35.doctor.plan import AS_IS, Planned, Row, longest_contexts


def as_json(planned: Planned) -> dict[str, Any]:
    return {
        "model": planned.name,
        "context": planned.contexts[0],
        "max_context": planned.checkpoint.config.text.max_position_embeddings,
        "draft_tokens": planned.mtp,
        "adapters": list(planned.adapters),
        "longest_contexts": longest_contexts(planned.checkpoint, planned.row(AS_IS).plan, planned.mtp),
        "speeds": "computed",
        "advice": [{"text": text, "command": command or None} for text, command in advice(planned)],
        "machines": [_machine(machine) for machine in planned.machines],
        "plans": [_plan(row) for row in planned.rows],
    }


def _machine(machine: Machine) -> dict[str, Any]:
    return {
        "name": machine.name, "chip": machine.chip.name if machine.chip else None, "limit": machine.limit,
        "dtype": dtype_name(machine.dtype), "kv_bits": machine.kv.name,
    }  # fmt: skip


def _plan(row: Row) -> dict[str, Any]:
    plan = row.plan
    return {
        "machine": plan.machine.name, "recipe": None if row.stored == AS_IS else row.stored, "context": plan.context,
        "fits": plan.fits, "fits_with_image": plan.image <= plan.machine.limit, "fits_with_kv_bits": row.kv_bits,
        "bytes": plan.text, "bytes_with_image": plan.image,
        "parts": {label.replace(" ", "_"): nbytes for label, nbytes in parts(plan)},
        "decode": row.decode, "prefill": row.prefill, "chunk": plan.chunk,
    }  # fmt: skip
