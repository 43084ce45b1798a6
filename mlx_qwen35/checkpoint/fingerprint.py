"""The fingerprint of a checkpoint's text model: what its cache holds is of use to no other."""

import hashlib
import json
from dataclasses import asdict

from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.names import MTP, TEXT
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
    for name in sorted(checkpoint.entries):
        entry = checkpoint.fp32_original.get(name, checkpoint.entries[name])
        if name.startswith(MTP):
            continue
        digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
        if name.startswith((TEXT, "lm_head.")):
            with entry.file.open("rb") as file:
                digest.update(read_bytes(entry, file.fileno(), 0, min(BEGINNING, entry.nbytes)))
    return digest.hexdigest()
