"""What the tests here compare with."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mlx_qwen35 import Processor
from mlx_qwen35.checkpoint.config import read_config
from mlx_qwen35.checkpoint.hub import resolve


@pytest.fixture(params=["nano", "published"])
def folder(request: pytest.FixtureRequest) -> Path:
    """A folder with a chat template: nano's, and the one given with --real-model."""
    return resolve("nano") if request.param == "nano" else request.getfixturevalue("real_model")


@cache
def _processor(folder: Path) -> Processor:
    return Processor.from_folder(folder, read_config(folder))


@pytest.fixture
def processor(folder: Path) -> Processor:
    """The processor of `folder`."""
    return _processor(folder)


@pytest.fixture(scope="session")
def read_theirs() -> Callable[[Path], Any]:
    """(folder) -> its tokenizer as transformers reads it."""
    auto = pytest.importorskip("transformers", reason="compares with transformers").AutoTokenizer
    return cache(auto.from_pretrained)
