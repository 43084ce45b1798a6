"""What the tests of training data share."""

from functools import cache
from pathlib import Path

import pytest

from mlx_qwen35 import Processor
from mlx_qwen35.checkpoint.config import read_config
from mlx_qwen35.checkpoint.hub import resolve


@cache
def _processor(folder: Path) -> Processor:
    return Processor.from_folder(folder, read_config(folder))


@pytest.fixture(params=["nano", "published"])
def processor(request: pytest.FixtureRequest) -> Processor:
    """nano's, and that of the folder given with --real-model."""
    return _processor(resolve("nano") if request.param == "nano" else request.getfixturevalue("real_model"))


@pytest.fixture
def nano() -> Processor:
    return _processor(resolve("nano"))
