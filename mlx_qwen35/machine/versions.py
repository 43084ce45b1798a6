"""The versions of what digits depend on."""

from importlib.metadata import version


def versions() -> dict[str, str]:
    """Of this package and of MLX, by name."""
    return {name: version(name) for name in ("mlx-qwen35", "mlx")}
