"""A cache that is saved at any step goes on in another process with the tokens that it would have had."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from engine.going_on import never_ending, save

from mlx_qwen35 import batch_generate, generate, load

PICTURE = str(Path(__file__).parents[2] / "examples" / "pictures" / "shapes.png")
KINDS = {
    "text": {"mtp": "off"},
    "image": {"images": [PICTURE], "mtp": "off"},
    "drafts": {"mtp": "on"},
    "image and drafts": {"images": [PICTURE], "mtp": "on"},
}


SAMPLING = {"temp": 1.0, "top_k": 20, "top_p": 0.95, "presence_penalty": 0.0}  # penalties count an answer's tokens
EACH = ["row of a batch", *reversed(KINDS)]


FULL = [pytest.param(20, 64, bits, marks=pytest.mark.full) for bits in (None, "8")]


@pytest.mark.parametrize(("times", "tokens", "bits"), [(2, 6, None), *FULL])
def test_a_cache_saved_at_any_step_goes_on_in_another_process(tmp_path, times, tokens, bits):
    model, processor = load("nano", kv_bits=bits)
    rng, expected = random.Random(times), {}
    for number in range(times):
        kind = EACH[number % len(EACH)]
        steps, options = rng.randrange(1, tokens), SAMPLING | {"seed": number}
        shared = options | {"enable_thinking": bool(number % 2), "logit_bias": never_ending(processor)}
        prompt, own = f"What is {number} + 58?", KINDS.get(kind, {})
        whole = generate(model, processor, prompt, max_tokens=steps + tokens, **shared, **own)
        if own:
            cache = model.make_cache()
            got = generate(model, processor, prompt, cache=cache, max_tokens=steps, **shared, **own)
        else:
            prompts, caches = ["Who are you?", prompt, "Describe a bicycle."], [model.make_cache() for _ in range(3)]
            shared |= {"seed": [7, number, 9], "cache": caches}
            cache, got = caches[1], batch_generate(model, processor, prompts, max_tokens=steps, **shared)[1]
        assert whole.tokens[:steps] == got.tokens
        after = options | {"mtp": own.get("mtp", "off"), "kv_bits": bits, "max_tokens": tokens}
        save(tmp_path / f"{number:02} {kind}", model, cache, got.tokens[-1], after)
        expected[f"{number:02} {kind}"] = list(whole.tokens[steps:])
    command = [sys.executable, str(Path(__file__).with_name("going_on.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout) == expected
    assert {len(after) for after in expected.values()} == {tokens}
