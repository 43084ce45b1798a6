"""Tasks of lm-eval, asked through our engine and kept in our log; lm-eval makes the prompts and judges the answers.

Of a task's own settings `until` holds, for the text behind the reasoning. Its sampling and its most tokens do not: they
were made for models that do not think. The published ones take their place, unless the user gives others.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.asking import NO_ROOM
from mlx_qwen35.evaluate.harness_errors import check_metrics, name_documents, of_task, right_results
from mlx_qwen35.evaluate.harness_requests import ROLLING, Chat, TooLong, asked, quiet
from mlx_qwen35.evaluate.items import Line
from mlx_qwen35.evaluate.published import Named, published_of
from mlx_qwen35.evaluate.run import brief, chosen, keyed
from mlx_qwen35.evaluate.subject import Subject
from mlx_qwen35.evaluate.summary import Outcome, outcome
from mlx_qwen35.evaluate.task import TOO_LONG, Asked, Item, Published

EXAMPLES = 1234  # the seed with which lm-eval's command chooses them
WHOLE = "bits_per_byte"  # what is told of whole texts
Place = tuple[str, int]  # a document: the name of its task in lm-eval, and its number there


class HarnessTask:
    """One task of lm-eval, or a group of them.

    tasks: lm-eval's, by name. version: changes with lm-eval, the tasks and, of a file, its text and data. named: says
    which figure is the score; None: the first metric, behind the last filter. file: the user's own, if it is in one.
    """

    def __init__(
        self, name: str, tasks: Mapping[str, Any], version: str, named: Named | None = None, file: Path | None = None
    ):
        self.name, self.version, self._tasks, self._named = name, version, tasks, named
        self.published: Published | None = named.published if named else None
        self._where = str(file or f"the task {name}")
        for task in tasks.values():
            name_documents(task, self._where)

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

    def answered(self, keys: Iterable[str]) -> set[str]:
        """The items that lines of a log are of: their keys have a digest of the request behind the item's."""
        return {key.rpartition("-")[0] for key in keys}

    def ask(self, item: Item) -> Asked:
        """The first thing that the model is asked about a document."""
        requests = self._requests(item)
        return asked([own for own in requests if own.args[0] == requests[0].args[0]])

    def _requests(self, item: Item) -> list[Any]:
        name, number = item.data
        task = self._tasks[name]
        document, chat = task.eval_docs[number], {"apply_chat_template": True, "chat_template": Chat.of}
        task.set_fewshot_seed(EXAMPLES)
        prompt = task.fewshot_context(
            document, num_fewshot=task.config.num_fewshot or 0, fewshot_as_multiturn=True,
            gen_prefix=task.doc_to_prefix(document), **chat,
        )  # fmt: skip
        made = task.construct_requests(doc=document, ctx=prompt, metadata=(name, number, 1), **chat)
        return made if isinstance(made, list) else [made]

    def expected(self, item: Item) -> str:
        raise AssertionError("lm-eval knows it once it has judged: see run")

    def judge(self, item: Item, answer: str) -> float:
        raise AssertionError("lm-eval judges all answers together: see run")

    def check(self) -> None:
        """Make all that is expected, and judge a right answer to the first question: what would fail behind the last
        question is told before the first. InputError task_invalid, with file and question.
        """
        for task in self._tasks.values():
            check_metrics(task, self._where)
        for item in self.items():
            name, number = item.data
            self._tasks[name].doc_to_target(self._tasks[name].eval_docs[number])
        for name, task in self._tasks.items():
            if callable(task.config.process_results):  # of any form, and not to be had with invented answers
                continue
            first = next(item for item in self.items() if item.data[0] == name)
            with quiet():
                found = task.process_results(task.eval_docs[0], right_results(task, self._requests(first)))
            if task.OUTPUT_TYPE != ROLLING and self._metric(name) not in found:
                raise InputError(
                    "task_invalid",
                    f"{self._where}: lm-eval must have the metric of the score for {task.OUTPUT_TYPE}; it has no "
                    f"{self._metric(name)}",
                )

    def run(self, subject: Subject, items: int | None = None) -> tuple[list[Line], Outcome]:
        """Ask a model. items: how many; None: all. Lines have lm-eval's judgement of their document as their score."""
        places: list[Place] = [item.data for item in chosen(keyed(self), items)]
        found, keys = self._evaluated(subject, places)
        judged: dict[Place, dict[str, Any]] = {
            (name, sample["doc_id"]): self._judged(name, sample)
            for name, samples in found["samples"].items()
            for sample in samples
            if self._metric(name) == WHOLE or sample["filter"] == self._filter(samples)
        }
        metric, first = self._metric(places[0][0]), next(iter(found["results"]))
        unit = metric if metric == WHOLE or found["higher_is_better"][first].get(metric) is False else None
        left_out = {"score": 0.0} | ({"weight": 0.0} if unit else {})
        more = {key: judged.get(place, left_out) for place in places for key in keys[place]}
        log = subject.folder.log(self.name)
        told = {line["key"]: line for line in log.arrange([*more], more)}
        lines = [_merged([told[key] for key in keys[place]]) for place in places]
        own = outcome(
            lines, log.seconds, self.version, subject.settings(self, items),
            published_of(self.published, subject.checkpoint.config.text),
        )  # fmt: skip
        return lines, self._told(own, found, unit)

    def _evaluated(self, subject: Subject, places: Sequence[Place]) -> tuple[Any, dict[Place, list[str]]]:
        """What lm-eval finds of the documents that the context has room for; and the keys of all in the log."""
        from lm_eval.evaluator import evaluate

        from mlx_qwen35.evaluate.harness_model import Harness

        keys: dict[Place, list[str]] = {}
        left = list(places)
        while left:
            numbers = {name: [number for own, number in left if own == name] for name in self._tasks}
            tasks = {name: self._tasks[name] for name, own in numbers.items() if own}
            for task in tasks.values():
                task.set_fewshot_seed(EXAMPLES)
            lm = Harness(subject, self.name, numbers, len(self._tasks) > 1)
            try:
                with quiet(), of_task(self._where, lambda: lm.asking):  # noqa: B023 - it is called within the turn
                    return evaluate(
                        lm, {"tasks": tasks, "groups": {}}, samples={name: numbers[name] for name in tasks},
                        bootstrap_iters=0, apply_chat_template=True, fewshot_as_multiturn=True,
                    ), keys | lm.keys  # fmt: skip
            except TooLong as found:  # what was answered stands in the log
                keys |= lm.keys
                left = [place for place in left if place not in found.places]
        raise InputError(NO_ROOM, f"{self._where}: the model's context has room for none of the questions")

    def _metric(self, name: str) -> str:
        """Of the score of a task."""
        if self._named:
            return self._named.metric
        task = self._tasks[name]
        return WHOLE if task.OUTPUT_TYPE == ROLLING else str(next(iter(task.aggregation())))

    def _filter(self, samples: Sequence[Mapping[str, Any]]) -> str:
        return self._named.filter if self._named else str(samples[-1]["filter"])

    def _judged(self, name: str, sample: Mapping[str, Any]) -> dict[str, Any]:
        """What joins the line of a document: score, and weight of a whole text, its bytes, or what is expected."""
        metric, target = self._metric(name), sample["target"]
        if metric == WHOLE:
            told = sample.get(WHOLE)
            total, size = told or (sample["filtered_resps"][0], len(target.encode()))
            return {"score": -total / size / math.log(2), "weight": size}
        if isinstance(target, int) and len(sample["arguments"]) > target:  # the number of a choice
            target = sample["arguments"][target][1]
        right = brief([*map(str, target)] if isinstance(target, list) else str(target))
        mean_of = self._tasks[name].aggregation()[metric]
        return {"score": float(mean_of([sample[metric]])), "expected": right}

    def _told(self, own: Outcome, found: Mapping[str, Any], unit: str | None) -> Outcome:
        """With lm-eval's own figures, of the documents that were asked. unit: of a score of which less is better."""
        first, samples = next(iter(found["samples"].items()))
        figures = {
            name: {key: value for key, value in told.items() if "," in key and isinstance(value, int | float)}
            for name, told in found["results"].items()
        }
        more: dict[str, Any] = {"metric": f"{self._metric(first)},{self._filter(samples)}", "metrics": figures}
        more |= {"unit": unit} if unit else {}
        score, error = own.score, own.standard_error
        if len(figures) == 1 and (whole := figures[first].get(more["metric"])) is not None:
            whole *= 1 if unit else (own.n - own.too_long) / own.n
            if not math.isclose(score, whole):
                score, error = whole, None  # no mean of its documents, so that their errors say nothing of it
        packages = {name: version(name) for name in ("lm_eval", "datasets")}
        return replace(own, score=score, standard_error=error, versions={**own.versions, **packages}, more=more)


def _merged(lines: Sequence[Line]) -> Line:
    """One line for a document that was asked about several times."""
    counts = {
        name: sum(line.get(name, 0) for line in lines)
        for name in ("tokens", "prompt_tokens", "image_tokens", "cut_at_limit")
    }
    long = {"finish_reason": TOO_LONG} if any(line["finish_reason"] == TOO_LONG for line in lines) else {}
    return {**lines[0], **counts, "cut_at_limit": bool(counts["cut_at_limit"]), **long}
