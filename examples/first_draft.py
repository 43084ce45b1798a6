"""How often the draft head's first draft is accepted: hidden state after or before the norm, and by which rule."""

import argparse
import sys
from pathlib import Path

from mlx_qwen35 import generate, load

sys.path.append(str(Path(__file__).parent / "nano"))
from guesses import Text, acceptance

QUESTIONS = (  # that nano knows too
    "What is 34 + 58?", "What is 7 + 5?", "What is 12 + 30?", "What is 126 + 347?", "What is 512 + 289?",
    "Who are you?", "What is your name?", "Hello!",
)  # fmt: skip

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("files", nargs="*", type=Path, help="texts; without any, the model's answers to questions")
parser.add_argument("--model", default="nano", help="a folder, a Hugging Face id or nano")
parser.add_argument("--temp", type=float, default=1.0, help="the temperature of both distributions (1)")
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
