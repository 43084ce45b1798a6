"""Published sets of image questions, asked as they are published, of folders that the user has: `--tasks mmmu=FOLDER`.

Prompts: images stand in front of the text, as in Qwen's own code (QwenLM/Qwen3-VL, evaluation/). Answers are judged
without a language model; see choices.py.
"""

import ast
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.choices import LETTERS, letter, page_similarity, same_list, same_number, same_text
from mlx_qwen35.evaluate.published import CARD
from mlx_qwen35.evaluate.questions import Picture, Row, find_folder, read_rows
from mlx_qwen35.evaluate.task import Asked, Item, Published
from mlx_qwen35.options import spelled
from mlx_qwen35.values import is_number, shown

RULES = 1  # number of the rules of judgement, to be raised with each change of them
NOTE = "the card tells neither prompt nor settings; a language model may have read the answers"
PIXELS = {"min_pixels": 1280 * 28 * 28, "max_pixels": 5120 * 28 * 28}  # of Qwen's own code
CHOOSE = "Please select the correct answer from the options above."

# The prompt of OmniDocBench's own code for models of vision and language.
PAGE = r"""You are an AI assistant specialized in converting PDF images to Markdown format. Please follow these instructions for the conversion:

1. Text Processing:
- Accurately recognize all text content in the PDF image without guessing or inferring.
- Convert the recognized text into Markdown format.
- Maintain the original document structure, including headings, paragraphs, lists, etc.

2. Mathematical Formula Processing:
- Convert all mathematical formulas to LaTeX format.
- Enclose inline formulas with \( \). For example: This is an inline formula \( E = mc^2 \)
- Enclose block formulas with \\[ \\]. For example: \[ \frac{-b \pm \sqrt{b^2 - 4ac}}{2a} \]

3. Table Processing:
- Convert tables to HTML format.
- Wrap the entire table with <table> and </table>.

4. Figure Handling:
- Ignore figures content in the PDF image. Do not attempt to describe or convert images.

5. Output Format:
- Ensure the output Markdown document has a clear structure with appropriate line breaks between elements.
- For complex layouts, try to maintain the original document's structure and format as closely as possible.

Please strictly follow these guidelines to ensure accuracy and consistency in the conversion. Your task is to accurately convert the content of the PDF image into Markdown format without adding any extra explanations or comments."""  # noqa: E501


@dataclass(frozen=True)
class Question:
    """A question about images. right: what is right, text or texts, for people. judge: answer -> 0 to 1."""

    text: str
    pictures: Sequence[Picture]
    right: Any
    judge: Callable[[str], float] = field(repr=False)
    key: str | None = None  # None: its number


class ImageTask:
    """The questions of a set. It is read once, before any weights are."""

    def __init__(self, name: str, given: str | None):
        """given: the folder; None: what huggingface_hub keeps of the set.

        Raises InputError: see `find_folder`, `read_rows`; task_invalid, media_not_found, with the row.
        """
        self._set = SETS[name]
        self.name, self.published = name, self._set.published
        folder = find_folder(name, given, self._set.repository)
        questions = filter(None, map(self._set.question, read_rows(folder, self._set.split)))
        self._items = [Item(own.key or str(number), own) for number, own in enumerate(questions, start=1)]

    @cached_property
    def version(self) -> str:
        asked = [(item.key, item.data.text, item.data.right, *(own.digest for own in item.data.pictures))
                 for item in self._items]  # fmt: skip
        digest = hashlib.sha256(repr([RULES, self._set.options, asked]).encode()).hexdigest()[:12]
        return f"{self._set.repository} {self._set.split}, {digest}"

    def items(self) -> Sequence[Item]:
        return self._items

    def ask(self, item: Item) -> Asked:
        parts = [{"type": "image", "image": own.source()} for own in item.data.pictures]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": item.data.text}]}
        return Asked([message], self._set.options)

    def expected(self, item: Item) -> str | Sequence[str]:
        right: str | Sequence[str] = item.data.right
        return right

    def judge(self, item: Item, answer: str) -> float:
        return float(item.data.judge(answer))


@dataclass(frozen=True)
class ImageSet:
    """A published set. repository: on Hugging Face. split: how the names of its files begin.

    question: row -> what is asked; None where there is nothing to judge. options: of `generate`.
    """

    repository: str
    split: str
    question: Callable[[Row], Question | None]
    options: Mapping[str, Any]
    published: Published | None = None


def image_task(word: str) -> ImageTask | None:
    """The task of a word of --tasks, "mmmu=FOLDER" or "mmmu"; None for one that names no set of images."""
    name, given, folder = word.partition("=")
    if name not in SETS:
        if given:
            raise InputError(
                "task_unknown", f"{spelled('tasks')} NAME=FOLDER needs one of {', '.join(SETS)}, got {shown(name)}"
            )
        return None
    return ImageTask(name, folder if given else None)


