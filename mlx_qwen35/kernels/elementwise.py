"""Elementwise functions, each as it is fastest on the backend."""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels import cpu
from mlx_qwen35.kernels.by_hand import Arrays, by_hand


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a function of elementwise operations: one launch where the backend compiles."""
    one_launch = mx.compile(function)

    @functools.wraps(function)
    def choose(*arrays: mx.array) -> Any:
        return one_launch(*arrays) if backend().compiles else function(*arrays)

    return choose


def exp(x: mx.array) -> mx.array:
    """exp(x) of x's dtype."""
    return _on_cpu(cpu.exp, _exp_gradient, x) if backend().works_in_pieces else mx.exp(x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)) of x's dtype."""
    return _on_cpu(cpu.sigmoid, _sigmoid_gradient, x) if backend().works_in_pieces else mx.sigmoid(x)


def silu(x: mx.array) -> mx.array:
    """x sigmoid(x) of x's dtype."""
    return _on_cpu(cpu.silu, _silu_backward, x) if backend().works_in_pieces else x * mx.sigmoid(x)


def silu_product(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up"""
    if backend().differentiates:
        return by_hand(_silu_product, _silu_product_backward, gate, up)
    return _silu_product(gate, up)


@compiled
def _silu_product(gate: mx.array, up: mx.array) -> mx.array:
    return silu(gate) * up


def _on_cpu(function: Callable[[mx.array], mx.array], backward: Callable[..., Arrays], x: mx.array) -> mx.array:
    """The functions of cpu.py take numbers for bits, of which MLX knows no gradient."""
    return by_hand(function, backward, x) if backend().differentiates else function(x)


def _exp_gradient(primals: Arrays, dy: mx.array, y: mx.array) -> Arrays:
    return [dy * y]


def _sigmoid_gradient(primals: Arrays, dy: mx.array, y: mx.array) -> Arrays:
    return [dy * (y * (1 - y))]


def _silu_backward(primals: Arrays, dy: mx.array, y: mx.array) -> Arrays:
    return [silu_gradient(primals[0], dy)]


def silu_gradient(x: mx.array, dy: mx.array) -> mx.array:
    """The gradient of x, from that of silu(x)."""
    return _by_pieces(_silu_gradient, x, dy)[0]


def _silu_product_backward(primals: Arrays, dy: mx.array, y: mx.array) -> Arrays:
    return _by_pieces(_silu_product_gradient, *primals, dy)


def _by_pieces(function: Callable[..., Arrays], *arrays: mx.array) -> Arrays:
    return cpu.by_pieces(function, *arrays) if backend().works_in_pieces else function(*arrays)


@compiled
def _silu_gradient(x: mx.array, dy: mx.array) -> Arrays:
    s = sigmoid(x)
    return [dy * (s + x * s * (1 - s))]


@compiled
def _silu_product_gradient(gate: mx.array, up: mx.array, dy: mx.array) -> Arrays:
    s = sigmoid(gate)
    y = gate * s
    return [dy * up * (s + y * (1 - s)), dy * y]
