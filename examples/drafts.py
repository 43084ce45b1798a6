"""Drafts on this machine: speed and accepted tokens with the draft head off, chosen by itself, and at depths 1 to 3."""

import argparse
from statistics import median

from mlx_qwen35 import Result, generate, load
from mlx_qwen35.console.table import align
from mlx_qwen35.engine.drafts.speculate import head_record

QUESTIONS = ("What is 34 + 58?", "What is 126 + 347?", "Who are you?", "Hello!")  # that nano knows too
MODES = {
    "off": {"mtp": "off"}, "auto": {"mtp": "auto"}, **{f"depth {n}": {"mtp": "on", "mtp_depth": n} for n in (1, 2, 3)}
}  # fmt: skip

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="nano")
parser.add_argument("--ask", action="append", help="a question, repeatable; without any, four that nano can answer")
parser.add_argument("--temp", type=float, default=0.0, help="temperature (0, which is greedy)")
parser.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer (512)")
parser.add_argument("--past-end", action="store_true", help="go on past the end of an answer, to --max-tokens")
parser.add_argument("--rounds", type=int, default=1, help="every mode in turn, so many times (1)")
args = parser.parse_args()

model, processor = load(args.model)
if args.past_end:
    processor.stop_ids = frozenset()
prompts = [list(processor.encode_messages([{"role": "user", "content": ask}]).tokens) for ask in args.ask or QUESTIONS]


def answers(options: dict) -> list[Result]:
    head_record(model.mtp).costs.clear()  # auto begins without what former answers have measured
    common = {"temp": args.temp, "seed": 0, "max_tokens": args.max_tokens}
    return [generate(model, processor, prompt, **common, **options) for prompt in prompts]


def seconds(results: list[Result]) -> float:
    """Of decoding, from the first token of each answer to its last."""
    return sum((len(r.tokens) - 1) / r.generation_tps for r in results if len(r.tokens) > 1)


rounds = []
for number in range(args.rounds):
    order = list(MODES) if number % 2 == 0 else list(reversed(MODES))
    rounds.append({name: answers(MODES[name]) for name in order})

table = [("mode", "tokens", "rows, to off", "tokens a step", "accepted", "tokens/s", "time, to off", "text")]
for name in MODES:
    own, off = [found[name] for found in rounds], [found["off"] for found in rounds]
    tokens = sum(len(r.tokens) - 1 for r in own[-1])  # the first of each comes from the prompt
    steps = sum(r.mtp.steps or len(r.tokens) - 1 for r in own[-1])
    drafted, accepted = (sum(getattr(r.mtp, count) for r in own[-1]) for count in ("drafted", "accepted"))
    same = all([r.tokens for r in a] == [r.tokens for r in b] for a, b in zip(own, off, strict=True))
    table.append((
        name, str(tokens), f"{(steps + drafted) / tokens:.3f}x", f"{tokens / steps:.2f}", f"{accepted} of {drafted}",
        f"{tokens / median(map(seconds, own)):.1f}",
        f"{median(seconds(a) / seconds(b) for a, b in zip(own, off, strict=True)):.2f}x", "same" if same else "DIFFERS",
    ))  # fmt: skip
print("\n".join(align(table)))
print(f"medians of {args.rounds} rounds; rows are what the model computes behind the prompt")
