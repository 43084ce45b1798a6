"""How probable texts are: log-probabilities of a generated answer, of given answers, of a whole text."""

import sys

from mlx_qwen35 import generate, load, score

model, processor = load(sys.argv[1] if len(sys.argv) > 1 else "nano")
question = [{"role": "user", "content": "What is 34 + 58?"}]

answer = generate(model, processor, messages=question, enable_thinking=False, temp=0, logprobs=True, top_logprobs=2)
for told in answer.logprobs:
    instead = [f"{other.text!r} {other.logprob:.4f}" for other in told.top if other.token != told.token]
    print(f"{told.text!r:16} {told.logprob:9.4f}, before {instead[0]}")

prompt = processor.render(question, enable_thinking=False)
for given in ("92", "82", "I do not know."):
    found = score(model, processor, prompt, given)
    print(f"{given!r:16} {found.sum:9.4f}, greedy: {found.is_greedy}")

whole = score(model, processor, prompt + "92<|im_end|>")
print(f"prompt and answer: {len(whole.tokens)} tokens, perplexity {whole.perplexity:.1f}")
