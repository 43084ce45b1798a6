"""Tasks of lm-eval, asked through our engine and kept in our log; lm-eval makes the prompts and judges the answers.

Of a task's own settings `until` holds, for the text behind the reasoning. Its sampling and its most tokens do not: they
were made for models that do not think. The published ones take their place, unless the user gives others.
"""

import difflib
import hashlib
import importlib.util
import json
import logging
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.items import Line
from mlx_qwen35.evaluate.published import NAMED, Named, published_of
from mlx_qwen35.evaluate.run import chosen, keyed
from mlx_qwen35.evaluate.subject import Subject
from mlx_qwen35.evaluate.summary import Outcome, outcome
from mlx_qwen35.evaluate.task import Asked, Item, Published

PACKAGE, INSTALL = "lm_eval", "pip install 'mlx-qwen35[eval]'"
OF_FILE = re.compile(r"^(dataset_path|output_type|include|group|custom_dataset|class)\s*:", re.MULTILINE)
SEED, OTHER_SEED = 0, 1234  # with which lm-eval's command chooses examples and orders choices
LOCAL = ("json", "csv", "text", "parquet")  # the `datasets` library's names of files of these kinds
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
        from mlx_qwen35.evaluate.harness_model import Chat, asked

        name, number = item.data
        task = self._tasks[name]
        document, chat = task.eval_docs[number], {"apply_chat_template": True, "chat_template": Chat.of}
        task.set_fewshot_seed(OTHER_SEED)
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

        from mlx_qwen35.evaluate.harness_model import Harness, quiet

        some = chosen(keyed(self), items)
        numbers = {name: [item.data[1] for item in some if item.data[0] == name] for name in self._tasks}
        tasks = {name: self._tasks[name] for name, own in numbers.items() if own}
        for task in tasks.values():
            task.set_fewshot_seed(OTHER_SEED)
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


# --- which task -------------------------------------------------------------------------------------------------------


def is_of_harness(file: Path) -> bool:
    """Whether a file of a task is lm-eval's, and not one of ours."""
    try:
        return OF_FILE.search(file.expanduser().read_text(encoding="utf-8")) is not None
    except (OSError, ValueError):
        return False


def find_task(name: str) -> HarnessTask:
    """A task by its name here or in lm-eval, or by a file of its form, whose relative data_files stand beside it.

    Raises InputError: package_missing, task_unknown, task_invalid; hub_failed where its data cannot be had.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise InputError(
            "package_missing",
            f"the task {name} needs lm-eval, whose tasks are not installed: {INSTALL}. Without it there are kl, nano, "
            "sets of image questions (mmmu=FOLDER) and tasks of your own, FILE.yaml",
        )
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    if Path(name).suffix:
        return _of_file(Path(name).expanduser())
    named = NAMED.get(name)
    tasks = _loaded(name, _manager(named), named.task if named else name)
    told = "; ".join(f"{own} {task.VERSION}" for own, task in tasks.items())
    return HarnessTask(name, tasks, f"lm-eval {version(PACKAGE)}: {told}", named)


def _manager(named: Named | None) -> Any:
    """Looks through lm-eval's files of tasks, all of which take ten seconds."""
    from lm_eval import tasks

    if named is None:
        return tasks.TaskManager()
    return tasks.TaskManager(include_defaults=False, include_path=str(Path(tasks.__file__).parent / named.folder))


def _of_file(file: Path) -> HarnessTask:
    import yaml
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        spec = load_yaml(file)
    except (OSError, ValueError, ImportError, AttributeError, yaml.YAMLError) as error:
        raise InputError("task_invalid", f"{file} must be a task of lm-eval: {error}") from error
    data = _beside(file.parent, spec)
    written = json.dumps(load_yaml(file, resolve_func=False), sort_keys=True, default=str)  # with what it includes
    digest = hashlib.sha256(written.replace(str(file.parent.resolve()), "").encode())
    for path in [*data, *(sorted(file.parent.glob("*.py")) if "!function" in file.read_text() else ())]:
        digest.update(path.read_bytes())
    name = str(spec.get("task" if isinstance(spec.get("task"), str) else "group", file.stem))
    tasks = _loaded(name, TaskManager(include_defaults=False), spec if data else str(file))
    return HarnessTask(name, tasks, f"lm-eval {version(PACKAGE)}: {digest.hexdigest()[:12]}")


def _beside(folder: Path, spec: Mapping[str, Any]) -> list[Path]:
    """The local files of a task's data, whose paths become whole ones."""
    own, found = spec.get("dataset_kwargs"), list[Path]()

    def whole(value: Any) -> Any:  # addresses and patterns stay as they are
        if isinstance(value, Mapping):
            return {name: whole(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [whole(inner) for inner in value]
        if not isinstance(value, str) or "://" in value or set(value) & set("*?["):
            return value
        if not (folder / value).is_file():
            if spec.get("dataset_path") not in LOCAL:
                return value
            raise InputError("task_invalid", f"data_files must be beside the task's file; there is no {folder / value}")
        found.append(folder / value)
        return str((folder / value).resolve())

    if isinstance(own, dict) and "data_files" in own:
        own["data_files"] = whole(own["data_files"])
    return found


def _loaded(name: str, manager: Any, spec: Any) -> dict[str, Any]:
    """Tasks of lm-eval by name, with their data. The order of choices is drawn here, as by lm-eval's own command."""
    if isinstance(spec, str) and not Path(spec).suffix and spec not in manager.task_index:
        near = difflib.get_close_matches(name, {*NAMED, *manager.all_tasks}, 3)
        raise InputError(
            "task_unknown",
            f"there is no task {name}, here or in lm-eval {version(PACKAGE)}"
            + (f"; near it are {', '.join(near)}" if near else ""),
        )
    random.seed(SEED)
    np.random.seed(OTHER_SEED)
    try:
        tasks: dict[str, Any] = manager.load([spec])["tasks"]
    except ImportError as error:
        raise InputError(
            "package_missing", f"the task {name} of lm-eval needs a package that is not installed ({error}): {INSTALL}"
        ) from error
    except OSError as error:
        raise InputError(
            "hub_failed",
            f"the questions of {name} could not be read: {error}. They are no part of this program: lm-eval's tasks "
            "have theirs from the hub, once, where the network is there and HF_HUB_OFFLINE is not set; a closed data "
            "set needs consent to its terms on its page there, and `hf auth login`",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("task_invalid", f"lm-eval cannot use the task {name}: {error}") from error
    if unsafe := [own for own, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]:
        raise InputError(
            "task_invalid", f"{unsafe[0]} runs code that the model writes, which is not done here. Leave it out"
        )
    return tasks
