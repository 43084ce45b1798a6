"""examples/tour.ipynb runs in a kernel, and says what is stored in it.

`python tests/docs/test_notebook.py` runs it and stores what it says.
"""

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

TOUR = Path(__file__).parents[2] / "examples" / "tour.ipynb"


def ran() -> Any:
    notebook = nbformat.read(TOUR, as_version=4)
    where = {"metadata": {"path": str(TOUR.parent)}}
    NotebookClient(notebook, timeout=120, coalesce_streams=True, resources=where).execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # times
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/jpeg", None)  # beside the PNG
    return notebook


def said(notebook: Any) -> list[list[Any]]:
    """What each cell of code prints and shows; of a picture its kind."""
    return [
        [output.get("text") or {kind: kind.startswith("image") or text for kind, text in output.data.items()}
         for output in cell.outputs]
        for cell in notebook.cells if cell.cell_type == "code"
    ]  # fmt: skip


def test_the_tour_says_what_is_stored_in_it():
    stored = nbformat.read(TOUR, as_version=4)
    nbformat.validate(stored)
    assert said(ran()) == said(stored)


if __name__ == "__main__":
    nbformat.write(ran(), TOUR)