# --- the sets --------------------------------------------------------------------------------------------------------


def _mmmu(row: Row) -> Question:
    question, options = row.text("question"), _listed(row, "options")
    named = [int(number) for number in re.findall(r"<image (\d)>", " ".join([question, *options]))]
    pictures = row.pictures([f"image_{number}" for number in range(1, 8)], max(named, default=1))
    key, right = row.text("id"), row.text("answer")
    if options:
        if right not in LETTERS[: len(options)]:
            raise row.wrong(f"answer must be a letter of its {len(options)} options, got {shown(right)}")
        listed = "".join(f"{sign}. {option}\n" for sign, option in zip(LETTERS, options, strict=False))
        text = f"Question: {question}\nOptions:\n{listed}{CHOOSE}"
        return Question(text, pictures, right, lambda answer: letter(answer, options) == right, key)
    rights = _listed(row, "answer") if right.startswith("[") else [right]
    judge = partial(_says_any, rights)
    return Question(f"Question: {question}", pictures, rights, judge, key)


def _says_any(rights: Sequence[str], answer: str) -> bool:
    return any(same_text(answer, right) for right in rights)


def _listed(row: Row, column: str) -> list[str]:
    """A list, which the set writes as Python does."""
    value = row.values.get(column)
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError) as error:
        raise row.wrong(f"the column {column} must be a list, got {shown(value)}") from error
    if not isinstance(found, list | tuple):
        raise row.wrong(f"the column {column} must be a list, got {shown(value)}")
    return [str(one) for one in found]


def _mathvista(row: Row) -> Question:
    column = "image" if row.values.get("decoded_image") is None else "decoded_image"
    choices, right, kind = row.texts("choices"), row.text("answer"), row.text("answer_type")
    judge: Callable[[str], float]
    if choices:
        if right not in choices:
            raise row.wrong(f"answer must be one of its choices, got {shown(right)}")
        judge = partial(_chooses, choices, right)
    elif kind == "list":
        judge = partial(same_list, right=right)
    elif kind in ("integer", "float"):
        places = row.values.get("precision") if kind == "float" else None
        judge = partial(same_number, right=right, places=None if places is None else int(places))
    else:
        judge = partial(same_text, right=right)
    return Question(row.text("query"), row.pictures([column]), right, judge, row.text("pid"))


def _chooses(choices: Sequence[str], right: str, answer: str) -> bool:
    found = letter(answer, choices)
    return found is not None and choices[LETTERS.index(found)] == right


def _realworldqa(row: Row) -> Question:
    question, right, pictures = row.text("question"), row.text("answer"), row.pictures(["image"])
    options = re.findall(r"^[A-Z]\. (.*)$", question, re.MULTILINE)
    if right in LETTERS[: len(options)]:
        return Question(question, pictures, right, lambda answer: letter(answer, options) == right)
    return Question(question, pictures, right, partial(same_text, right=right))


COUNTED = {"text_block", "title", "code_txt", "reference"}  # categories of OmniDocBench whose text is judged


def _omnidocbench(row: Row) -> Question | None:
    info, blocks = row.values.get("page_info"), row.values.get("layout_dets")
    if not isinstance(info, dict) or not isinstance(info.get("image_path"), str) or not isinstance(blocks, list):
        raise row.wrong("it must have page_info.image_path and layout_dets, as OmniDocBench.json has them")
    blocks = [own for own in blocks if isinstance(own, dict)]
    texts = [own for own in blocks if isinstance(own.get("text"), str) and own["text"] and not own.get("ignore")]
    texts.sort(key=lambda own: own["order"] if is_number(own.get("order")) else float("inf"))
    counted = [own["text"] for own in texts if own.get("category_type") in COUNTED]
    others = [own["text"] for own in texts if own.get("category_type") not in COUNTED]
    if not counted:
        return None
    path = info["image_path"]
    picture = row.file(f"images/{path}")
    return Question(PAGE, [picture], counted, partial(page_similarity, blocks=counted, uncounted=others), path)


SETS: Mapping[str, ImageSet] = {
    "mmmu": ImageSet("MMMU/MMMU", "validation", _mmmu, PIXELS, Published(0.776, CARD, NOTE)),
    "mathvista": ImageSet("AI4Math/MathVista", "testmini", _mathvista, PIXELS, Published(0.851, CARD, NOTE)),
    "realworldqa": ImageSet("xai-org/RealWorldQA", "test", _realworldqa, PIXELS | {"min_pixels": 768 * 28 * 28},
                            Published(0.795, CARD, NOTE)),
    "omnidocbench": ImageSet("opendatalab/OmniDocBench", "OmniDocBench", _omnidocbench, PIXELS),
}  # fmt: skip
