"""Elementwise functions, each as it is fastest on the backend."""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import cpu


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a function of elementwise operations: one launch where the backend compiles."""
    one_launch = mx.compile(function)

    @functools.wraps(function)
    def choose(*arrays: mx.array) -> Any:
        return one_launch(*arrays) if backend().compiles else function(*arrays)

    return choose


def exp(x: mx.array) -> mx.array:
    """exp(x) of x's dtype."""
    return cpu.exp(x) if backend().works_in_pieces else mx.exp(x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)) of x's dtype."""
    return cpu.sigmoid(x) if backend().works_in_pieces else mx.sigmoid(x)


def silu(x: mx.array) -> mx.array:
    """x sigmoid(x) of x's dtype."""
    return cpu.silu(x) if backend().works_in_pieces else x * mx.sigmoid(x)
