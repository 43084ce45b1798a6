from collections.abc import Iterator

import pytest
from dispatches.count import markers


@pytest.fixture
def marked() -> Iterator[None]:
    """MLX as a process that counts sees it, for the length of a test."""
    with markers.prepared():
        yield
