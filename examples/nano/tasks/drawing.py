"""Drawing items of a task from the training or from the tenth that is held out of it."""

from random import Random

from tasks import calls, clips, figures, itself, lists, needles, numbers, pairs, printed, results, schemas, sums, tools
from tasks.items import Context, Item, Task, Turn, completion, is_held_out, user_message

SYSTEM_PROMPTS = ("You are a helpful assistant.", "Be brief.", "You are nano.", "Answer the question.")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        numbers.ADD_1, numbers.ADD_2, numbers.ADD_3, lists.REPEAT, lists.RECALL,
        figures.DESCRIBE, figures.COUNT, figures.COLOUR, figures.SHAPE,
        pairs.WHICH_PICTURE, pairs.SAME_PICTURES, pairs.NTH_PICTURE, printed.DIGITS, clips.DIRECTION,
        tools.TOOL_CITY, tools.TOOL_NAME, tools.TOOL_REPORT,
        numbers.THEN_ADD, figures.THEN_COLOUR, lists.THEN_RECALL, itself.IDENTITY, itself.GREETING,
    )
}  # fmt: skip
AGENT_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        calls.CHOOSE_TOOL, calls.TYPED_CALL, calls.SEVERAL_CALLS, calls.NO_CALL, results.FROM_RESULTS,
        schemas.JSON_SCHEMA, sums.LONG_SUM, sums.CLOSED_SUM, sums.CLOSED_THOUGHT,
    )
}  # fmt: skip
ALL_TASKS = TASKS | AGENT_TASKS | {needles.NEEDLE.name: needles.NEEDLE}


def _item(task: Task, rng: Random, context: Context, turn: Turn, thinking: bool) -> Item:
    messages = [dict(message) for message in context.history]
    if not thinking:
        for message in messages:
            message.pop("reasoning_content", None)
    if turn.question is not None:
        parts = [*context.intro, turn.question]
        if context.intro and not isinstance(context.intro[0], str) and rng.random() < 0.1:
            parts = [turn.question + " ", *context.intro]
        messages.append(user_message(parts))
    if rng.random() < 0.08 and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    return Item(
        task.name, messages, completion(turn, thinking), turn.answer, thinking, list(context.tools) or None,
        given=turn.given, calls=turn.calls, schema=context.schema, key=turn.key,
    )  # fmt: skip


def draw_lesson(
    task: str | Task,
    rng: Random,
    held_out: bool = False,
    thinking: bool | None = None,
    easy: bool = False,
    more: int = 0,
) -> tuple[Item, list[Turn]]:
    """An item of `task` and up to `more` further questions on the same list, picture or tools.

    `thinking`: None leaves it to the dice. `easy`: short lists, one figure. All turns come from the asked split.
    """
    chosen = ALL_TASKS[task] if isinstance(task, str) else task
    if thinking is None:
        thinking = rng.random() < 0.5 if len(chosen.modes) == 2 else chosen.modes[0]
    assert thinking in chosen.modes, f"{chosen.name} has no items with thinking={thinking}"
    while True:
        context = chosen.context(rng, easy)
        turn = chosen.ask(rng, context)
        if turn.key == "" or is_held_out(turn.key) == held_out:
            break
    item = _item(chosen, rng, context, turn, thinking)
    turns: list[Turn] = []
    for _ in range(more if chosen.again else 0):
        turn = chosen.again(rng, context, turn)
        if is_held_out(turn.key) != held_out and turn.key:
            break
        turns.append(turn)
    return item, turns


def draw(task: str | Task, rng: Random, held_out: bool = True, thinking: bool | None = None) -> Item:
    """One item of `task`: by default from the tenth that training never saw.

    All one-digit sums, greetings and questions about the model itself are trained, so these draw from one common pool.
    """
    return draw_lesson(task, rng, held_out, thinking)[0]


def items_of(task: str, thinking: bool, count: int, seed: int) -> list[Item]:
    """The first `count` held-out items that the evaluation of this task, mode and seed is about."""
    return [draw(task, Random(f"{seed} {task} {thinking} {i}"), thinking=thinking) for i in range(count)]
