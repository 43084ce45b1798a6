"""The exchange of two folders' names in one step, where system and file system offer it."""

import ctypes
import errno
import os
import sys
from pathlib import Path

_HERE = -100  # AT_FDCWD: relative paths are those of the current folder
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS have the same number
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders. Returns False where that cannot be done in one step.

    Raises OSError for other reasons, such as missing permission.
    """
    library = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*map(ctypes.c_char_p, paths), ctypes.c_uint(_EXCHANGE))
    elif hasattr(library, "renameat2"):
        from_, to = ((ctypes.c_int(_HERE), ctypes.c_char_p(path)) for path in paths)
        failed = library.renameat2(*from_, *to, ctypes.c_uint(_EXCHANGE))
    else:
        return False
    number = ctypes.get_errno()
    if failed and number not in _CANNOT:
        raise OSError(number, os.strerror(number), str(one), None, str(other))
    return not failed
