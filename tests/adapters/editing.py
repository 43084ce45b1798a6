"""Changes to an adapter's folder, for tests."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

CONFIG, PEFT, MLX = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"


def tensors_file(folder: Path) -> Path:
    return next(folder / name for name in (PEFT, MLX) if (folder / name).is_file())


def shown_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors."""
    return {key: array.shape for key, array in mx.load(str(tensors_file(folder))).items()}


def edited(folder: Path, tensors: dict[str, mx.array | None] | None = None, **config: Any) -> Path:
    """Set tensors, or with None remove them, and fields of the configuration."""
    if tensors:
        file = tensors_file(folder)
        all_tensors = {key: mx.array(array) for key, array in mx.load(str(file)).items()} | tensors
        arrays = {key: array for key, array in all_tensors.items() if array is not None}
        mx.eval(arrays)  # before the file is overwritten
        mx.save_safetensors(str(file), arrays)
    if config:
        values = json.loads((folder / CONFIG).read_text()) | config
        (folder / CONFIG).write_text(json.dumps(values))
    return folder
