"""The multi-token-prediction head in numpy float64: slow, plain, and written from its description alone.

It shares nothing with the package: it reads a raw Hugging Face folder itself and uses no MLX. Everything is computed
anew at each call, so there is no cache to be wrong. Left out: YaRN (the default rope only), quantized weights.
Letters: T pairs, D hidden, H query heads, Hk key/value heads, E head size, R rotated dims, V vocabulary.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Chain(NamedTuple):
    """Drafts of one chain: `tokens` (k,) ids, `logits` (k, V), `hidden` (k, D) after mtp.norm."""

    tokens: Array
    logits: Array
    hidden: Array


class HeadReference:
    """The head of a raw Hugging Face folder: config.json, and mtp.*, embed_tokens and lm_head of its safetensors."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())["text_config"]
        if self.config["rope_parameters"]["rope_type"] != "default":
            raise NotImplementedError("only the default rope")
        weights: dict[str, Array] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= read_tensors(file)
        self.embedding = weights.pop("model.language_model.embed_tokens.weight")  # (V, D)
        self.head = weights.pop("lm_head.weight", self.embedding)
        self.weights = {name.removeprefix("mtp."): array for name, array in weights.items()}

    def pairs(self, hidden: Array, embeddings: Array, positions: Array) -> Array:
        """The head's output (T, D) after mtp.norm for T pairs read at once; pair i sees the pairs up to i.

        `hidden` (T, D): the main model's after its final norm, of tokens i; `embeddings` (T, D): of tokens i + 1;
        `positions` (3, T): time, height and width of tokens i.
        """
        both = (self._norm(embeddings, "pre_fc_norm_embedding"), self._norm(hidden, "pre_fc_norm_hidden"))
        x = self._linear(np.concatenate(both, axis=-1), "fc")
        x = x + self._attention(self._norm(x, "layers.0.input_layernorm"), positions)
        x = x + self._mlp(self._norm(x, "layers.0.post_attention_layernorm"))
        return self._norm(x, "norm")

    def logits(self, y: Array) -> Array:
        """(..., D) -> (..., V), by the main model's head."""
        return y @ self.head.T

    def chain(self, hidden: Array, embeddings: Array, positions: Array, drafts: int) -> Chain:
        """Greedy drafts after the given pairs (as for `pairs`); the last pair holds the newest known token.

        Each further draft adds a pair: the output of the pair before, the embedding of the token just drafted, and
        the position before plus one on all axes, which is right behind text but not behind an image.
        """
        hidden, embeddings = np.asarray(hidden, np.float64), np.asarray(embeddings, np.float64)
        outputs, tokens = [], []
        for _ in range(drafts):
            outputs.append(self.pairs(hidden, embeddings, positions)[-1])
            tokens.append(int(np.argmax(self.logits(outputs[-1]))))
            hidden = np.concatenate((hidden, outputs[-1:]))
            embeddings = np.concatenate((embeddings, self.embedding[tokens[-1:]]))
            positions = np.concatenate((positions, positions[:, -1:] + 1), axis=1)
        y = np.stack(outputs)
        return Chain(np.array(tokens), self.logits(y), y)

    def _linear(self, x: Array, name: str) -> Array:
        return x @ self.weights[f"{name}.weight"].T

    def _norm(self, x: Array, name: str) -> Array:
        """Weights are stored as gamma - 1."""
        x = np.asarray(x, np.float64)
        variance = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(variance + self.config["rms_norm_eps"]) * (1 + self.weights[f"{name}.weight"])

    def _mlp(self, x: Array) -> Array:
        gate = self._linear(x, "layers.0.mlp.gate_proj")
        return self._linear(gate * _sigmoid(gate) * self._linear(x, "layers.0.mlp.up_proj"), "layers.0.mlp.down_proj")

    def _attention(self, x: Array, positions: Array) -> Array:
        c, prefix = self.config, "layers.0.self_attn."
        T, E, H, Hk = len(x), c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
        both = self._linear(x, prefix + "q_proj").reshape(T, H, 2 * E)  # of each head the query, then its gate
        q, gate = both[..., :E], both[..., E:]
        k = self._linear(x, prefix + "k_proj").reshape(T, Hk, E)
        v = self._linear(x, prefix + "v_proj").reshape(T, Hk, E)
        angles = self._angles(positions)
        q = _rotate(self._norm(q, prefix + "q_norm"), angles)
        k = _rotate(self._norm(k, prefix + "k_norm"), angles)
        out = np.empty((T, H, E))
        for h in range(H):
            kv = h // (H // Hk)
            scores = q[:, h] @ k[:, kv].T / np.sqrt(E)
            scores[np.triu_indices(T, 1)] = -np.inf
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, h] = scores / scores.sum(axis=-1, keepdims=True) @ v[:, kv]
        return self._linear((out * _sigmoid(gate)).reshape(T, H * E), prefix + "o_proj")

    def _angles(self, positions: Array) -> Array:
        """(3, T) -> (T, R / 2): interleaved M-RoPE, frequency i takes its position from the axis `axes[i]`."""
        rope = self.config["rope_parameters"]
        half = int(self.config["head_dim"] * rope["partial_rotary_factor"]) // 2
        _, height, width = rope["mrope_section"]
        axes = np.zeros(half, np.int64)
        axes[1 : 3 * height : 3] = 1
        axes[2 : 3 * width : 3] = 2
        frequencies = float(rope["rope_theta"]) ** (-np.arange(half) / half)
        return np.asarray(positions, np.float64)[axes].T * frequencies


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))


def _rotate(x: Array, angles: Array) -> Array:
    """x (T, heads, E): dim j of the first R / 2 turns with dim j + R / 2; those after R stay."""
    half = angles.shape[-1]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate((a * cos - b * sin, b * cos + a * sin, rest), axis=-1)


def read_tensors(file: Path) -> dict[str, Array]:
    """The tensors of a safetensors file that the head needs, widened to float64."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        return dict(_wanted(header, np.memmap(file, np.uint8, "r", 8 + length)))


def _wanted(header: dict, data: Array) -> Iterator[tuple[str, Array]]:
    for name, entry in header.items():
        if not name.startswith(("mtp.", "lm_head.", "model.language_model.embed_tokens.")):
            continue
        begin, end = entry["data_offsets"]
        raw = data[begin:end]
        if entry["dtype"] == "BF16":  # the upper half of a float32
            array = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            array = raw.view({"F32": "<f4", "F16": "<f2"}[entry["dtype"]])
        yield name, array.astype(np.float64).reshape(entry["shape"])
