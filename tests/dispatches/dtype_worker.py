"""Graphs of one decoded token of our model, with the dtype of every array: JSON on standard output.

For float16 and bfloat16, packed uniformly and mixed, with the kernels and with the operations that stand in for them,
and with a cast left out here or there. As the counter of launches does it (count/worker.py): the program believes that
it has a GPU, and no matrix is in memory. Started in the root of the repository, as a module.
"""

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from .count import markers, worker

HALVES = {"float16": mx.float16, "bfloat16": mx.bfloat16}
MIXED = {"linear_attn.out_proj": 8, "linear_attn.in_proj_a": None, "linear_attn.in_proj_b": None}


def name_dtypes() -> None:
    """Have MLX tell a recorder the name of each dtype where it asks for its size."""
    export = mx.export_function

    def named(keep: Callable[[dict[str, Any]], None], *function: Any) -> None:
        def rename(event: dict[str, Any]) -> None:
            if event["type"] == "primitive":
                sides = {side: [_named(*a) for a in event[side]] for side in ("inputs", "outputs")}
                event = event | sides
            keep(event)

        export(rename, *function)

    mx.export_function = named


def _named(number: int, shape: Any, dtype: mx.Dtype) -> tuple[int, Any, SimpleNamespace]:
    return number, shape, SimpleNamespace(size=str(dtype).removeprefix("mlx.core."))


def without_a_cast(place: str) -> Callable[[], None]:
    """Leave a cast out of the program, and return what puts it back."""
    from mlx_qwen35.kernels import add_norm
    from mlx_qwen35.kernels.elementwise import compiled
    from mlx_qwen35.model import attention, decoder

    broken = {
        "norm": (add_norm, "rms_norm", lambda x, gamma, eps: mx.fast.rms_norm(x.astype(mx.float32), gamma, eps)),
        "gate": (attention, "_gated", compiled(lambda out, gate: out * mx.sigmoid(gate.astype(mx.float32)))),
        "mlp": (decoder, "silu_product", compiled(lambda gate, up: gate.astype(mx.float32) * up)),
        "": (decoder, "silu_product", decoder.silu_product),
    }
    module, name, function = broken[place]
    right = getattr(module, name)
    setattr(module, name, function)
    return lambda: setattr(module, name, right)


def record(config: dict, dtype: str, recipe: str, path: str, broken: str) -> dict[str, Any]:
    right, real = without_a_cast(broken), mx.bfloat16
    mx.bfloat16 = HALVES[dtype]  # which the worker builds with
    try:
        network = worker.build_mlx_qwen35(config, MIXED if recipe == "mixed" else {})
        from mlx_qwen35.kernels import add_norm, fused, fused_delta, norm_rotary

        for module in (add_norm, fused_delta, norm_rotary):
            module.self_check.cache_clear()
        fused.agrees = lambda name, cases: path == "kernels"
        return worker.one_token(network, 1)
    finally:
        right()
        mx.bfloat16 = real


def main() -> None:
    name_dtypes()
    config = json.load(sys.stdin)
    cases = [(d, r, p, "") for d in HALVES for r in ("uniform", "mixed") for p in ("kernels", "operations")]
    broken = (("operations", "norm"), ("kernels", "gate"), ("kernels", "mlp"))
    cases += [("float16", "uniform", path, place) for path, place in broken]
    with markers.prepared():
        graphs = {" ".join(case).strip(): record(config, *case)["nodes"] for case in cases}
    json.dump(graphs, sys.stdout)


if __name__ == "__main__":
    main()
