"""What is compared with transformers: random checkpoints, inputs, and which numbers of the answers are kept in git.

All random numbers come from the raw output of PCG64 and a handful of exactly rounded operations, so that every machine
writes the same checkpoints; MLX's own normal numbers differ in the last bit from backend to backend.
"""

import hashlib
import json
import math
import zlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from geometries import changed

from mlx_qwen35.checkpoint.config import FULL, LINEAR
from mlx_qwen35.checkpoint.folder import safetensors_files
from mlx_qwen35.checkpoint.names import VISION, is_zero_centred
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint

GOLDEN = Path(__file__).parent / "golden"
REMEDY = (
    "run `python tests/parity/make_golden.py` where torch and transformers 5.23 are installed, and look at the diff"
)

PROMPT, DECODED = 600, 32  # tokens: the longest prompt, and the steps decoded after it
LAYER_TOKENS = 75  # fed to single layers: two chunks of 32 and a rest
ROWS = sorted(
    {*range(9), 31, 32, 33, 62, 63, 64, 65, 74, 127, 128, 129, 130, 255, 256, 400, 511, 512, *range(596, 632)}
)
COLUMNS = 48  # of each golden row


@dataclass(frozen=True)
class Case:
    """One random checkpoint. `prompt` is 0 where only single layers, or the vision tower, are compared."""

    name: str
    seed: int
    text: dict[str, Any] = field(default_factory=dict)  # what differs from the tiny geometry
    base: str = "tiny"
    prompt: int = PROMPT
    layer_tokens: int = LAYER_TOKENS
    vision: dict[str, Any] | None = None  # what differs in the vision tower; None: its tensors are left out

    @property
    def config(self) -> dict[str, Any]:
        config = changed(geometry(self.base), **self.text)
        config["vision_config"] |= self.vision or {}
        return config

    @property
    def golden(self) -> Path:
        return GOLDEN / f"{self.name}.npz"


def _rope(partial: float, sections: list[int], theta: int = 10_000_000) -> dict[str, Any]:
    return {
        "rope_type": "default", "rope_theta": theta, "partial_rotary_factor": partial, "mrope_interleaved": True,
        "mrope_section": sections,
    }  # fmt: skip


# Head ratios of the family with shrunk sizes, and one model that is unlike all of them.
_LIKE_08B = {
    "hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 48, "linear_value_head_dim": 32,
    "rope_parameters": _rope(0.25, [3, 3, 2]),
}  # fmt: skip
_LIKE_4B = {
    "hidden_size": 160, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 32, "linear_value_head_dim": 48,
    "rope_parameters": _rope(0.25, [3, 3, 2]),
}  # fmt: skip
_LIKE_27B = {
    "hidden_size": 224, "intermediate_size": 416, "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 96,
    "linear_num_key_heads": 3, "linear_num_value_heads": 9, "linear_key_head_dim": 40, "linear_value_head_dim": 24,
    "rope_parameters": _rope(0.25, [4, 4, 4]), "tie_word_embeddings": False,
}  # fmt: skip
_ODD = {
    "hidden_size": 136, "intermediate_size": 200, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 40,
    "linear_num_key_heads": 2, "linear_num_value_heads": 10, "linear_key_head_dim": 24, "linear_value_head_dim": 56,
    "linear_conv_kernel_dim": 3, "full_attention_interval": 3, "num_hidden_layers": 7, "rms_norm_eps": 1e-5,
    "rope_parameters": _rope(0.5, [4, 3, 3], theta=10_000), "vocab_size": 1000,
}  # fmt: skip
# One layer of each kind with the widths of the 4B; only MLP and vocabulary, which add nothing here, are narrow.
_REAL_WIDTHS = {
    "num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "intermediate_size": 96, "vocab_size": 64,
}  # fmt: skip

