"""Tasks of one's own: a YAML or JSON file that names a file of questions.

    questions: house.jsonl              # beside this file; a JSON object a line
    match: contains                     # exact (the default), contains (whole words) or regex
    options: {max_tokens: 64, enable_thinking: false}

A question: {"question": "What is 34 + 58?", "answer": "92"}. In the place of "question" there may be "messages", a
whole conversation. "answer" may be a list of which one must match. More fields: "key", its name, else its number;
"images", files beside the questions; "choices", of which the most probable is the answer; "options", for it alone.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.hub import NANO
from mlx_qwen35.console.streams import read_file
from mlx_qwen35.engine.options import GROUPS
from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.task import Asked, Item, Published
from mlx_qwen35.fields import without_duplicates
from mlx_qwen35.media.fetch import is_remote
from mlx_qwen35.options import check_keywords, spelled
from mlx_qwen35.values import is_number, is_whole, shown

SUFFIXES = (".yaml", ".yml", ".json")
FIELDS = {"task", "questions", "match", "options", "published"}
QUESTIONS = "questions.jsonl"  # of nano


def _plain(text: str) -> str:
    return " ".join(text.split())


def _holds(text: str, words: str) -> bool:
    """Whether whole words or numbers stand in a text: 4 is not in 14. Writing without blanks has no whole words."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.ASCII) is not None


MATCHES: Mapping[str, Callable[[str, str], bool]] = {  # (answer, what is right) -> whether it is
    "exact": lambda answer, right: _plain(answer) == _plain(right),
    "contains": lambda answer, right: _holds(_plain(answer), _plain(right)),
    "regex": lambda answer, right: re.search(right, answer) is not None,
}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


OF_QUESTION: Mapping[str, tuple[Callable[[Any], bool], str]] = {  # field -> whether a value holds, and what it must be
    "key": (lambda value: isinstance(value, str) or is_whole(value), "text or a number"),
    "question": (lambda value: isinstance(value, str), "text"),
    "messages": (lambda value: isinstance(value, list), "a list of messages"),
    "answer": (lambda value: isinstance(value, str) or _texts(value), "text, or a list of texts"),
    "images": (_texts, "a list of files"),
    "choices": (_texts, "a list of texts"),
    "options": (lambda value: isinstance(value, dict), "options of generate by name"),
}


class LocalTask:
    """Questions with their answers. A score is 1 where an answer matches.

    name: of the task. lines: the questions, checked. match: one of MATCHES. options: of `generate`, for all of them.
    version: changes with any of these. folder: of the images.
    """

    def __init__(
        self,
        name: str,
        lines: Sequence[Mapping[str, Any]],
        *,
        version: str,
        folder: Path,
        match: str = "exact",
        options: Mapping[str, Any] | None = None,
        published: Published | None = None,
    ):
        self.name, self.version, self.published = name, version, published
        self._lines, self._folder, self._matches, self._options = lines, folder, MATCHES[match], dict(options or {})

    def items(self) -> Sequence[Item]:
        return self._items

    @cached_property
    def _items(self) -> Sequence[Item]:
        return [Item(str(line.get("key", number)), line) for number, line in enumerate(self._lines, start=1)]

    def ask(self, item: Item) -> Asked:
        line, options = item.data, {**self._options, **item.data.get("options", {})}
        if images := line.get("images"):
            options["images"] = [str(self._folder / image) for image in images]
        messages = [_placed(message, self._folder) for message in line.get("messages", ())]
        return Asked(messages or line["question"], options, line.get("choices", ()))

    def expected(self, item: Item) -> str | Sequence[str]:
        right: str | Sequence[str] = item.data["answer"]
        return right

    def judge(self, item: Item, answer: str) -> float:
        right = self.expected(item)
        return float(any(self._matches(answer, own) for own in ([right] if isinstance(right, str) else right)))


def read_task(file: Path) -> LocalTask:
    """The task of a file. InputError: text_unreadable; task_invalid, with the line; media_not_found."""
    file = file.expanduser()
    text = read_file(spelled("tasks"), file)
    found = _parsed(file, text)
    if unknown := sorted(map(str, set(found) - FIELDS)):
        raise _invalid(file, f"there is no field {unknown[0]}; there are {', '.join(sorted(FIELDS))}")
    if not isinstance(found.get("questions"), str) or not found["questions"]:
        raise _invalid(file, f"questions must name a file of questions, got {shown(found.get('questions'))}")
    name, match = found.get("task", file.stem), found.get("match", "exact")
    if not isinstance(name, str):
        raise _invalid(file, f"task must be a name, got {shown(name)}")
    if match not in MATCHES:
        raise _invalid(file, f"match must be one of {', '.join(MATCHES)}, got {shown(match)}")
    _check_options(f"{file}: options", found.get("options", {}))
    questions = file.parent / found["questions"]
    written = read_file(f"{file}: questions", questions)
    lines = _questions(questions, written, match)
    digest = hashlib.sha256(f"{text}\0{written}".encode())
    for picture in sorted({path for line in lines for path in _pictures(questions.parent, line)}):
        digest.update(hashlib.sha256(picture.read_bytes()).digest())
    return LocalTask(
        name, lines, version=digest.hexdigest()[:12], folder=questions.parent, match=match,
        options=found.get("options"), published=_published(file, found.get("published")),
    )  # fmt: skip


