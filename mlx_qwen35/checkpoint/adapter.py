"""Adapters on disk: PEFT's, mlx-lm's and mlx-vlm's folders, read into one form. `adapter_write.py` writes them.

Everything is checked against the configuration of the checkpoint that it is for, before weights of that are read.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.checkpoint import adapter_mlx, adapter_peft
from mlx_qwen35.checkpoint.adapter_checks import check_complete, check_names, drop_bases, leaves_head
from mlx_qwen35.checkpoint.adapter_parts import MAGNITUDE, WHOLE, A, B, Parts, config_of, invalid
from mlx_qwen35.checkpoint.arrays import lazy_arrays, to_raw
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.folder import shorten
from mlx_qwen35.checkpoint.names import HEAD, TABLE, is_zero_centred
from mlx_qwen35.checkpoint.tensors import Entry, as_array, open_arrays
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import spelled
from mlx_qwen35.values import number, shown


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
        table of tokens has A (r, D) and B (V, r). A head has a part of its own, lm_head.weight, also where it is tied
        to the table: PEFT's low-rank part of the table does not reach the head, mlx-lm's does (then both names have
        the same pair). The draft head's names begin with mtp.
    replaced: Hugging Face name -> a whole tensor in the place of the checkpoint's, always in raw layout (conv1d
        [C, 1, K], norms gamma - 1). With lm_head.weight among them a model is untied. Read from disk when computed.
    magnitudes: of DoRA, name of a weight -> (out,) lengths of its rows.
    fingerprint: SHA-256 of all of it, in hexadecimal: the names, the scales and the numbers, wherever they lie.
    stored: where the files have the whole tensors, there in MLX's layout unless the format is "peft".
    """

    path: Path
    format: str
    pairs: Mapping[str, Pair]
    replaced: Mapping[str, mx.array] = field(default_factory=dict)
    magnitudes: Mapping[str, mx.array] = field(default_factory=dict)
    fingerprint: str = ""
    stored: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, as they are read."""
        factors = {id(array): array for pair in self.pairs.values() for array in (pair.a, pair.b)}
        return sum(array.nbytes for array in (*factors.values(), *self.replaced.values(), *self.magnitudes.values()))

    @property
    def unties(self) -> bool:
        """Whether the table of tokens and a head that is tied to it differ once all of it is fused."""
        parts = (self.pairs, self.magnitudes)
        return HEAD in self.replaced or any(part.get(TABLE) is not part.get(HEAD) for part in parts)


def read_adapter(path: str | Path, checkpoint: Checkpoint, scale: float = 1.0) -> Adapter:
    """An adapter's folder, checked against the checkpoint's configuration. scale: a factor of its own scales.

    Pairs and magnitudes are in memory, in the dtype of the file; whole tensors are read when they are computed.

    Raises InputError: adapter_not_found; adapter_invalid for files that are damaged or contradict each other;
    adapter_unsupported for another method than LoRA, DoRA and whole tensors; adapter_mismatch for names and shapes that
    the checkpoint does not have; vision_missing and draft_head_missing for a part that it lacks; dtype_unsupported;
    weights_not_finite; option_invalid and option_no_effect for the scale.
    """
    scale = number(spelled("adapter_scale"), scale, "a number from -1,000 to 1,000", -1000, 1000)
    folder = adapter_folder(path)
    config = config_of(folder)
    if "peft_type" in config:
        parts = adapter_peft.parts_of(folder, config)
    elif adapter_mlx.is_one(config):
        parts = adapter_mlx.parts_of(folder, config, len(checkpoint.config.text.layer_types))
    else:
        raise invalid(folder, "its adapter_config.json is of no known program: it has neither peft_type (PEFT) nor "
                              "lora_parameters (mlx-lm, mlx-vlm)")  # fmt: skip
    adapter_peft.add_draft_head(parts)
    check_names(parts, checkpoint)
    check_complete(parts)
    leaves = leaves_head(parts, checkpoint)
    drop_bases(parts, checkpoint)
    whole = [name for name, kind in parts.tensors if kind == WHOLE]
    if scale != 1.0 and whole:
        raise InputError(
            "option_no_effect",
            f"{spelled('adapter_scale')} must be 1 for an adapter with whole tensors, which have no scale; {folder} "
            f"has {shorten(whole, 2)}",
        )
    fingerprint = _fingerprint(parts, scale)
    pairs, magnitudes = _low_rank(parts, scale, checkpoint.config.text.tie_word_embeddings)
    stored = {name: parts.tensors[name, WHOLE].entry for name, kind in parts.tensors if kind == WHOLE}
    replaced = whole_arrays(stored, parts.mlx)
    if leaves:
        replaced[HEAD] = lazy_arrays(checkpoint, [TABLE])[TABLE]
    return Adapter(folder, parts.format, pairs, replaced, magnitudes, fingerprint, stored)


def adapter_folder(path: str | Path) -> Path:
    """The folder that a path names, whether it is there or not. InputError adapter_not_found for a path of none."""
    if not isinstance(path, str | Path) or not str(path).strip() or "\0" in str(path):
        raise InputError("adapter_not_found", f"an adapter must be given as the path of its folder, got {shown(path)}")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~nobody
        raise InputError("adapter_not_found", f"{path} must be the path of an adapter's folder: {error}") from error


def whole_arrays(stored: Mapping[str, Entry], mlx: bool) -> dict[str, mx.array]:
    """Whole tensors by name, in raw layout, read from disk when computed. mlx: they are stored in MLX's layout."""
    arrays = open_arrays(stored)
    return {name: to_raw(name, array, is_zero_centred(name)) for name, array in arrays.items()} if mlx else arrays