CASES = (
    Case("tiny-0", 0),
    Case("tiny-1", 1),
    Case("tiny-2", 2),
    Case("untied", 3, {"tie_word_embeddings": False}),
    Case("like-0.8b", 4, _LIKE_08B),
    Case("like-4b", 5, _LIKE_4B),
    Case("like-27b", 6, _LIKE_27B),
    Case("odd", 7, _ODD),
)
MORE_DRAWS = ("tiny-1", "tiny-2")  # of a geometry that has one already
REAL_WIDTHS = Case("4b-widths", 8, _REAL_WIDTHS, base="4b", prompt=0, layer_tokens=5)
SCALED = {
    "rope_parameters": _rope(0.25, [6, 5, 5])
    | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144},
}  # fmt: skip
YARN = Case("yarn", 9, SCALED, prompt=0, layer_tokens=5)


# --- numbers that are the same everywhere ----------------------------------------------------------------------------


def _raw(seed: int, name: str, count: int) -> np.ndarray:
    return np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])).random_raw(count)


def uniform(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [0, 1)."""
    return (_raw(seed, name, math.prod(shape)) >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53


def normal(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of mean 0 and variance 1, nearly normal: the sum of four integers of 16 bits."""
    parts = _raw(seed, name, math.prod(shape)).view(np.uint16).reshape(-1, 4)
    total = parts.sum(axis=1, dtype=np.int32) - 2 * 65535
    return (total.astype(np.float32) * np.float32(math.sqrt(12 / 4) / 65536)).reshape(shape)


def tokens(case: Case, count: int, salt: str = "prompt") -> np.ndarray:
    """(count,) int32 token ids."""
    return (_raw(case.seed, salt, count) % np.uint64(case.config["text_config"]["vocab_size"])).astype(np.int32)


def layer_input(case: Case) -> np.ndarray:
    """(T, D) float32 activations for single layers."""
    return normal(case.seed, "layer input", (case.layer_tokens, case.config["text_config"]["hidden_size"]))


def positions(case: Case) -> np.ndarray:
    """(3, 2, 40) int32: three axes that differ; a row near the start, and one over the whole context of 262144."""
    limits = np.array([[16], [262144]], np.uint64)
    return (_raw(case.seed, "positions", 240).reshape(3, 2, 40) % limits).astype(np.int32)


def places(case: Case) -> dict[str, np.ndarray]:
    """With YaRN: name -> (3, LAYER_TOKENS) int32 positions, at which hidden states are compared."""
    if case.config["text_config"]["rope_parameters"]["rope_type"] != "yarn":
        return {}
    text = np.tile(np.arange(LAYER_TOKENS, dtype=np.int32), (3, 1))
    axes = (_raw(case.seed, "axes", text.size) % np.uint64(500_000)).astype(np.int32).reshape(text.shape)
    return {"near": text, "far": 1_048_000 + text, "three axes": 548_000 + axes}


def _log_uniform(seed: int, name: str, even: tuple[float, float], odd: tuple[float, float], heads: int) -> np.ndarray:
    u = uniform(seed, name, (heads,))
    low, high = (np.where(np.arange(heads) % 2 == 0, e, o) for e, o in zip(np.log(even), np.log(odd), strict=True))
    return np.exp(low + u * (high - low))


def _tensor(seed: int, name: str, shape: tuple[int, ...]) -> mx.array:
    """The ranges of random_checkpoint: even heads of a layer decay by 0.99 a token or slower, odd ones fast."""
    if name.startswith(VISION):
        values = _vision_values(seed, name, shape)
    elif name.endswith("A_log"):
        values = np.log(_log_uniform(seed, name, (0.05, 0.5), (1.0, 16.0), *shape))
    elif name.endswith("dt_bias"):
        values = np.log(np.expm1(_log_uniform(seed, name, (1e-3, 1e-2), (1e-2, 0.3), *shape)))
    elif len(shape) == 1:
        values = 0.1 * normal(seed, name, shape) + np.float32(0.0 if is_zero_centred(name) else 1.0)
    else:
        scale = 0.02 if "embed" in name or name == "lm_head.weight" else math.prod(shape[1:]) ** -0.5
        values = normal(seed, name, shape) * np.float32(scale * (0.25 if "in_proj_a" in name else 1.0))
    return mx.array(values.astype(np.float32))


def _vision_values(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Biases that matter, a position table of the patches' own size, and scores that tell keys apart."""
    if len(shape) == 1:
        return normal(seed, name, shape) * np.float32(0.3) + np.float32(0.0 if name.endswith("bias") else 1.0)
    gain = 1.5 if "qkv" in name else 4.0 if "merger.linear_fc2" in name else 1.0
    return normal(seed, name, shape) * np.float32(1.0 if "pos_embed" in name else gain * math.prod(shape[1:]) ** -0.5)


def write(case: Case, folder: Path) -> Path:
    """The checkpoint of a case as Hugging Face stores it; the tower is in it where the case says how it differs."""
    vision = case.vision is not None
    return write_random_checkpoint(
        folder, case.config, seed=case.seed, mtp=False, vision=vision, tensor=lambda *a: _tensor(case.seed, *a)
    )


def fingerprint(folder: Path) -> str:
    """SHA-256 over config and tensors of a folder, whatever the order and the file they lie in."""
    digest = hashlib.sha256(json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True).encode())
    for file in safetensors_files(folder):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name in sorted(header):
            begin, end = header[name]["data_offsets"]
            digest.update(f"{name} {header[name]['dtype']} {header[name]['shape']}".encode())
            digest.update(data[start + begin : start + end])
    return digest.hexdigest()


# --- what is kept of an answer ---------------------------------------------------------------------------------------


def kept(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a (tokens, width) answer that a golden file holds."""
    rows = np.array([row for row in ROWS if row < shape[0]])
    step = max(1, shape[1] // COLUMNS)
    return rows, np.arange(step // 2, shape[1], step)


class Reference:
    """What transformers answers, by name, each (tokens, width): all of it when computed now, else what is kept."""

    def __init__(self, arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, int]] | None = None):
        self.live = shapes is None
        self.arrays = arrays
        self.shapes = shapes or {name: array.shape for name, array in arrays.items()}

    def error(self, name: str, ours: Any, start: int = 0) -> float:
        """Largest absolute difference of rows `start`, ... (n, width) from the reference; NaN counts as infinite."""
        ours = np.asarray(ours, np.float32)
        rows, columns = (np.arange(n) for n in self.shapes[name]) if self.live else kept(self.shapes[name])
        assert ours.ndim == 2 and ours.shape[1] == self.shapes[name][1] and start + len(ours) <= self.shapes[name][0]
        here = (rows >= start) & (rows < start + len(ours))
        assert here.any(), f"no row of {name} from {start} is kept"
        difference = np.abs(ours[rows[here] - start][:, columns] - self.arrays[name][here])
        return float(np.nan_to_num(difference, nan=np.inf).max())


def save(case: Case, answers: dict[str, np.ndarray], mark: str, version: str) -> None:
    """Write a golden file."""
    stored = {f"shape {name}": np.array(array.shape) for name, array in answers.items()}
    stored |= {name: array[np.ix_(*kept(array.shape))] for name, array in answers.items()}
    case.golden.parent.mkdir(exist_ok=True)
    np.savez_compressed(case.golden, fingerprint=np.array(mark), version=np.array(version), **stored)


def read(case: Case, mark: str) -> Reference:
    """The golden file of a case whose checkpoint has this fingerprint."""
    assert case.golden.is_file(), f"{case.golden.name} is absent: {REMEDY}"
    with np.load(case.golden) as file:
        stored = dict(file)
    assert str(stored.pop("fingerprint")) == mark, (
        f"the checkpoint of {case.name} is not the one that {case.golden.name} was made with; if its writer or its "
        f"case was changed on purpose, {REMEDY}"
    )
    stored.pop("version")
    shapes = {
        name.removeprefix("shape "): tuple(stored.pop(name)) for name in list(stored) if name.startswith("shape ")
    }
    return Reference(stored, shapes)


@cache
def by_name(name: str) -> Case:
    return next(case for case in (*CASES, REAL_WIDTHS, YARN) if case.name == name)
