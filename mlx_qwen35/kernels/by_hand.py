"""Functions whose gradient is written by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_qwen35.backend import gradients

Arrays = Sequence[mx.array]


def by_hand(forward: Callable[..., Any], backward: Callable[[Arrays, Any, Any], Arrays], *primals: mx.array) -> Any:
    """forward(*primals), an array or a tuple of arrays, whose gradient is `backward`.

    backward: (primals, cotangents of the outputs, outputs) -> the cotangent of each primal. Neither function is traced,
    so both may use whatever the plain backend has: kernels, and bits of numbers.
    """

    @mx.custom_function
    def function(*given: mx.array) -> Any:
        with gradients(False):
            return forward(*given)

    @function.vjp
    def vjp(given: Any, cotangents: Any, outputs: Any) -> Any:
        with gradients(False):
            found = backward(given if isinstance(given, tuple) else (given,), cotangents, outputs)
        return tuple(found) if isinstance(given, tuple) else found[0]

    return function(*primals)