def fused(weight: mx.array, pair: Pair | None, magnitude: mx.array | None = None) -> mx.array:
    """W + scale B A in float32, (out, in) or the shape of a convolution's W.

    With a magnitude (out,), of DoRA, its rows have these lengths (arXiv:2402.09353).
    """
    fused = weight.astype(mx.float32)
    if pair is not None:
        product = pair.b.astype(mx.float32) @ pair.a.astype(mx.float32)
        fused = fused + pair.scale * product.reshape(fused.shape)
    if magnitude is None:
        return fused
    return fused * (magnitude.astype(mx.float32)[:, None] / mx.linalg.norm(fused, axis=1, keepdims=True))


# --- numbers ---------------------------------------------------------------------------------------------------------


def _fingerprint(parts: Parts, scale: float) -> str:
    """SHA-256 of names, scales and numbers. InputError for NaN and infinity. Reads the files piece by piece."""
    digest = hashlib.sha256(json.dumps(parts.mlx).encode())
    for (name, kind), stored in sorted(parts.tensors.items()):
        own = parts.declared[name].scale * scale if name in parts.declared else None
        entry = stored.entry
        digest.update(json.dumps([name, kind, stored.transposed, own, entry.dtype, entry.shape]).encode())
        for piece in entry.pieces():
            digest.update(piece)
            if not mx.isfinite(as_array(piece, entry.dtype)).all().item():
                raise InputError(
                    "weights_not_finite",
                    f"the numbers of an adapter must be finite; NaN or infinity in {entry.stored_name} of "
                    f"{parts.folder}. Its training went wrong, or the file is damaged",
                )
    return digest.hexdigest()


def _low_rank(parts: Parts, scale: float, tied: bool) -> tuple[dict[str, Pair], dict[str, mx.array]]:
    """Pairs and magnitudes, in memory."""
    arrays = _arrays(parts, [A, B, MAGNITUDE])
    scales = {name: declared.scale * scale for name, declared in parts.declared.items()}
    pairs = {name: Pair(arrays[name, A], arrays[name, B], scales[name]) for name, kind in arrays if kind == A}
    magnitudes = {name: array for (name, kind), array in arrays.items() if kind == MAGNITUDE}
    if tied and TABLE in pairs and (parts.mlx or _alike(pairs[TABLE], pairs.get(HEAD))):
        pairs[HEAD] = pairs[TABLE]
        if TABLE in magnitudes and parts.mlx:
            magnitudes[HEAD] = magnitudes[TABLE]
    mx.eval([(pair.a, pair.b) for pair in pairs.values()], magnitudes)
    return pairs, magnitudes


def _alike(pair: Pair, other: Pair | None) -> bool:
    if other is None or pair.scale != other.scale:
        return False
    return all(mx.array_equal(*arrays).item() for arrays in zip(pair[:2], other[:2], strict=True))


def _arrays(parts: Parts, kinds: Collection[str]) -> dict[tuple[str, str], mx.array]:
    """Lazy arrays of these kinds, in the layout of `Adapter`."""
    tensors = {key: stored for key, stored in parts.tensors.items() if key[1] in kinds}
    opened = open_arrays({" ".join(key): stored.entry for key, stored in tensors.items()})
    arrays = {}
    for (name, kind), stored in tensors.items():
        array = opened[f"{name} {kind}"]
        if kind != MAGNITUDE:
            array = mx.contiguous(array.T) if stored.transposed else array.flatten(1)
        arrays[name, kind] = array
    return arrays
