"""Gradients of kernels: those by hand equal those that MLX derives, and of the delta rule those of its definition."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.backend import CPU, METAL, assume, backend, differentiable, gradients
from mlx_qwen35.kernels import cpu, elementwise
from mlx_qwen35.kernels.attention import attention
from mlx_qwen35.kernels.causal_conv import causal_conv
from mlx_qwen35.kernels.gated_delta import chunked_rule
from mlx_qwen35.kernels.gated_delta_backward import differentiable_rule
from mlx_qwen35.kernels.quantized_linear import quantized_linear
from mlx_qwen35.quantization import Quantization

GPU = replace(CPU, works_in_pieces=False, tiles_attention=False, unpacks_for_many_rows=False, inverts_by_lapack=False)
Function = Callable[..., object]


def pulled(function: Function, primals: Sequence[np.ndarray], cotangents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The gradients of the primals, of those of the outputs, on the differentiable backend."""

    def listed(*arrays: mx.array) -> list[mx.array]:
        found = function(*arrays)
        return list(found) if isinstance(found, tuple) else [found]

    with gradients():
        _, found = mx.vjp(listed, [mx.array(own) for own in primals], [mx.array(own) for own in cotangents])
    return [np.array(own) for own in found]


def close(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], within: float) -> None:
    """Relative to the largest element of each."""
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).max() <= within * np.abs(b).max()


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


# --- the backend -----------------------------------------------------------------------------------------------------


def test_the_differentiable_backend_is_of_a_block_and_of_a_thread():
    plain = backend()
    with gradients():
        assert backend() == differentiable(plain) and backend().differentiates
        with gradients(False):
            assert backend() is plain
        with ThreadPoolExecutor(1) as other:
            assert other.submit(backend).result() is plain
    assert backend() is plain


def test_it_runs_no_kernels():
    with assume(METAL), gradients():
        assert not backend().fused_kernels and backend().name == "metal"


# --- the gated delta rule --------------------------------------------------------------------------------------------

B, HK, HV, DK, DV = 2, 2, 6, 24, 16


