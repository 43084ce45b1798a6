"""Which folder of the package may import which (the table in CONTRIBUTING.md), and that no import goes in a circle.

Every import counts: at the top of a file, inside a function, under TYPE_CHECKING. Exempt are what runs a command, a
`__main__.py` and an `if __name__ == "__main__"` block, and the package's `__init__.py`, which gathers public names.
"""

import ast
import graphlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "mlx_qwen35"

# What everyone may import.
GROUND = frozenset({"gate", "errors", "values", "fields", "quantization", "backend", "options"})
LEAVES = frozenset({"machine", "kernels", "checkpoint"})
MODEL = LEAVES | {"cache", "media", "budget", "model"}
INPUT = MODEL | {"prompt"}
ALL = INPUT | {"load", "measure", "engine", "generate"}

MAY_IMPORT: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(GROUND, GROUND),
    **dict.fromkeys(LEAVES, frozenset()),
    "cache": frozenset({"machine", "kernels", "checkpoint"}),
    "media": frozenset({"machine", "checkpoint"}),
    "budget": LEAVES | {"cache"},
    "model": MODEL - {"model"},
    "prompt": frozenset({"checkpoint", "media"}),
    **dict.fromkeys(("load", "measure"), INPUT),
    "engine": INPUT | {"measure"},
    "generate": INPUT | {"measure", "engine"},
    "server": ALL,
    "console": ALL | {"distributed"},
    **dict.fromkeys(("convert", "train"), ALL | {"console"}),
    "evaluate": ALL | {"console", "distributed"},
    "distributed": INPUT | {"load", "engine"},
    "bench": ALL | {"console", "train"},
    "doctor": ALL | {"console", "convert", "distributed"},
    "commands": ALL | {"console", "server", "convert", "train", "evaluate", "doctor", "bench", "distributed"},
}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package that the rules hold for, by its name inside the package."""
    files = [*root.glob(f"{PACKAGE}/**/*.py"), *root.glob(f"{PACKAGE}/convert/*.py")]  # convert is a link
    named = {".".join(file.relative_to(root / PACKAGE).with_suffix("").parts): file for file in files}
    found = {name.removesuffix(".__init__"): file for name, file in named.items() if not name.endswith("__main__")}
    return {name: file for name, file in found.items() if name != "__init__"}


def imports(module: str, file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, by the same names; "" is the package itself."""
    package = [PACKAGE, *module.split(".")][: None if file.name == "__init__.py" else -1]
    for node in _counted(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            targets = [f"{source}.{alias.name}" for alias in node.names]
        for target in targets:
            first, *rest = target.split(".")
            if first == PACKAGE:
                while rest and ".".join(rest) not in known:  # names of a module, and not modules, are cut off
                    rest.pop()
                yield ".".join(rest)


def _counted(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"):
        for child in ast.iter_child_nodes(node):
            yield from _counted(child)


def graph(root: Path) -> dict[str, set[str]]:
    known = modules(root)
    return {name: set(imports(name, file, known)) - {name} for name, file in known.items()}


def room(module: str) -> str:
    return module.split(".")[0]


def forbidden(edges: Mapping[str, set[str]]) -> list[str]:
    return sorted(
        f"{module} -> {target}"
        for module, targets in edges.items()
        for target in targets - {""}
        if room(target) not in {room(module)} | GROUND | MAY_IMPORT.get(room(module), frozenset())
    )


def test_every_folder_has_a_rule():
    shims = {"chat", "serve", "models", "eval"}
    assert {room(module) for module in modules(ROOT)} - set(MAY_IMPORT) - shims - {"nano"} == set()


def test_imports_go_one_way():
    assert forbidden(graph(ROOT)) == []


def test_no_import_goes_in_a_circle():
    graphlib.TopologicalSorter(graph(ROOT)).prepare()


def test_only_commands_import_the_package_itself():
    found = {room(module) for module, targets in graph(ROOT).items() if "" in targets}
    assert found <= {"console", "commands", "convert"}


TURNED = {
    "at the top": "from mlx_qwen35.engine.rows import Rows\n",
    "the module": "import mlx_qwen35.engine.rows as rows\n",
    "in a function": "def f():\n    from mlx_qwen35.engine import rows\n",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mlx_qwen35.engine.rows import Rows\n",
    "relative": "from ..engine import rows\n",
    "relative name": "from ..engine.rows import Rows\n",
}


@pytest.fixture
def copy(tmp_path: Path):
    """A package of two rooms; the function writes the file of the lower one."""
    for name in ("engine", "model"):
        (tmp_path / PACKAGE / name).mkdir(parents=True)
    (tmp_path / PACKAGE / "engine" / "rows.py").write_text("from mlx_qwen35.model.layers import Linear\nRows = 1\n")

    def write(text: str) -> Path:
        (tmp_path / PACKAGE / "model" / "layers.py").write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize("text", TURNED.values(), ids=TURNED)
def test_an_import_that_is_turned_round_is_found(copy, text):
    edges = graph(copy(text))
    assert forbidden(edges) == ["model.layers -> engine.rows"]
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(edges).prepare()


@pytest.mark.parametrize("text", ["f = 1\n", f"if __name__ == '__main__':\n    {TURNED['at the top']}"])
def test_what_runs_a_command_is_exempt(copy, text):
    assert forbidden(graph(copy(text))) == []
