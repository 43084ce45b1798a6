"""Fixtures of the server's tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from media import conftest
from serving import Running, serving

if TYPE_CHECKING:
    from browsing import Browser, Page


@pytest.fixture(scope="session")
def nano_server() -> Iterator[Running]:
    """nano behind the default options, one for all tests of a process."""
    with serving() as running:
        yield running


web_server = conftest.server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for the tests of a file."""
    from browsing import browsing

    with browsing() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, nano_server: Running) -> Iterator[Page]:
    """nano's page, as one sees it for the first time."""
    from browsing import opened

    with opened(browser, nano_server.url) as page:
        yield page


@pytest.fixture
def loggers() -> Iterator[None]:
    """The server's loggers are afterwards as they were before."""
    found = [logging.getLogger(name) for name in ("mlx_qwen35.server", "uvicorn.error")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in found]
    yield
    for logger, (handlers, propagate, level) in zip(found, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
