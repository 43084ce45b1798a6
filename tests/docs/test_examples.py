"""The examples run, and say what nano answers."""

import runpy
import sys
from pathlib import Path

import pytest
from pdfs import draws

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))


SAID = {  # what nano's answers hold
    "agent": "It is 20:30 in Tokyo.",
    "ask": "answer:   92", "batch": "What is 12 + 30? -> 42", "clip": "\nright\n", "compare": "the same? no ",
    "conversation": "\n102\n", "describe": "A red circle and a blue square.", "digits": "47\n",
    "document": "A yellow square and a purple circle.", "drafts": "1.158x",
    "first_draft": "100.0%", "image_memory": "video 64x64, 4 frames", "logits": "4",
    "parallel": "each with the tokens that it gets alone",
    "reuse": "112   (prompt 56 tokens, 30 of them reused)",
    "rows": "mlx_qwen35", "score": "'92'               -0.0555, greedy: True", "second_turn": "green ",
    "serve": "the server answers: 92", "serve_apis": "/v1/responses         92", "serve_load": "nothing was wrong",
    "session": "\n102\n   (15 of", "stream": "nano",
    "two_adapters": "base: 92\nfirst: ",
}  # fmt: skip
QUICK = {  # what measures, with less to do
    "drafts": ["--ask", "What is 34 + 58?", "--max-tokens", "20"],
    "first_draft": ["--tokens", "8"],
    "rows": ["--rows", "2", "--lengths", "5", "9", "--decode", "4", "--programs", "mlx_qwen35"],
    "serve_load": ["--minutes", "0.1", "--clients", "4"],
    "image_memory": ["--megapixels", "0.01", "--frames", "4", "--video-side", "64"],
}


LONG = {
    "serve_load.py", "serve_apis.py", "first_draft.py", "parallel.py", "drafts.py", "rows.py", "image_memory.py",
    "logits.py",
}  # fmt: skip
MARKS = {**dict.fromkeys(LONG, pytest.mark.full), "document.py": draws}


@pytest.mark.core(9)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS[name]) if name in MARKS else name for name in EXAMPLES]
)
def test_example(name: str, monkeypatch, capsys):
    source = (FOLDER / name).read_text()
    assert source.startswith('"""') and len(source.splitlines()[0]) > 20, "its first line says what it shows"
    monkeypatch.setattr(sys, "argv", [name, *QUICK.get(name.removesuffix(".py"), [])])
    monkeypatch.syspath_prepend(FOLDER)
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert SAID[name.removesuffix(".py")] in capsys.readouterr().out


@draws
def test_a_document_is_read_on_from_where_it_was_left(monkeypatch, capsys, tmp_path):
    out = tmp_path / "a.md"
    made = ["document.py", "nano", str(FOLDER / "pictures" / "shapes.pdf"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*made, "--pages", "1-2"])
    runpy.run_path(str(FOLDER / "document.py"), run_name="__main__")
    first = out.read_text()
    out.write_text(f"{first}half of a pa")
    monkeypatch.setattr(sys, "argv", made)
    capsys.readouterr()
    runpy.run_path(str(FOLDER / "document.py"), run_name="__main__")
    told = capsys.readouterr().err
    assert "page 3 of 3" in told and "page 2 of 3" not in told
    assert out.read_text().startswith(f"{first}A yellow square and a purple circle.\n")
