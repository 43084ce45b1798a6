"""Adapters on disk: PEFT's, mlx-lm's and mlx-vlm's folders, read into one form; PEFT's and mlx-lm's written."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.checkpoint.checkpoint import Checkpoint


class Pair(NamedTuple):
    """The low-rank part of one map: W x + scale B (A x)."""

    a: mx.array  # (r, in)
    b: mx.array  # (out, r)
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter, in the names and shapes of the checkpoint that it was checked against.

    format: "peft", "mlx-lm" or "mlx-vlm".
    pairs: Hugging Face name of a weight, as model.language_model.layers.0.mlp.up_proj.weight -> its low-rank part. The
        table of tokens has A (r, D) and B (V, r). The draft head's names begin with mtp.
    replaced: Hugging Face name -> a whole tensor, as the checkpoint stores it, in the place of the checkpoint's.
    magnitudes: of DoRA, name of a weight -> (out,) lengths of its rows.
    fingerprint: SHA-256 of all of it, in hexadecimal.
    """

    path: Path
    format: str
    pairs: Mapping[str, Pair]
    replaced: Mapping[str, mx.array] = field(default_factory=dict)
    magnitudes: Mapping[str, mx.array] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, as they are read."""
        arrays = [array for pair in self.pairs.values() for array in (pair.a, pair.b)]
        return sum(array.nbytes for array in (*arrays, *self.replaced.values(), *self.magnitudes.values()))


def read_adapter(path: str | Path, checkpoint: Checkpoint, scale: float = 1.0) -> Adapter:
    """An adapter's folder, checked against the checkpoint's configuration. scale: a factor of its own scales.

    Raises InputError: adapter_not_found, adapter_invalid, adapter_unsupported, adapter_mismatch, weights_not_finite.
    """
    raise NotImplementedError


def fused(weight: mx.array, pair: Pair | None, magnitude: mx.array | None = None) -> mx.array:
    """W + scale B A in float32, (out, in); with a magnitude its rows are scaled to these lengths (DoRA)."""
    raise NotImplementedError
