"""The commands of mlx_qwen35.chat as they are typed on a terminal."""

from pathlib import Path

import pytest
from terminal import Terminal, needs_tmux, ours

SHAPES = str(Path(__file__).parents[2] / "examples" / "pictures" / "shapes.png")
ASK, OTHER, FIGURES = "What is 34 + 58?", "Who are you?", " tokens/s"

pytestmark = [needs_tmux, pytest.mark.full]


@pytest.mark.parametrize("columns", [80, 40])
def test_an_edit_a_drop_an_option_and_a_session(tmp_path, columns):
    command = ours("mlx_qwen35.chat", "--model", "nano", "--temp", "0", "--no-enable-thinking")
    with Terminal(command, tmp_path, (columns, 24)) as terminal:
        terminal.wait(">>> ")
        terminal.type(ASK)
        terminal.wait(FIGURES)
        terminal.type("/edit")
        terminal.wait(f">>> {ASK}", count=2)  # the message is in the input
        terminal.keys("C-c")
        terminal.wait("the message stays")
        terminal.type("/edit")
        terminal.wait(f">>> {ASK}", count=2)
        terminal.keys("C-a", "C-k")
        terminal.type(OTHER)
        terminal.wait(FIGURES, count=2)
        terminal.type("/undo")
        terminal.wait(f'took back "{OTHER}"')  # it stands where the first question was
        terminal.paste(f"{SHAPES} ")
        terminal.keys("Enter")
        terminal.wait("with 1 image")
        terminal.type("What do you see?")
        terminal.wait("red circle")
        terminal.type("/set temper", enter=False)
        terminal.keys("BSpace", "BSpace", "BSpace")
        terminal.wait("/set tem")
        terminal.type("p 0.5")
        terminal.wait("temp: 0.5")
        terminal.type("/save talk")
        terminal.wait("saved")
        terminal.type("/exit")
        assert terminal.ended() == 0
    assert (tmp_path / "talk").exists()
