"""Fixtures of the server's tests."""

from collections.abc import Iterator

import pytest
from media import conftest
from serving import Running, serving


@pytest.fixture(scope="session")
def nano_server() -> Iterator[Running]:
    """nano behind the default options, one for all tests of a process."""
    with serving() as running:
        yield running


web_server = conftest.server
