"""What goes wrong in a task of lm-eval, in its templates, functions, data or metrics, told with its file and document.

Such a task may run code of its own, which may raise anything; lm-eval, jinja2 and datasets have errors without a place.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.harness_requests import ROLLING

# Methods of lm-eval's tasks that take a document, first or by its name, and run what the task brings.
OF_DOCUMENT = ("fewshot_context", "construct_requests", "process_results", "doc_to_target")


@contextmanager
def of_task(where: str | Callable[[], str], spared: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Errors in the block become an InputError task_invalid that says where. spared: whether one is another's."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if spared():
            raise
        place = where if isinstance(where, str) else where()
        raise InputError("task_invalid", f"{place}: lm-eval cannot use it: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The first cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def name_documents(task: Any, where: str) -> None:
    """Errors of a task name their document from now on. where: its name or file."""
    for name in OF_DOCUMENT:
        setattr(task, name, _named(task, getattr(task, name), where))


def _named(task: Any, method: Callable[..., Any], where: str) -> Callable[..., Any]:
    @wraps(method)
    def called(*given: Any, **named: Any) -> Any:
        document = given[0] if given else named["doc"]
        with of_task(lambda: _place(task, document, where)):
            return method(*given, **named)

    return called


def _place(task: Any, document: Any, where: str) -> str:
    """As lines of answers have it; a few-shot example is none of the questions."""
    numbers = (number for number, own in enumerate(task.eval_docs) if own == document)
    number = next(numbers, None)
    return where if number is None else f"{where}, question {number}"


def check_metrics(task: Any, where: str) -> None:
    """InputError task_invalid for a metric that lm-eval does not know, which it would call all the same."""
    from lm_eval.api.registry import metric_registry

    functions = {} if callable(task.config.process_results) else getattr(task, "_metric_fn_list", {})
    for name, function in functions.items():
        if function is None:
            near = difflib.get_close_matches(name, map(str, metric_registry.keys()), 1)
            raise InputError(
                "task_invalid", f"{where}: lm-eval has no metric {name}" + (f"; near it is {near[0]}" if near else "")
            )


def right_results(task: Any, requests: Sequence[Any]) -> list[Any]:
    """What lm-eval would get from a model that is right, for the requests about one document."""
    return [_right(task, own) for own in requests]


def _right(task: Any, request: Any) -> Any:
    if request.request_type == ROLLING:
        return -1.0
    if request.request_type == "loglikelihood":
        return -1.0, True
    target = task.doc_to_target(request.doc)
    return str(target[0] if isinstance(target, list) and target else target)
