"""What the tests here compare with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def read_theirs() -> Callable[[Path], Any]:
    """(folder) -> its tokenizer as transformers reads it."""
    auto = pytest.importorskip("transformers", reason="compares with transformers").AutoTokenizer
    return lambda folder: auto.from_pretrained(folder)
