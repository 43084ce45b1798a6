"""Tasks of lm-eval, asked through our engine and kept in our log; lm-eval makes the prompts and judges the answers.

Of a task's own settings `until` holds, for the text behind the reasoning. Its sampling and its most tokens do not: they
were made for models that do not think. The published ones take their place, unless the user gives others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

from mlx_qwen35.evaluate.harness_requests import Chat, asked, quiet
from mlx_qwen35.evaluate.items import Line
from mlx_qwen35.evaluate.published import Named, published_of
from mlx_qwen35.evaluate.run import chosen, keyed
from mlx_qwen35.evaluate.subject import Subject
from mlx_qwen35.evaluate.summary import Outcome, outcome
from mlx_qwen35.evaluate.task import Asked, Item, Published

EXAMPLES = 1234  # the seed with which lm-eval's command chooses them
WHOLE = "bits_per_byte"  # what is told of whole texts


class HarnessTask:
    """One task of lm-eval, or a group of them.

    tasks: lm-eval's, by name. version: changes with lm-eval, the tasks and, of a file, its text and data. named: says
    which figure is the score; None: the first metric, behind the last filter.
    """

    def __init__(self, name: str, tasks: Mapping[str, Any], version: str, named: Named | None = None):
        self.name, self.version, self._tasks, self._named = name, version, tasks, named
        self.published: Published | None = named.published if named else None

    def items(self) -> Sequence[Item]:
        """A document is an item. key: its number, behind its task's name in a group."""
        return self._items

    @cached_property
    def _items(self) -> Sequence[Item]:
        several = len(self._tasks) > 1
        return [
            Item(f"{name}/{number}" if several else str(number), (name, number))
            for name, task in self._tasks.items()
            for number in range(len(task.eval_docs))
        ]

    def ask(self, item: Item) -> Asked:
        """The first thing that the model is asked about a document."""
        name, number = item.data
        task = self._tasks[name]
        document, chat = task.eval_docs[number], {"apply_chat_template": True, "chat_template": Chat.of}
        task.set_fewshot_seed(EXAMPLES)
        prompt = task.fewshot_context(
            document, num_fewshot=task.config.num_fewshot or 0, fewshot_as_multiturn=True,
            gen_prefix=task.doc_to_prefix(document), **chat,
        )  # fmt: skip
        made = task.construct_requests(doc=document, ctx=prompt, metadata=(name, number, 1), **chat)
        requests = made if isinstance(made, list) else [made]
        return asked([own for own in requests if own.args[0] == requests[0].args[0]])

    def judge(self, item: Item, answer: str) -> float:
        raise AssertionError("lm-eval judges all answers together: see run")

    def run(self, subject: Subject, items: int | None = None) -> tuple[list[Line], Outcome]:
        """Ask a model. items: how many; None: all. Lines have lm-eval's judgement of their document as their score."""
        from lm_eval.evaluator import evaluate

        from mlx_qwen35.evaluate.harness_model import Harness

        some = chosen(keyed(self), items)
        numbers = {name: [item.data[1] for item in some if item.data[0] == name] for name in self._tasks}
        tasks = {name: self._tasks[name] for name, own in numbers.items() if own}
        for task in tasks.values():
            task.set_fewshot_seed(EXAMPLES)
        lm = Harness(subject, self.name, numbers, len(self._tasks) > 1)
        with quiet():
            found: Any = evaluate(
                lm, {"tasks": tasks, "groups": {}}, samples={name: numbers[name] for name in tasks}, bootstrap_iters=0,
                apply_chat_template=True, fewshot_as_multiturn=True,
            )  # fmt: skip
        scores = {name: self._scores(name, found["samples"][name]) for name in tasks}
        log = subject.folder.log(self.name)
        judged = {key: scores[task][number] for (task, number), keys in lm.keys.items() for key in keys}
        told = {line["key"]: line for line in log.arrange([*judged], judged)}
        lines = [_merged([told[key] for key in keys]) for keys in lm.keys.values()]
        own = outcome(
            lines, log.seconds, self.version, subject.settings(self, items),
            published_of(self.published, subject.checkpoint.config.text),
        )  # fmt: skip
        return self._told(lines, own, found)

    def _figure(self, name: str, samples: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """Metric and filter of the score of a task."""
        if self._named:
            return self._named.metric, self._named.filter
        metrics = [*self._tasks[name].aggregation()]
        return WHOLE if WHOLE in metrics else metrics[0], samples[-1]["filter"]

    def _scores(self, name: str, samples: Sequence[Mapping[str, Any]]) -> dict[int, float]:
        """Of each document, by number."""
        metric, filtered = self._figure(name, samples)
        mean_of = self._tasks[name].aggregation()[metric]
        own = [sample for sample in samples if sample["filter"] == filtered]
        return {sample["doc_id"]: float(mean_of([sample[metric]])) for sample in own}

    def _told(
        self, lines: list[Line], own: Outcome, found: Mapping[str, Any]
    ) -> tuple[list[Line], Outcome]:
        """With lm-eval's own figures. Lines as a comparison needs them: more is better."""
        metric, filtered = self._figure(next(iter(found["samples"])), next(iter(found["samples"].values())))
        figures = {
            name: {key: value for key, value in told.items() if "," in key and isinstance(value, int | float)}
            for name, told in found["results"].items()
        }
        more: dict[str, Any] = {"metric": f"{metric},{filtered}", "metrics": figures}
        score, error = own.score, own.standard_error
        if len(figures) == 1 and not math.isclose(score, (whole := figures[next(iter(figures))][more["metric"]])):
            score, error = whole, None  # no mean of its documents, so that their errors say nothing of it
        if found["higher_is_better"][next(iter(figures))].get(metric) is False:
            more["unit"] = metric
            lines = [{**line, "score": -line["score"]} for line in lines]
        packages = {name: version(name) for name in ("lm_eval", "datasets")}
        return lines, replace(
            own, score=score, standard_error=error, versions={**own.versions, **packages}, more=more
        )


def _merged(lines: Sequence[Line]) -> Line:
    """One line for a document that was asked about several times."""
    counts = {
        name: sum(line.get(name, 0) for line in lines)
        for name in ("tokens", "prompt_tokens", "image_tokens", "cut_at_limit")
    }
    return {**lines[0], **counts, "cut_at_limit": bool(counts["cut_at_limit"])}
