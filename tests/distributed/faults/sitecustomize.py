"""Sends a process that has this folder on PYTHONPATH a signal within a function of the package.

FAULT: "RANK FUNCTION SIGNAL COUNT", as "1 ObeyingRank._pass SIGKILL 12" for the 12th call of it on rank 1.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

_rank, _function, _signal, _count = os.environ["FAULT"].split()
_calls = 0


def _watch(frame: FrameType, event: str, _: Any) -> None:
    global _calls
    if event != "call" or frame.f_code.co_qualname != _function or os.environ.get("MLX_RANK", "0") != _rank:
        return
    _calls += 1
    if _calls == int(_count):
        os.kill(os.getpid(), getattr(signal, _signal))


sys.setprofile(_watch)
threading.setprofile(_watch)