def bundled() -> LocalTask:
    """The task `nano`: held-out questions of the bundled model, text alone, answered greedily, judged exactly."""
    lines = [line for line in nano_questions() if "answer" in line]  # the others are right by their calls
    version = hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:12]
    return LocalTask(NANO, lines, version=version, folder=Path(), options={"temp": 0.0, "max_tokens": 160})


def nano_questions() -> list[dict[str, Any]]:
    """nano's questions: as of a task of one's own, and "completion", all that the model should write."""
    text = (resources.files("mlx_qwen35") / NANO / QUESTIONS).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# --- reading ----------------------------------------------------------------------------------------------------------


def _parsed(file: Path, text: str) -> dict[str, Any]:
    import yaml  # it comes with huggingface_hub

    try:
        found, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _invalid(file, f"it is no YAML: {_plain(str(error))}") from error
    if not isinstance(found, dict) or node is None:
        raise _invalid(file, f"it must hold fields, as questions: FILE, got {shown(found)}")
    names = [str(field.value) for field, _ in node.value]
    if twice := [name for name in names if names.count(name) > 1]:
        raise _invalid(file, f"each field must stand once; {twice[0]} is there twice")
    return found


def _questions(file: Path, text: str, match: str) -> list[dict[str, Any]]:
    lines = [_question(file, number, line, match) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError("task_invalid", f"{file} must have a question a line; it is empty")
    return lines


def _question(file: Path, number: int, text: str, match: str) -> dict[str, Any]:
    where = f"{file}, line {number}"
    try:
        line = json.loads(text, object_pairs_hook=without_duplicates)
    except ValueError as error:
        raise _invalid(where, f"it must be JSON: {error}") from error
    if not isinstance(line, dict):
        raise _invalid(where, f"it must be a JSON object, got {shown(line)}")
    for name, value in line.items():
        if name not in OF_QUESTION:
            raise _invalid(where, f"there is no field {name}; there are {', '.join(OF_QUESTION)}")
        holds, rule = OF_QUESTION[name]
        if not holds(value):
            raise _invalid(where, f"{name} must be {rule}, got {shown(value)}")
    if ("question" in line) == ("messages" in line) or "answer" not in line:
        raise _invalid(where, "it must have an answer, and either question or messages")
    rights = [line["answer"]] if isinstance(line["answer"], str) else line["answer"]
    if not all(map(str.strip, rights)):
        raise _invalid(where, "an answer must not be blank")
    if match == "regex":
        _check_patterns(where, rights)
    choices = line.get("choices")
    if choices and not any(MATCHES[match](choice, right) for choice in choices for right in rights):
        raise _invalid(where, f"the answer must be one of the choices, got {shown(line['answer'])}")
    _check_options(f"{where}: options", line.get("options", {}))
    _check_images(where, file.parent, line)
    return line


def _check_images(where: str, folder: Path, line: Mapping[str, Any]) -> None:
    if "images" in line and "messages" in line:
        raise _invalid(where, "images go with question; messages have their own parts of type image")
    for path in _pictures(folder, line):
        if not path.is_file():
            raise InputError("media_not_found", f"{where}: each image must be a file; there is no {path}")


def _pictures(folder: Path, line: Mapping[str, Any]) -> Iterator[Path]:
    """The files that a question shows."""
    yield from (folder / image for image in line.get("images", ()))
    for part in (part for message in line.get("messages", ()) for part in _parts(message)):
        if _is_file(part):
            yield folder / part["image"]


def _parts(message: Any) -> Sequence[Any]:
    """The parts of a message whose content is a list."""
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) else []


def _is_file(part: Any) -> bool:
    """Whether a part of a message is an image by its path, and not by an address or its bytes."""
    source = part.get("image") if isinstance(part, dict) else None
    return isinstance(source, str) and not is_remote(source)


def _placed(message: Any, folder: Path) -> Any:
    """A message whose images are found from any folder."""
    if not any(map(_is_file, _parts(message))):
        return message
    parts = [part | {"image": str(folder / part["image"])} if _is_file(part) else part for part in _parts(message)]
    return message | {"content": parts}


def _check_patterns(where: str, rights: Sequence[str]) -> None:
    for pattern in rights:
        try:
            re.compile(pattern)
        except re.error as error:
            raise _invalid(where, f"answer must be a regular expression: {error}") from error


def _check_options(where: str, options: Any) -> None:
    if not isinstance(options, dict):
        raise _invalid(where, f"they must be options of generate by name, got {shown(options)}")
    if "seed" in options:
        raise _invalid(where, f"each question has a seed of its own, by {spelled('seed')}; leave seed out")
    try:
        check_keywords(options, GROUPS)
    except InputError as error:
        raise _invalid(where, str(error)) from error


def _published(file: Path, given: Any) -> Published | None:
    if given is None:
        return None
    own: Mapping[str, Any] = given if isinstance(given, dict) else {}
    score, source = own.get("score"), own.get("source")
    if score is None or not is_number(score) or not 0 <= score <= 1 or not isinstance(source, str):
        raise _invalid(file, f"published must have a score, 0 to 1, and a source, got {shown(given)}")
    return Published(float(score), source, str(own.get("note", "")))


def _invalid(where: object, why: str) -> InputError:
    return InputError("task_invalid", f"{where}: {why}")
