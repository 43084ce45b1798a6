"""The golden adapters: as PEFT and mlx-lm have written them, with the logits that those programs give.

golden/NAME.json has the folder's adapter_config.json ("config"), the name of its file of tensors ("file"), and of each
tensor name, dtype and shape ("tensors"). The numbers are made from the names, by `numbers`, the same on any machine.
golden/NAME.npz has the answers, as `cases.Reference` keeps them: "logits" of `TOKENS`, float32 (40, V); where the
vision encoder is adapted, "tower", the embeddings of noise of `GRID`, and "image logits" of `SCENE`.

    folder = write("peft-plain", tmp_path / "adapter", model)  # model: the folder of MODEL, by parity_folder
    answers("peft-plain").error("logits", ours)                # the largest difference

All are for `MODEL`, whose head is tied. `python tests/adapters/make_adapters.py` renews them.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from parity import cases, vision_cases
from parity.cases import Reference
from parity.vision_cases import Scene

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.tensors import open_arrays

GOLDEN = Path(__file__).parent / "golden"
MODEL = vision_cases.TINY
TOKENS = cases.tokens(MODEL, 40)
GRID = (1, 4, 6)
SCENE = Scene(MODEL, "image")

# What is compared: PEFT's adapters, and mlx-lm's.
PEFT = (
    "peft-plain", "peft-causal", "peft-rslora-vision", "peft-patterns", "peft-norm", "peft-embedding",
    "peft-embedding-tied", "peft-table", "peft-dora",
)  # fmt: skip
MLX = ("mlx-lora", "mlx-dora", "mlx-full", "mlx-embedding")
OF_VISION = ("peft-rslora-vision",)
REMEDY = "run `python tests/adapters/make_adapters.py` where torch, peft and mlx-lm are installed, and look at the diff"


OF_TABLE = {  # where a head is tied, its factors are the table's
    "base_model.model.lm_head.lora_A.weight": "base_model.model.model.language_model.embed_tokens.lora_embedding_B",
    "base_model.model.lm_head.lora_B.weight": "base_model.model.model.language_model.embed_tokens.lora_embedding_A",
}


@cache
def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 numbers of a tensor of an adapter, of a size that moves logits by about their own."""
    values = cases.normal(77, name, shape)
    if len(shape) == 1:
        one = name.endswith((".m", "lora_magnitude_vector")) or (name.startswith("language_model.") and "norm" in name)
        return np.float32(one) + np.float32(0.2) * values
    if name.endswith(".weight") and "lora_" not in name:
        return np.float32(0.03) * values
    return np.float32(0.1) * values


def read(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def write(name: str, folder: Path, model: Path) -> Path:
    """The adapter's folder. model: that of MODEL, whose tables of tokens some adapters repeat."""
    golden = read(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(golden["config"], indent=2))
    tensors = {key: mx.array(numbers(key, tuple(shape))) for key, (_, shape) in golden["tensors"].items()}
    for key in tensors:
        if key.endswith(".base_layer.weight"):
            tensors[key] = table(model)
        if key in OF_TABLE and OF_TABLE[key] in tensors:
            tensors[key] = tensors[OF_TABLE[key]].T
    mx.save_safetensors(str(folder / golden["file"]), tensors, {"format": "pt"})
    return folder


def table(model: Path) -> mx.array:
    """MODEL's table of tokens, (V, D) float32."""
    entries = open_checkpoint(model).entries
    (array,) = open_arrays({name: entry for name, entry in entries.items() if "embed_tokens" in name}).values()
    return array.astype(mx.float32)


def answers(name: str) -> Reference:
    """What the program that wrote the adapter answers."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        stored = dict(file)
    shapes = {key.removeprefix("shape "): tuple(stored.pop(key)) for key in list(stored) if key.startswith("shape ")}
    return Reference(stored, shapes)


def save(
    name: str, config: dict[str, Any], file: str, shapes: dict[str, tuple[int, ...]], found: dict[str, np.ndarray]
) -> None:
    """Write the two files of a golden adapter."""
    GOLDEN.mkdir(exist_ok=True)
    tensors = ",\n".join(f"  {json.dumps(key)}: {json.dumps(['F32', list(shapes[key])])}" for key in sorted(shapes))
    text = f'{{"config": {json.dumps(config, sort_keys=True)},\n"file": "{file}",\n"tensors": {{\n{tensors}\n}}}}\n'
    (GOLDEN / f"{name}.json").write_text(text)
    kept = {key: array[np.ix_(*cases.kept(array.shape))] for key, array in found.items()}
    np.savez_compressed(GOLDEN / f"{name}.npz", **kept, **{f"shape {k}": np.array(a.shape) for k, a in found.items()})

