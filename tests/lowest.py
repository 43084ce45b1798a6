"""The lowest versions that pyproject.toml allows, as constraints for pip: python tests/lowest.py > FILE"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def lowest() -> list[str]:
    """Each dependency pinned to its lower bound, with its marker."""
    lines = []
    for requirement in map(Requirement, PROJECT["dependencies"]):
        (version,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
        marker = f" ; {requirement.marker}" if requirement.marker else ""
        lines.append(f"{requirement.name}=={version}{marker}")
    return lines


if __name__ == "__main__":
    print("\n".join(lowest()))
