"""Lists of names and numbers: looking a number up, at once or a turn later; and repeating words."""

from collections.abc import Callable
from random import Random

from tasks.items import Context, Task, Turn, again, empty, user_message, vary
from tasks.names import NAMES, any_place, made_up_name

LIST_OPENINGS = ("Here is a list: {}. ", "The list: {}. ", "List: {}. ", "My numbers: {}. ", "{}. ")
LIST_QUESTIONS = (
    "What is the number of {}?",
    "What is the number of {}?",
    "Which number has {}?",
    "What is the value of {}?",
    "What number does {} have?",
    "And {}?",
)
LIST_NOTES = ("Remember this: {}.", "Please remember: {}.", "Remember this list: {}.", "Note this: {}.")
LIST_LATER = ("Which number did I give for {}?", "What number did I give for {}?", "What was the number of {}?")


def _table(rng: Random, easy: bool) -> dict[str, int]:
    return {name: rng.randint(10, 99) for name in rng.sample(NAMES, rng.randint(2, 4 if easy else 8))}


def _rows(table: dict[str, int]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in table.items())


def _list(rng: Random, easy: bool) -> Context:
    table = _table(rng, easy)
    opening = rng.choice(LIST_OPENINGS[:-1]) if rng.random() < 0.9 else "Look: {}. "
    return Context(table, intro=(opening.format(" " + _rows(table)).replace(":  ", ": "),))


def _list_before(rng: Random, easy: bool) -> Context:
    table = _table(rng, easy)
    note = user_message([rng.choice(LIST_NOTES).format(_rows(table))])
    return Context(table, history=(note, {"role": "assistant", "content": "OK."}))


def _look_up(questions: tuple[str, ...]) -> Callable[[Random, Context], Turn]:
    def ask(rng: Random, context: Context) -> Turn:
        name = rng.choice(list(context.data))
        value = context.data[name]
        # names stay behind a blank and in lower case, as in the list: the model looks tokens up, not spellings
        question = vary(rng, rng.choice(questions).format(name))
        return Turn(question, f"The list says {name}: {value}.", str(value), f"recall:{_rows(context.data)}:{name}")

    return ask


def _recall_again(rng: Random, context: Context, turn: Turn) -> Turn:
    """Mostly another value, now and then the whole list: copying is what looking up is made of."""
    if rng.random() < 0.1:
        return Turn("Repeat the list.", "I repeat the list.", _rows(context.data), "")
    return _recall_later(rng, context)


REPEAT_QUESTIONS = ("Repeat: {}", "Repeat after me: {}", "Say: {}", "Copy this: {}", "Repeat this: {}")


def _repeat(rng: Random, context: Context) -> Turn:
    kind = rng.choice(("names", "words", "places", "numbers", "list"))
    n = rng.randint(1, 5)
    if kind == "list":
        text = _rows(_table(rng, True))
    elif kind == "numbers":
        text = " ".join(str(rng.randint(10, 99)) for _ in range(n))
    elif kind == "names":
        text = " ".join(rng.choice(NAMES) for _ in range(n))
    elif kind == "places":
        text = " ".join(any_place(rng) for _ in range(n))
    else:
        text = " ".join(made_up_name(rng).lower() for _ in range(n))
    return Turn(rng.choice(REPEAT_QUESTIONS).format(text), "I repeat it.", text, f"repeat:{text}")


_recall = _look_up(LIST_QUESTIONS)


_recall_later = _look_up(LIST_LATER + LIST_QUESTIONS[:1])

REPEAT = Task("repeat", empty, _repeat, again(_repeat))
RECALL = Task("recall", _list, _recall, _recall_again)
THEN_RECALL = Task("then_recall", _list_before, _recall_later, _recall_again)
