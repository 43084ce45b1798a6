"""Fingerprints of a checkpoint's text model, and of its vision encoder: what these made is of use to no other."""

import hashlib
import json
from dataclasses import asdict

from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.names import MTP, TEXT, VISION
from mlx_qwen35.checkpoint.tensors import read_bytes

BEGINNING = 4096  # bytes of each tensor that are read
_APART = ("rope", "max_position_embeddings")  # a caller may change them, and what depends on them tells them itself


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256, in hexadecimal, of the text configuration, the names, dtypes and shapes of all tensors but the draft
    head's, and the first 4 KB of each tensor of the text model.

    It tells quantizations and finetunes apart. Rotary embedding and window are left out. Of the 4B it reads 1.7 MB.
    """
    config = {name: value for name, value in asdict(checkpoint.config.text).items() if name not in _APART}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    names = [name for name in checkpoint.entries if not name.startswith(MTP)]
    return _of_tensors(digest, checkpoint, names, (TEXT, "lm_head."))


def vision_fingerprint(checkpoint: Checkpoint) -> str:
    """The same of the vision encoder alone, with its configuration."""
    digest = hashlib.sha256(repr(checkpoint.config.vision).encode())
    names = [name for name in checkpoint.entries if name.startswith(VISION)]
    return _of_tensors(digest, checkpoint, names, (VISION,))


def _of_tensors(digest: "hashlib._Hash", checkpoint: Checkpoint, names: list[str], read: tuple[str, ...]) -> str:
    """Names, dtypes and shapes, and the beginning of each tensor whose name begins as one of `read`."""
    for name in sorted(names):
        entry = checkpoint.fp32_original.get(name, checkpoint.entries[name])
        digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
        if name.startswith(read):
            with entry.file.open("rb") as file:
                digest.update(read_bytes(entry, file.fileno(), 0, min(BEGINNING, entry.nbytes)))
    return digest.hexdigest()
