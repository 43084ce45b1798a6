"""Cases of the norm and rotary embedding of queries and keys: one call of either path, and how far is wrong."""

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint.config import RopeConfig
from mlx_qwen35.kernels.norm_rotary import Geometry, norm_rotary, plain_norm_rotary
from mlx_qwen35.model.rotary import Rotary

EPS = 1e-6
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
STEP = {mx.float32: 1e-6, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}  # of 16 bits, from 1 to the next number
ODD = Geometry(H=5, Hk=2, D=96, dims=70)  # 7 heads: the last threadgroup of a token is not full
WHOLE = Geometry(H=16, Hk=4, D=256, dims=64)  # 4B


@dataclass(frozen=True)
class Case:
    """One call: projections (B, T, [q gate] x H, k, v), cos and sin, gammas."""

    sizes: Geometry
    projected: mx.array
    rotary: tuple[mx.array, mx.array]
    q_norm: mx.array
    k_norm: mx.array

    def call(self) -> tuple:
        return (self.projected, self.rotary, self.q_norm, self.k_norm, EPS, self.sizes.H, self.sizes.Hk)

    def launch(self) -> tuple[mx.array, mx.array]:
        """q and k of the kernel."""
        return norm_rotary(*self.call())

    def plain(self) -> tuple[mx.array, mx.array]:
        """q and k by operations."""
        return plain_norm_rotary(*self.call())

    def part(self, b: slice, t: slice) -> "Case":
        """Some batch rows and tokens."""
        cos, sin = (table[b, :, t] for table in self.rotary)
        return replace(self, projected=self.projected[b, t], rotary=(cos, sin))

    def longer(self) -> "Case":
        """Cosines and sines as long as YaRN's of factor 4."""
        cos, sin = (1.1386294 * table for table in self.rotary)
        return replace(self, rotary=(cos, sin))

    def first_table(self) -> "Case":
        """The positions of the first batch row for all."""
        cos, sin = (table[:1] for table in self.rotary)
        return replace(self, rotary=(cos, sin))


def case(sizes: Geometry, T: int, dtype: mx.Dtype, B: int = 1, scale: float = 1.0) -> Case:
    """Every batch row at positions of its own, the three axes apart."""
    D, dims = sizes.D, sizes.dims
    rng = np.random.default_rng(T + B + D + dims)
    projected = mx.array((scale * rng.normal(size=(B, T, sizes.width))).astype(np.float32)).astype(dtype)
    norms = [mx.array((1 + 0.3 * rng.normal(size=D)).astype(np.float32)) for _ in range(2)]
    sections = (dims // 2 - 4, 2, 2)
    table = Rotary(RopeConfig(theta=1e4, dims=dims, sections=sections)).table(mx.array(rng.integers(0, 999, (3, B, T))))
    return Case(sizes, projected, table, *norms)


def differences(ours: Any, want: Any, dims: int) -> list[str]:
    """Numbers further off than a step; where turned, a step of the larger of the pair."""
    found = []
    for name, a, b in zip("qk", ours, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        most, (a, b) = STEP[a.dtype], (np.array(x.astype(mx.float32)) for x in (a, b))
        size, half = np.abs(b), dims // 2
        size[..., :half] = size[..., half:dims] = np.hypot(b[..., :half], b[..., half:dims])
        error = np.abs(a - b)
        if not (error <= most * size).all():  # NaN too
            found.append(f"{name} differs by {error.max():.1e}")
    return found


def unequal(ours: Any, want: Any) -> float:
    """The larger share of the numbers of q, k that are not equal."""
    return max((a != b).astype(mx.float32).mean().item() for a, b in zip(ours, want, strict=True))
