"""Moments of a run that a test can act at, as anyone sees them from outside."""

import io
import sys
from collections.abc import Callable

import pytest


def when_shown(step: str, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Call `act` whenever the progress of this step is shown on standard error, whose text is returned."""

    class Stderr(io.StringIO):
        def write(self, text: str) -> int:
            if step in text:
                act()
            return super().write(text)

    stream = Stderr()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream
