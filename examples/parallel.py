"""Requests that join and leave a running batch; each gets the text that it gets alone.

An engine runs any number of requests on one model. `step` gives each running one a token, and prefills a chunk of a
prompt that waits. Here a request comes every few steps, one is cancelled, and one shows an image.
"""

import sys
from pathlib import Path

from mlx_qwen35 import generate, load
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.generation import request

PICTURE = Path(__file__).parent / "pictures" / "shapes.png"
ARRIVALS = {
    0: {"prompt": "What is 34 + 58?", "seed": 1},
    3: {"prompt": "Who are you?", "temp": 0},
    5: {"prompt": "What do you see?", "images": [PICTURE], "seed": 2},
    8: {"prompt": "What is 3 + 4?", "seed": 3, "mtp": "on"},
    12: {"prompt": "What is 7 + 5?", "seed": 4},
}
CANCELLED = "What is 7 + 5?"  # after six tokens

model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
engine, running, step = Engine(model, interleave=True), {}, 0
while not engine.idle or step <= max(ARRIVALS):
    if step in ARRIVALS:
        made = request(model, processor, **ARRIVALS[step])
        running[made] = ARRIVALS[step]
        engine.add(made)
        print(f"step {step:3}: {ARRIVALS[step]['prompt']} joins")
    for made in engine.step():
        if running[made]["prompt"] == CANCELLED and len(made.tokens) == 6:
            engine.cancel(made)
        if made.finished:
            print(f"step {step:3}: {running[made]['prompt']} leaves ({made.finish_reason}): {made.result()}")
    step += 1
for made, options in running.items():
    alone = generate(model, processor, **options)
    assert made.result().tokens == alone.tokens[: len(made.tokens)], options
print(f"{len(running)} requests in {step} steps, each with the tokens that it gets alone.")
