"""Cases of attention over quantized keys and values: one call of the kernels, the answer, and how far is wrong."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_qwen35.kernels.packed_attention import BLOCK, Geometry, Packed, fused_attention, pack, unpack

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
HALF_STEP = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}  # what the one rounding costs
ODD = Geometry(rows=3, D=64, key_bits=8, value_bits=4)
WHOLE = Geometry(rows=4, D=256, key_bits=8, value_bits=8)  # 4B


@dataclass(frozen=True)
class Case:
    """T queries of the last of S positions; the columns behind S are NaN."""

    q: mx.array
    keys: Packed
    values: Packed
    S: int

    @property
    def scale(self) -> float:
        return float(self.q.shape[3] ** -0.5)

    def launch(self) -> mx.array:
        return fused_attention(self.q, self.keys, self.values, self.scale, self.S)

    def first(self, T: int) -> "Case":
        """The first T queries, with the keys that they see."""
        return replace(self, q=self.q[:, :, :T], S=self.S - self.q.shape[2] + T)

    def alone(self, t: int) -> "Case":
        """One query, with the keys that it sees."""
        return replace(self, q=self.q[:, :, t : t + 1], S=self.S - self.q.shape[2] + t + 1)

    def plain(self) -> np.ndarray:
        """By float64 sums, of the numbers that the words stand for."""
        T, q = self.q.shape[2], _numbers(self.q)
        k, v = (np.repeat(_whole(part.first(self.S)), q.shape[1] // part.words.shape[1], axis=1)
                for part in (self.keys, self.values))  # fmt: skip
        scores = q @ k.swapaxes(2, 3) * self.scale + np.triu(np.full((T, self.S), -np.inf), self.S - T + 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights @ v / weights.sum(-1, keepdims=True)


def case(
    sizes: Geometry, T: int, S: int, dtype: mx.Dtype, B: int = 1, Hk: int = 5, sharp: float = 3.0, spare: int = 5
) -> Case:
    """sharp: size of the queries; the larger, the fewer keys count. spare: columns behind S."""
    rng = np.random.default_rng(1000 * S + T)

    def draw(*shape: int, times: float = 1.0) -> mx.array:
        return mx.array((times * rng.normal(size=shape)).astype(np.float32)).astype(dtype)

    keys, values = (
        _spoiled(pack(draw(B, Hk, S + spare, sizes.D), bits), S) for bits in (sizes.key_bits, sizes.value_bits)
    )
    return Case(draw(B, Hk * sizes.rows, T, sizes.D, times=sharp), keys, values, S)


def two_blocks(dtype: mx.Dtype) -> Case:
    """Four queries, of which the last alone sees a second block of keys."""
    return case(ODD, 4, BLOCK + 1, dtype)


def differences(ours: mx.array, want: np.ndarray, scores: float = 1.0) -> list[str]:
    """Numbers further off than float32 sums and one rounding may be. scores: how much larger than usual they are."""
    assert ours.shape == want.shape
    error, size = np.abs(_numbers(ours) - want), np.abs(want)
    if not (error <= 1.01 * HALF_STEP[ours.dtype] * size + 4e-6 * scores * max(1.0, size.max())).all():  # NaN too
        return [f"differs by {error.max():.1e}"]
    return []


def _spoiled(packed: Packed, S: int) -> Packed:
    """With NaN behind the first S columns."""
    used = (mx.arange(packed.scales.shape[2]) < S)[:, None]
    scales, biases = (mx.where(used, part, mx.nan).astype(part.dtype) for part in packed[1:3])
    return Packed(packed.words, scales, biases, packed.bits)


def _whole(packed: Packed) -> np.ndarray:
    words, scales, biases, bits = packed
    return _numbers(unpack(Packed(words, scales.astype(mx.float32), biases.astype(mx.float32), bits)))


def _numbers(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)
