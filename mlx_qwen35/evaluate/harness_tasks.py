"""Which tasks of lm-eval are asked: by the names of the published tables, by its own, or by a file of its form."""

import difflib
import hashlib
import importlib.util
import json
import logging
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.checkpoint.hub import failures
from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.harness import HarnessTask
from mlx_qwen35.evaluate.harness_errors import of_task
from mlx_qwen35.evaluate.harness_requests import quiet
from mlx_qwen35.evaluate.published import NAMED, Named
from mlx_qwen35.options import spelled

PACKAGE, INSTALL = "lm_eval", "pip install 'mlx-qwen35[eval]'"
OF_FILE = re.compile(r"^(dataset_path|output_type|include|group|custom_dataset|class)\s*:", re.MULTILINE)
SEED, OTHER_SEED = 0, 1234  # with which lm-eval's command chooses examples and orders choices
LOCAL = ("json", "csv", "text", "parquet")  # the `datasets` library's names of files of these kinds
PATIENCE = 5.0  # seconds for the hub to answer in


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
            f"{name} is no task here, and lm-eval, which has more, is not installed",
            f"Get it: {INSTALL}. Without it there are kl, nano, sets of image questions (mmmu=FOLDER) and tasks of "
            "your own, FILE.yaml",
        )
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    if Path(name).suffix:
        return _of_file(Path(name).expanduser())
    named = NAMED.get(name)
    tasks = _loaded(name, _manager(named), named.task if named else name, f"the task {name}")
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
    if "group" in spec or isinstance(spec.get("task"), list):
        listed = [own.get("task", own) if isinstance(own, Mapping) else own for own in spec.get("task", ())]
        raise InputError(
            "task_invalid",
            f"{file} must be one task; it is a group of lm-eval, which is not taken. Give its tasks or their files, "
            f"with commas: {spelled('tasks', ','.join(map(str, listed)))}",
        )
    data = _beside(file, spec)
    written = json.dumps(load_yaml(file, resolve_func=False), sort_keys=True, default=str)  # with what it includes
    digest = hashlib.sha256(written.replace(str(file.parent.resolve()), "").encode())
    for path in [*data, *(sorted(file.parent.glob("*.py")) if "!function" in file.read_text() else ())]:
        digest.update(path.read_bytes())
    name = str(spec.get("task", file.stem))
    where = str(file) + (f", with {', '.join(path.name for path in data)}" if data else "")
    with of_task(where):
        tasks = _loaded(name, TaskManager(include_defaults=False), spec if data else str(file), where)
        found = HarnessTask(name, tasks, f"lm-eval {version(PACKAGE)}: {digest.hexdigest()[:12]}", file=file)
        found.check()
    return found


def _beside(file: Path, spec: Mapping[str, Any]) -> list[Path]:
    """The local files of a task's data, whose paths become whole ones."""
    folder, own, found = file.parent, spec.get("dataset_kwargs"), list[Path]()

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
            raise InputError("task_invalid", f"{file}: data_files must be beside it; there is no {folder / value}")
        found.append(folder / value)
        return str((folder / value).resolve())

    if isinstance(own, dict) and "data_files" in own:
        own["data_files"] = whole(own["data_files"])
    return found


@contextmanager
def _hub(asked: bool) -> Iterator[bool]:
    """Whether the hub answers, where it is asked. Otherwise what was downloaded before is read in the block, at once:
    the library of data sets would ask again and again. Its bars are shown for downloads alone.
    """
    if not asked:
        with quiet():
            yield True
        return
    if _answers():
        yield True
        return
    import datasets
    from huggingface_hub import constants

    places: list[Any] = [constants, datasets.config]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield False
    finally:
        for place, offline in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = offline


def _answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except failures():
        return False
    return True


def _loaded(name: str, manager: Any, spec: Any, where: str) -> dict[str, Any]:
    """Tasks of lm-eval by name, with their data. The order of choices is drawn here, as by lm-eval's own command.

    where: the task or its file, for messages.
    """
    if isinstance(spec, str) and not Path(spec).suffix and spec not in manager.task_index:
        near = difflib.get_close_matches(name, {*NAMED, *manager.all_tasks}, 3)
        raise InputError(
            "task_unknown",
            f"there is no task {name}, here or in lm-eval {version(PACKAGE)}"
            + (f"; near it are {', '.join(near)}" if near else ""),
        )
    random.seed(SEED)
    np.random.seed(OTHER_SEED)
    with of_task(where):
        tasks = _opened(where, manager, spec)
    if unsafe := [own for own, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]:
        raise InputError(
            "task_invalid", f"{unsafe[0]} runs code that the model writes, which is not done here. Leave it out"
        )
    return tasks


def _opened(where: str, manager: Any, spec: Any) -> dict[str, Any]:
    from datasets.utils.logging import set_verbosity

    set_verbosity(logging.CRITICAL)  # what it logs of an error is told by ours
    try:
        with _hub(asked=isinstance(spec, str)) as answers:
            return dict(manager.load([spec])["tasks"])
    except ImportError as error:
        raise InputError(
            "package_missing",
            f"{where} of lm-eval needs a package that is not installed: {error.name or error}",
            INSTALL,
        ) from error
    except OSError as error:
        why = f"could not be read: {error}" if answers else "are not on this machine, and the hub does not answer"
        raise InputError(
            "hub_failed",
            f"the questions of {where} {why}",
            "They are no part of this program: lm-eval has them from the hub, once, where the network is there and "
            "HF_HUB_OFFLINE is not set; a closed data set needs consent to its terms on its page there, and `hf auth "
            "login`",
        ) from error
