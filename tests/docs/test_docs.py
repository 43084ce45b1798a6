"""What the documents say is true: commands parse or run, Python runs, links lead somewhere.

A block marked "sh run" is run, line by line in one folder, with nano in place of Hugging Face ids. In other "sh"
blocks, and in commands within sentences and tables, every option is parsed. A "text" block is what the run block before
it prints.
"""

import io
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from adapters.by_hand import made
from serving import serving

import mlx_qwen35
from mlx_qwen35.checkpoint.adapter_write import write_adapter
from mlx_qwen35.errors import CODES

ROOT = Path(__file__).parents[2]
NANO = str(Path(mlx_qwen35.__file__).parent / "nano")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
OTHERS = {"curl", "git", "hf", "pip", "pip-audit", "pipx", "uv"}  # whose options are not ours to check
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
CURRENT = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]  # it also tells of what was
README_LINES = 160


class Block(NamedTuple):
    info: str
    text: str


def blocks(document: Path) -> list[Block]:
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*block) for block in found]


def commands(text: str) -> list[list[str]]:
    """Its lines as words; two commands may be joined by &&."""
    lines = (command for line in text.replace("\\\n", " ").splitlines() for command in line.split(" && "))
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def having(info: str) -> list[Path]:
    return [document for document in CURRENT if any(block.info == info for block in blocks(document))]


def named(path: Path) -> str:
    return path.name


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch, capsys) -> Call:
    """(command of ours, arguments) -> (exit status, stdout, stderr), in this process."""

    def called(name: str, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        module, function = SCRIPTS[name].split(":")
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            status = getattr(import_module(module), function)() or 0
        except SystemExit as ended:
            status = ended.code or 0
        return status, *capsys.readouterr()

    return called


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Where a reader stands, and may write. There are two adapters for nano."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for seed, name in enumerate(("pirate", "poet"), start=1):
        write_adapter(tmp_path / name, made(seed).pairs)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", having("sh run"), ids=named)
def test_commands_marked_as_run_do_run(document: Path, folder: Path, call: Call):
    said = ""
    for block in blocks(document):
        if block.info == "text":
            assert block.text in said, f"{document.name} prints what its command does not: {said}"
        if block.info != "sh run":
            continue
        said = ""
        for name, *words in commands(block.text):
            arguments = [NANO if word.startswith("Qwen/") else word for word in words]
            if name == "mlx_qwen35.generate" or words[0] == "generate":
                arguments += ["--seed", "0"]
            status, out, err = call(name, *arguments, stdin="What is 2 + 2?\n")
            assert status == 0 and out.strip(), f"{name} {words}: {err}"
            said += out


@pytest.mark.parametrize("document", CURRENT, ids=named)
def test_options_in_commands_exist(document: Path, call: Call):
    inline = re.findall(r"`((?:mlx_qwen35(?:\.\w+)?|python|make|pytest) [^`\n]*)`", document.read_text())
    shells = [block.text for block in blocks(document) if block.info.startswith("sh")]
    for name, *arguments in (words for text in [*shells, *inline] for words in commands(text)):
        if name in SCRIPTS:
            _parses(call, name, arguments)
        elif name == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), arguments
        elif name == "pytest":
            assert (ROOT / arguments[0]).exists(), arguments
        elif name == "python":
            _source_has_options(arguments)
        else:
            assert name in OTHERS or (name == "cd" and arguments == ["mlx_qwen35"]), name


def _parses(call: Call, name: str, arguments: list[str]) -> None:
    """argparse stops at --help behind them, after their values are parsed; what it does not know is not in its help."""
    status, text, err = call(name, *arguments, "--help")
    assert status == 0, err
    for option in (word for word in arguments if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{name} has no {option}"


def _source_has_options(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        _, module, *rest = arguments
        if module.startswith("mlx_qwen35."):
            return
        source = "".join(path.read_text() for path in (ROOT / module.replace(".", "/")).glob("*.py"))
    else:
        file, *rest = arguments
        source = (ROOT / file).read_text()
    assert source
    for option in (word for word in rest if word.startswith("-")):
        assert f'"{option}"' in source, f"{arguments} has no {option}"


# --- python ----------------------------------------------------------------------------------------------------------


SERVED = "http://127.0.0.1:8080"  # in a document; the test's server is elsewhere


@pytest.mark.parametrize("document", having("python"), ids=named)
def test_python_runs_from_the_first_block_to_the_last(document: Path, folder: Path, capsys):
    names: dict[str, Any] = {"__name__": "document"}
    texts = [block.text for block in blocks(document) if block.info == "python"]
    with serving() if SERVED in "".join(texts) else nullcontext() as server:
        for text in texts:
            text = text.replace(SERVED, server.url) if server else text
            exec(compile(text, document.name, "exec"), names)
        for name in {"client", "claude"} & set(names):  # whose connections a document leaves to the end of the program
            names[name].close()
    said = capsys.readouterr().out
    assert said.strip()
    if server:
        assert said == "92\n4\nA red circle and a blue square.\n92\n"


# --- links, sizes, tables --------------------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(document: Path) -> Iterator[tuple[Path, str]]:
    """Relative ones: the file, and the heading or nothing."""
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", document.read_text()):
        name, _, anchor = "".join(target).partition("#")
        if ":" not in name:
            yield (document.parent / name if name else document), anchor


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_to_files_and_headings(document: Path):
    for file, anchor in links(document):
        assert file.exists(), f"{document.name} names {file}"
        assert not anchor or anchor in anchors(file), f"{file.name} has no heading #{anchor}"


@pytest.mark.parametrize("document", CURRENT, ids=named)
def test_files_that_are_named_exist(document: Path):
    for name in re.findall(r"`([\w/]+/|[\w./]+\.(?:py|metal|md|lock))`", document.read_text()):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "mlx_qwen35")), f"{document.name}: {name}"


def test_every_page_is_reached_from_the_readme():
    reached, left = set(), [ROOT / "README.md"]
    while left:
        document = left.pop()
        if document.suffix == ".md" and document not in reached:
            reached.add(document)
            left += [file.resolve() for file, _ in links(document)]
    assert set(DOCUMENTS) <= reached


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_the_table_of_models_is_what_the_plan_computes():
    table = runpy.run_path(str(ROOT / "tests/docs/which_model.py"))["table"]()
    assert "\n".join(table) in (ROOT / "README.md").read_text(), "\n".join(table)


def test_every_error_has_its_cause_and_what_to_do():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert [(code, cause) for code, cause, _ in rows] == list(CODES.items())
    assert all(len(what_to_do) > 10 for *_, what_to_do in rows)


@pytest.mark.parametrize("name", ["options.md", "server.md"])
def test_the_table_of_options_is_what_the_code_declares(name: str):
    """`python tests/docs/options_table.py` renews it."""
    made, path = runpy.run_path(str(ROOT / "tests/docs/options_table.py")), ROOT / "docs" / name
    assert path.read_text() == made["page"](path), f"renew docs/{name}: python tests/docs/options_table.py"
