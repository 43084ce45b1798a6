"""The causal depthwise convolution of a DeltaNet layer, and silu.

Letters: B batch, T tokens, C channels, K taps.
"""

import functools
import operator
from collections.abc import Callable

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.kernels.by_hand import by_hand
from mlx_qwen35.kernels.cpu import PIECE
from mlx_qwen35.kernels.elementwise import silu, silu_gradient


def causal_conv(tokens: mx.array, conv: mx.array) -> mx.array:
    """(B, K - 1 + T, C) -> silu of the depthwise conv (B, T, C). conv: (K, C), tap K - 1 for the newest token."""
    if tokens.shape[1] == len(conv):
        return silu((tokens * conv).sum(1, keepdims=True))
    if not backend().differentiates:
        return _taps(tokens, conv, silu)
    return by_hand(lambda x: _taps(x, conv, silu), lambda x, dy, _: [_conv_gradient(x[0], dy, conv)], tokens)


def _conv_gradient(tokens: mx.array, dy: mx.array, conv: mx.array) -> mx.array:
    """The same taps, of the gradient before silu, from the last to the first."""
    K = len(conv)
    inner = silu_gradient(_taps(tokens, conv), dy)
    return _taps(mx.pad(inner, [(0, 0), (K - 1, K - 1), (0, 0)]), conv[::-1])


def _taps(tokens: mx.array, conv: mx.array, then: Callable[[mx.array], mx.array] = lambda x: x) -> mx.array:
    """(B, K - 1 + T, C) -> then(depthwise conv) (B, T, C); on the CPU piece by piece, see cpu.py."""
    K, C = conv.shape
    T = tokens.shape[1] - K + 1
    rows = max(1, PIECE // C) if backend().works_in_pieces else T
    parts = []
    for begin in range(0, T, rows):
        end = min(begin + rows, T)
        taps = [tokens[:, begin + tap : end + tap] * conv[tap] for tap in range(K)]
        parts.append(then(functools.reduce(operator.add, taps)))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
