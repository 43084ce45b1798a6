"""Call the network itself, as in mlx-lm: tokens in, logits out, with a cache that can be returned to."""

import sys

import mlx.core as mx

from mlx_qwen35 import load

model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
tokens = mx.array([processor.encode_text("What is 2 + 2?").tokens])
cache = model.make_cache()
logits = model(tokens, cache=cache)  # (1, T, V)
print("logits", logits.shape, "most likely next:", repr(processor.decode([logits[0, -1].argmax().item()])))

place = cache.snapshot()  # costs references, not copies
once = model(mx.array([[5, 6, 7]]), cache=cache)
cache.restore(place)
again = model(mx.array([[5, 6, 7]]), cache=cache)
print("the same after going back:", mx.array_equal(once, again).item())
print(f"{cache.length} tokens in {cache.nbytes / 1e6:.2f} MB:", ", ".join(list(cache.arrays())[:3]), "...")
