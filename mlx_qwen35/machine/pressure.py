"""How short of memory the whole machine is, as macOS tells it."""

import ctypes
import functools
import platform
from collections.abc import Callable

NORMAL, WARNING, CRITICAL = 1, 2, 4  # levels of kern.memorystatus_vm_pressure_level
_NAME = b"kern.memorystatus_vm_pressure_level"

Sysctl = Callable[..., int]  # sysctlbyname(name, value, size, new value, its size) -> 0 where it succeeds


def pressure(sysctl: Sysctl | None = None) -> int | None:
    """NORMAL, WARNING or CRITICAL; None on other systems than macOS, and where it does not tell."""
    ask = sysctl or _sysctl()
    level = ctypes.c_int(0)
    size = ctypes.c_size_t(ctypes.sizeof(level))
    if ask is None or ask(_NAME, ctypes.byref(level), ctypes.byref(size), None, ctypes.c_size_t(0)):
        return None
    return level.value if level.value in (NORMAL, WARNING, CRITICAL) else None


@functools.cache
def _sysctl() -> Sysctl | None:
    return ctypes.CDLL(None).sysctlbyname if platform.system() == "Darwin" else None
