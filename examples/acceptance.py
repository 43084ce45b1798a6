"""How often the draft head's first guess is accepted: hidden state after or before the norm, and by which rule."""

import argparse
from pathlib import Path

from mlx_qwen35 import generate, load
from mlx_qwen35.bench.acceptance import QUESTIONS, Text, acceptance

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("files", nargs="*", type=Path, help="texts; without any, the model's answers to questions")
parser.add_argument("--model", default="nano")
parser.add_argument("--temp", type=float, default=1.0)
parser.add_argument("--tokens", type=int, default=1024, help="of each text, at most (1024)")
args = parser.parse_args()

model, processor = load(args.model)
texts = [Text(processor.encode_text(file.read_text(encoding="utf-8-sig")).tokens[: args.tokens]) for file in args.files]
for question in QUESTIONS if not texts else ():
    prompt = processor.encode_messages([{"role": "user", "content": question}]).tokens
    answer = generate(model, processor, list(prompt), temp=0, mtp="off", max_tokens=args.tokens).tokens
    texts.append(Text((*prompt, *answer), len(prompt)))

print(f"temperature {args.temp:g}     tokens  greedy  coupled  classical   tokens a step, each")
for name, before_norm in (("after norm", False), ("before norm", True)):
    found = acceptance(model, texts, args.temp, range(8), processor.vocabulary, before_norm)
    shares = (found.greedy, found.coupled, found.classical)
    cells = "  ".join(f"{100 * share:{width}.1f}%" for share, width in zip(shares, (5, 6, 8), strict=True))
    print(f"{name:14} {found.tokens:6}  {cells}   " + ", ".join(f"{1 + share:.2f}" for share in shares))
print("coupled: same noise for draft and target, as here, over 8 seeds. classical: rejection sampling, its expectation")
