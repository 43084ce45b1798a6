"""Whether this Python can run the package, in the syntax of any Python 3, for one that cannot.

The package imports this module before all others, and the Makefile runs it.
"""

import os
import platform
import subprocess
import sys

LEAST = (3, 11)


def objection(version: "tuple[int, ...]", program: str, machine: str, translated: bool) -> str:
    """Why a Python cannot run the package, in one sentence; "" where it can.

    program: its path. machine: the processor it was built for. translated: whether the system translates it for this
    processor, as Rosetta does.
    """
    if version < LEAST:
        return (
            f"mlx_qwen35 needs Python {LEAST[0]}.{LEAST[1]} or newer, and {program} is Python "
            f"{'.'.join(map(str, version))}: install one (uv python install 3.12, or from python.org) and use it"
        )
    if machine == "x86_64" and translated:
        return (
            f"MLX needs a Python for Apple Silicon, and {program} is an x86 program under Rosetta: install an arm64 "
            "Python (uv python install 3.12, or python.org's universal installer) and use it"
        )
    return ""


def _translated() -> bool:
    if sys.platform != "darwin":
        return False
    asked = subprocess.run(["/usr/sbin/sysctl", "-n", "sysctl.proc_translated"], stdout=subprocess.PIPE)
    return asked.stdout.strip() == b"1"


def check() -> None:
    """End a command in one line where this Python cannot run it. In a program raise ImportError, told in one line too
    if nothing catches it.
    """
    said = objection(tuple(sys.version_info[:3]), sys.executable, platform.machine(), _translated())
    if not said:
        return
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name in ("-m", os.path.basename(__file__)) or name.startswith("mlx_qwen35"):
        sys.stderr.write(f"error: {said}\n")
        raise SystemExit(2)
    error, before = ImportError(said), sys.excepthook
    sys.excepthook = lambda kind, found, trace: (
        print(said, file=sys.stderr) if found is error else before(kind, found, trace)
    )
    raise error


check()
