"""Sets of tokens as bits, 32 tokens a word, the lowest bit first; and logits without the tokens outside a set."""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.backend import backend
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.elementwise import compiled

WORD = 32


def words(vocabulary: int) -> int:
    """How many words hold a bit for each token."""
    return -(-vocabulary // WORD)


def only(tokens: Iterable[int], vocabulary: int) -> np.ndarray:
    """(W,) uint32: the set of these tokens."""
    allowed = np.zeros(vocabulary, bool)
    allowed[list(tokens)] = True
    return packed(allowed, vocabulary)


def all_but(tokens: Iterable[int], vocabulary: int) -> np.ndarray:
    """(W,) uint32: the set of all other tokens."""
    allowed = np.ones(vocabulary, bool)
    allowed[list(tokens)] = False
    return packed(allowed, vocabulary)


def packed(mask: Any, vocabulary: int) -> np.ndarray:
    """(W,) uint32 of what a constraint gives as its mask, see `Constraint.mask`."""
    given = np.asarray(mask)
    if given.ndim != 1 or given.dtype not in (np.bool_, np.uint32):
        raise InputError(
            "option_invalid",
            "the mask of constraint must be boolean and of shape (V,), or uint32 with 32 tokens a word; got "
            f"{given.dtype} of shape {given.shape}",
        )
    width = words(vocabulary)
    if given.dtype == np.bool_:
        allowed = np.zeros(width * WORD, bool)
        allowed[: min(len(given), vocabulary)] = given[:vocabulary]
        return np.packbits(allowed, bitorder="little").view(np.uint32)
    bits = np.zeros(width, np.uint32)
    bits[: len(given)] = given[:width]
    if vocabulary % WORD:
        bits[-1] &= np.uint32((1 << vocabulary % WORD) - 1)
    return bits


def holds(bits: np.ndarray, token: int) -> bool:
    """Whether a token is in the set."""
    return bool(bits[token // WORD] >> np.uint32(token % WORD) & np.uint32(1))


def restricted(logits: mx.array, allowed: Sequence[np.ndarray | None]) -> mx.array:
    """Logits (n, V) float32, minus infinity for the tokens that a row's set, (W,) uint32, does not hold; None: all.

    The device is given the bits, 31 KB a row for 248,077 tokens, and spreads them in one launch.
    """
    n, V = logits.shape
    bits = np.full((n, words(V)), 0xFFFFFFFF, np.uint32)
    for row, own in enumerate(allowed):
        if own is not None:
            bits[row] = 0
            bits[row, : len(own)] = own
    if not backend().compiles:
        mask = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, :V]
        return mx.where(mx.array(mask.view(np.bool_)), logits, -mx.inf)
    if V % WORD:
        logits = mx.pad(logits, [(0, 0), (0, -V % WORD)])
    within = spread(logits.reshape(n, -1, WORD), mx.array(bits)[:, :, None], mx.array(_PLACES))
    return within.reshape(n, -1)[:, :V]


_PLACES = np.arange(WORD, dtype=np.uint32)  # of a bit in its word


@compiled
def spread(logits: mx.array, bits: mx.array, places: mx.array) -> mx.array:
    """(n, W, 32) logits, (n, W, 1) words and (32,) places of bits -> logits."""
    return mx.where((bits >> places) & 1, logits, -mx.inf)
