"""Additions: alone, and on top of the sum before."""

from collections.abc import Callable
from random import Random

from tasks.items import Context, Task, Turn, empty, user_message, vary


def column_sums(a: int, b: int) -> str:
    """The written addition from the right, one column a line: 34 + 58 -> `4+8=12`, `3+5+1=9`."""
    x, y = str(a)[::-1], str(b)[::-1]
    lines, carry = [], 0
    for i in range(max(len(x), len(y))):
        digits = [n[i] for n in (x, y) if i < len(n)] + (["1"] if carry else [])
        total = sum(map(int, digits))
        lines.append(f"{'+'.join(digits)}={total}")
        carry = total // 10
    return "\n".join(lines)


ADD_QUESTIONS = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What is {a}+{b}?",
    "{a}+{b}=?",
    "{a} + {b} = ?",
    "{a}+{b}",
    "Add {a} and {b}.",
    "How much is {a} plus {b}?",
    "What is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "Please calculate {a} + {b}.",
)


def _number(rng: Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _addition(digits: int) -> Callable[[Random, Context], Turn]:
    def ask(rng: Random, context: Context) -> Turn:
        a, b = _number(rng, digits), _number(rng, rng.randint(1, digits) if rng.random() < 0.3 else digits)
        if rng.random() < 0.5:
            a, b = b, a
        key = f"add:{a}+{b}" if max(a, b) > 9 else ""
        question = vary(rng, rng.choice(ADD_QUESTIONS).format(a=a, b=b))
        return Turn(question, column_sums(a, b), str(a + b), key)

    return ask


THEN_ADD_QUESTIONS = (
    "Add {c} to that.",
    "Now add {c} to that.",
    "And plus {c}?",
    "Plus {c}?",
    "Add {c} more.",
    "What do you get if you add {c}?",
)


def _sum_before(rng: Random, easy: bool) -> Context:
    digits = 1 if easy else rng.randint(1, 2)
    a, b = _number(rng, digits), _number(rng, digits)
    question = vary(rng, rng.choice(ADD_QUESTIONS).format(a=a, b=b))
    return Context((a, b), history=(user_message([question]), {"role": "assistant", "content": str(a + b)}))


def _then_add(rng: Random, context: Context) -> Turn:
    a, b = context.data
    c = 10 if rng.random() < 0.3 else rng.randint(1, 99) if rng.random() < 0.6 else rng.randint(1, 9)
    question = vary(rng, rng.choice(THEN_ADD_QUESTIONS).format(c=c))
    return Turn(question, f"{a + b}+{c}\n{column_sums(a + b, c)}", str(a + b + c), f"then_add:{a}+{b}+{c}")


ADD_1, ADD_2, ADD_3 = (Task(f"add_{digits}", empty, _addition(digits)) for digits in (1, 2, 3))
THEN_ADD = Task("then_add", _sum_before, _then_add)
