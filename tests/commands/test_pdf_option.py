"""--pdf and --pages of mlx_qwen35.generate."""

import sys
from pathlib import Path

import numpy as np
import pytest
from pdfs import draws, locked, photographed
from PIL import Image

from mlx_qwen35.commands import generate

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
SHAPES, TRIANGLE = (np.array(Image.open(PICTURES / f"{name}.png").convert("RGB")) for name in ("shapes", "triangle"))
pytestmark = draws


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "a.pdf"
    path.write_bytes(photographed(TRIANGLE, SHAPES, TRIANGLE))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    def command(*arguments: object, model: str = "nano") -> tuple[int, str, str]:
        given = ["--model", model, "--prompt", "What do you see?", "--no-enable-thinking", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["mlx_qwen35.generate", *given])
        with pytest.raises(SystemExit) as ended:
            generate.main()
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out.strip(), out.err

    return command


def test_the_chosen_pages_are_shown_and_told(run, file):
    status, out, err = run("--pdf", file, "--pages", "2")
    assert (status, out) == (0, "A red circle and a blue square.")
    assert "page 2 of a.pdf: 64x64 at 36 dpi, 4 tokens\n" in err
    both = ("--pdf", file, "--image", PICTURES / "shapes.png", "--pdf", file)
    _, _, err = run(*both, "--pages", "1-2", "--max-tokens", 1)
    told = [line for line in err.splitlines() if "64x64" in line]
    pages = "pages 1-2 of a.pdf: 64x64 at 36 dpi, 4 tokens each"
    assert told == [pages, "image 1: 256x256 resized to 64x64, 4 tokens", pages]


def test_pages_are_read_into_a_session(run, file, tmp_path):
    session = tmp_path / "a.session"
    status, out, _ = run("--pdf", file, "--pages", "2", "--session", session)
    assert (status, out) == (0, "A red circle and a blue square.")
    file.unlink()
    status, _, err = run("--session", session, "--max-tokens", 1)
    assert status == 0 and "read before" in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--pdf", "FILE", "--pages", "2-9"), "pages_invalid"),
        (("--pdf", "FILE", "--pages", "two"), "option_invalid"),
        (("--pages", "1"), "option_no_effect"),
        (("--pages", "1", "--image", PICTURES / "shapes.png"), "option_no_effect"),
        (("--pages", "1", "--session", "SESSION"), "option_no_effect"),
        (("--pdf", "/no/such.pdf"), "media_not_found"),
        (("--pdf", "LOCKED"), "document_locked"),
        (("--pdf", PICTURES / "shapes.png"), "media_not_opened"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_the_model_is_loaded(run, file, tmp_path, arguments, code):
    (tmp_path / "locked.pdf").write_bytes(locked())
    names = {"FILE": file, "LOCKED": tmp_path / "locked.pdf", "SESSION": tmp_path / "a.session"}
    status, out, err = run(*(names.get(name, name) for name in arguments), model="/no/such/model")
    assert (status, out) == (2, "") and f"[{code}]" in err
