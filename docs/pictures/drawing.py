"""What the scripts of this folder share.

    python docs/pictures/NAME.py [--measure]

draws NAME.png from the figures in NAME.json. With --measure they are measured anew before.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "examples/nano")]


def main(script: str, measure: Callable[[], Any], draw: Callable[[Path, Any], object]) -> None:
    """Draw the picture of a script; its figures are written before, if they are to be measured."""
    parser = argparse.ArgumentParser(description=f"Draw {Path(script).stem}.png from {Path(script).stem}.json.")
    parser.add_argument("--measure", action="store_true", help="measure the figures anew before")
    figures = Path(script).with_suffix(".json")
    if parser.parse_args().measure:
        figures.write_text(json.dumps(measure(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(figures.with_suffix(".png"), json.loads(figures.read_text(encoding="utf-8")))


def benched(arguments: Sequence[str], *names: str) -> dict[str, Any]:
    """These parts of what mlx_qwen35.bench writes with --json; of the machine its chip and the versions."""
    from mlx_qwen35 import bench

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        bench.main([*arguments, "--json", str(file)])
        found = json.loads(file.read_text(encoding="utf-8"))
    return {"machine": {name: found["machine"][name] for name in ("chip", "versions")}} | {n: found[n] for n in names}


def machine() -> str:
    """Versions and chip, for the small print."""
    from mlx_qwen35.machine.chip import brand

    return f"mlx {metadata.version('mlx')}, float32, {brand()}"