def rule_arrays(T: int, kind: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the rule takes, with a state before, and the gradients of output and state behind."""
    q, k, v, decay, beta, state, d_out, d_state = normal(
        (B, T, HK, DK), (B, T, HK, DK), (B, T, HV, DV), (B, T, HV), (B, T, HV), (B, HV, DV, DK), (B, T, HV, DV),
        (B, HV, DV, DK),
    )  # fmt: skip
    if kind == "repeated keys":
        k = np.repeat(k[:, :1], T, axis=1) + 1e-3 * k
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    decay = -np.abs(decay) * {"strong decay": 40, "repeated keys": 0.001}.get(kind, 0.2)
    beta = np.ones_like(beta) if kind == "repeated keys" else 1 / (1 + np.exp(-beta))
    return [q / DK**0.5, k, v, decay, beta, state], [d_out, d_state]


def defined(given: Sequence[np.ndarray], cotangents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The gradients of the definition, token by token in float64."""
    q, k, v, log_decay, beta, S = (np.float64(x) for x in given)
    d_out, dS = (np.float64(x) for x in cotangents)
    r = HV // HK
    q, k = np.repeat(q, r, axis=2), np.repeat(k, r, axis=2)
    before, states, changes = [], [], []
    for t in range(v.shape[1]):
        before.append(S)
        decayed = np.exp(log_decay[:, t])[..., None, None] * S
        changes.append(beta[:, t, :, None] * (v[:, t] - np.einsum("bhvk,bhk->bhv", decayed, k[:, t])))
        S = decayed + changes[t][..., None] * k[:, t, :, None]
        states.append(S)
    found = [np.zeros_like(x) for x in (q, k, v, log_decay, beta)]
    dq, dk, dv, dg, db = found
    for t in reversed(range(v.shape[1])):
        e = np.exp(log_decay[:, t])[..., None, None]
        dq[:, t] = np.einsum("bhvk,bhv->bhk", states[t], d_out[:, t])
        dS = dS + d_out[:, t][..., None] * q[:, t, :, None]
        dc = np.einsum("bhvk,bhk->bhv", dS, k[:, t])
        db[:, t] = (dc * changes[t]).sum(-1) / beta[:, t]
        dv[:, t] = beta[:, t, :, None] * dc
        dk[:, t] = np.einsum("bhvk,bhv->bhk", dS, changes[t]) - np.einsum("bhvk,bhv->bhk", e * before[t], dv[:, t])
        d_decayed = dS - dv[:, t][..., None] * k[:, t, :, None]
        dg[:, t] = (d_decayed * e * before[t]).sum((-1, -2))
        dS = e * d_decayed
    found[:2] = (x.reshape(B, -1, HK, r, DK).sum(3) for x in (dq, dk))
    return [*found, dS]


@pytest.mark.parametrize("T", [1, 31, 32, 33, 130])
def test_gradients_of_the_rule_are_those_of_its_definition_in_float64(T: int):
    given, cotangents = rule_arrays(T, "")
    expected = defined(given, cotangents)
    close(pulled(differentiable_rule, given, cotangents), expected, 3e-6)
    close(pulled(chunked_rule, given, cotangents), expected, 3e-6)


@pytest.mark.parametrize("kind", ["repeated keys", "strong decay"])
def test_repeated_keys_and_strong_decay_keep_their_digits(kind: str):
    given, cotangents = rule_arrays(70, kind)  # of a decay that forgets all, the gradient is a difference of large sums
    close(pulled(differentiable_rule, given, cotangents), defined(given, cotangents), 1e-4)


def test_segments_follow_each_other():
    given, cotangents = rule_arrays(530, "")  # three
    close(pulled(differentiable_rule, given, cotangents), pulled(chunked_rule, given, cotangents), 2e-6)


def test_a_gpu_inverts_by_doubling_with_the_same_gradients():
    given, cotangents = rule_arrays(70, "")
    with assume(GPU):
        close(pulled(chunked_rule, given, cotangents), defined(given, cotangents), 3e-6)


# --- other functions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exp", "sigmoid", "silu"])
@pytest.mark.parametrize("size", [cpu.MANY - 1, cpu.MANY], ids=["few", "many"])
def test_elementwise_functions_have_the_gradients_of_mlx_functions(name: str, size: int):
    plain = {"exp": mx.exp, "sigmoid": mx.sigmoid, "silu": lambda x: x * mx.sigmoid(x)}[name]
    x, dy = normal((size,), (size,))
    with assume(CPU):
        close(pulled(getattr(elementwise, name), [3 * x], [dy]), pulled(plain, [3 * x], [dy]), 5e-6)


def plain_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool) -> mx.array:
    k, v = (mx.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    T, S = scores.shape[2:]
    mask = mx.triu(mx.full((T, S), -mx.inf), S - T + 1) if causal else mx.zeros((T, S))
    return mx.softmax(scores + mask, axis=-1) @ v


@pytest.mark.parametrize("on", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("T", "S", "causal"), [(140, 140, True), (3, 3, True), (20, 50, True), (20, 33, False)])
def test_gradients_of_attention_are_those_of_its_definition(on, T: int, S: int, causal: bool):
    q, k, v, d = normal((2, 6, T, 32), (2, 2, S, 32), (2, 2, S, 32), (2, 6, T, 32))
    with assume(on):
        ours = pulled(lambda *x: attention(*x, 0.3, causal), [q, k, v], [d])
    close(ours, pulled(lambda *x: plain_attention(*x, 0.3, causal), [q, k, v], [d]), 5e-6)


@pytest.mark.parametrize(
    ("T", "C"), [(40, 24), pytest.param(5, cpu.PIECE // 2, marks=pytest.mark.full)], ids=["at once", "in pieces"]
)
def test_gradients_of_the_causal_convolution(T: int, C: int):
    x, taps, dy = normal((2, T + 3, C), (4, C), (2, T, C))
    conv = mx.array(taps)

    def plain(x: mx.array) -> mx.array:
        total = sum(x[:, tap : tap + T] * conv[tap] for tap in range(4))
        return total * mx.sigmoid(total)

    with assume(CPU):
        close(pulled(lambda x: causal_conv(x, conv), [x], [dy]), pulled(plain, [x], [dy]), 2e-6)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize("rows", [2, 40], ids=["few rows", "many rows"])
def test_gradients_of_a_quantized_product_are_those_of_the_dequantized_matrix(monkeypatch, mode: str, rows: int):
    monkeypatch.setattr(cpu, "UNPACKED", 128 * 64)  # slices of 64 rows
    size = 64 if mode == "affine" else 32
    matrix, x, dy = normal((160, 128), (rows, 128), (rows, 160))
    parts = mx.quantize(mx.array(matrix), group_size=size, bits=4, mode=mode)
    weight, scales, biases = (*parts, None)[:3]
    whole = mx.dequantize(weight, scales, biases, group_size=size, bits=4, mode=mode).astype(mx.float32)
    with assume(CPU):
        ours = pulled(lambda x: quantized_linear(x, weight, scales, biases, Quantization(size, 4, mode)), [x], [dy])
    close(ours, [dy @ np.array(whole)], 2e-6)
