"""A conversation that outlives its process: this one asks, and another one goes on from the file."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_qwen35 import Session, load


def ask(model: str, file: str, question: str) -> None:
    with Session.load(file, *load(model), enable_thinking=False) as session:
        turn = session.conversation.send(question)
        print(f">> {question}\n{turn.text}")
        print(f"   ({turn.reused} of {turn.total} prompt tokens were in the file)")
        session.save()


if len(sys.argv) == 4:
    ask(*sys.argv[1:])
else:
    name = sys.argv[1] if len(sys.argv) > 1 else "nano"
    with TemporaryDirectory() as folder:
        talk = str(Path(folder) / "talk")
        ask(name, talk, "What is 34 + 58?")
        other = [sys.executable, __file__, name, talk, "Add 10 to that."]
        print(subprocess.run(other, check=True, capture_output=True, text=True).stdout)
