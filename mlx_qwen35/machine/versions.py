"""The versions of what digits depend on."""

import hashlib
from importlib.metadata import version
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
_CODE = (".py", ".metal", ".cuh")


def versions() -> dict[str, str]:
    """Of this package and of MLX, by name."""
    return {name: version(name) for name in ("mlx-qwen35", "mlx")}


def code_fingerprint() -> str:
    """SHA-256, in hexadecimal, of the names and the contents of this package's code: two commits of one version
    differ.
    """
    digest = hashlib.sha256()
    for file in sorted(file for file in _PACKAGE.rglob("*") if file.suffix in _CODE):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(_PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
