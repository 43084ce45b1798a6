"""Small raw checkpoints in Hugging Face's layout, written once for all tests of the converter."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # last: the conftest above is the one to import

import mlx.core as mx
import pytest

from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.random import changed, geometry, write_random_checkpoint

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="session")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a dtype's name to the folder of a random checkpoint of that dtype, with a tokenizer."""
    folders: dict[str, Path] = {}

    def source(dtype: str) -> Path:
        if dtype not in folders:
            folder = tmp_path_factory.mktemp("source") / dtype
            config = changed(geometry("tiny"), dtype=dtype)
            folders[dtype] = write_random_checkpoint(folder, config, dtype=getattr(mx, dtype), shard_bytes=4e6)
            for name in TOKENIZER:
                shutil.copyfile(resolve("nano") / name, folder / name)
            (folder / "LICENSE").write_text("a licence")
        return folders[dtype]

    return source


@pytest.fixture(scope="session")
def raw(source_of: Callable[[str], Path]) -> Path:
    """The bfloat16 one, whose float32 tensors are A_log and linear_attn.norm, as in the published checkpoints."""
    return source_of("bfloat16")
