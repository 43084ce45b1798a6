"""Sets of image questions: as they are published, in folders; pictures reach the model; nothing is fetched."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from refusing import refused
from tasks import items_of

from mlx_qwen35.evaluate import evaluate
from mlx_qwen35.evaluate.image_sets import SETS, image_task
from mlx_qwen35.evaluate.names import find

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "examples/pictures"
MMMU = {
    "id": "validation_Art_1", "question": "What is <image 1>?", "options": "['a circle', 'a triangle']", "answer": "B",
    "image_1": "triangle.png", "image_2": None, "question_type": "multiple-choice",
}  # fmt: skip
MATHVISTA = {
    "pid": "1", "query": "Hint: an integer.\nQuestion: How many shapes are there?", "image": "shapes.png",
    "choices": None, "answer": "2", "answer_type": "integer", "question_type": "free_form", "precision": None,
}  # fmt: skip
REALWORLDQA = {"image": "shapes.png", "question": "Which?\n\nA. red\nB. blue\nLetter only.", "answer": "A"}
BLOCKS = [
    {"category_type": "text_block", "text": "world", "order": 2},
    {"category_type": "title", "text": "Hello", "order": 1},
    {"category_type": "page_number", "text": "12", "order": None},
    {"category_type": "text_block", "text": "hidden", "order": 3, "ignore": True},
    {"category_type": "table", "html": "<table></table>", "order": 4},
]
OMNIDOCBENCH = {"page_info": {"image_path": "page.png"}, "layout_dets": BLOCKS}
ROWS = {"mmmu": MMMU, "mathvista": MATHVISTA, "realworldqa": REALWORLDQA, "omnidocbench": OMNIDOCBENCH}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*given, **options):
        raise AssertionError("something opens a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def written(tmp_path: Path):
    """(set, rows) -> the folder of a set: JSON lines, or the JSON of OmniDocBench, beside the example pictures."""

    def write(name: str, *rows: object) -> Path:
        folder = tmp_path / name
        shutil.copytree(PICTURES, folder, dirs_exist_ok=True)
        (folder / "images").mkdir(exist_ok=True)
        shutil.copyfile(PICTURES / "shapes.png", folder / "images/page.png")
        given = rows or (ROWS[name],)
        if name == "omnidocbench":
            (folder / "OmniDocBench.json").write_text(json.dumps(given))
        else:
            (folder / f"{SETS[name].split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
        return folder

    return write


def asked(folder: Path, name: str):
    """The task, its first item, and the parts of its message."""
    task = image_task(f"{name}={folder}")
    assert task is not None
    item = task.items()[0]
    (message,) = task.ask(item).prompt
    return task, item, message["content"]


PROMPTS = {
    "mmmu": "Question: What is <image 1>?\nOptions:\nA. a circle\nB. a triangle\nPlease select the correct answer from "
    "the options above.",
    "mathvista": MATHVISTA["query"], "realworldqa": REALWORLDQA["question"],
}  # fmt: skip
ANSWERS = {  # set -> a right answer, a wrong one
    "mmmu": ("The answer is B.", "A"), "mathvista": ("There are 2.", "There are 2.4."),
    "realworldqa": ("A", "B"), "omnidocbench": ("# Hello\n\nworld\n\n12", "!?"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_asked_with_its_images_in_front_of_its_prompt_and_judged_by_rules(written, name):
    task, item, (image, text) = asked(written(name), name)
    assert Path(image["image"]).is_file() and text["text"] == PROMPTS.get(name, text["text"])
    assert (task.judge(item, ANSWERS[name][0]), task.judge(item, ANSWERS[name][1])) == (1.0, 0.0)
    assert task.name == name and (task.published is None) == (name == "omnidocbench")


def test_open_questions_of_mmmu_take_any_of_their_answers(written):
    row = MMMU | {"options": "[]", "answer": "['4', 'four']", "question_type": "open"}
    task, item, _ = asked(written("mmmu", row), "mmmu")
    assert [task.judge(item, answer) for answer in ("It is four.", "4.0", "five")] == [1.0, 1.0, 0.0]


def test_choices_of_mathvista_are_right_by_letter_and_by_text(written):
    row = MATHVISTA | {"choices": ["No", "Yes"], "answer": "Yes", "answer_type": "text"}
    task, item, _ = asked(written("mathvista", row), "mathvista")
    assert [task.judge(item, answer) for answer in ("B", "Yes", "(A)", "")] == [1.0, 1.0, 0.0, 0.0]


def test_a_page_without_text_is_not_asked(written):
    empty = OMNIDOCBENCH | {"layout_dets": BLOCKS[2:]}
    assert len(asked(written("omnidocbench", empty, OMNIDOCBENCH), "omnidocbench")[0].items()) == 1


def test_the_version_changes_with_a_picture_and_not_with_its_place(written, tmp_path):
    folder = written("realworldqa")
    before = image_task(f"realworldqa={folder}").version
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert image_task(f"realworldqa={moved}").version == before
    shutil.copyfile(PICTURES / "triangle.png", moved / "shapes.png")
    assert image_task(f"realworldqa={moved}").version != before


def test_parquet_of_the_hub_is_read_with_its_pictures(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    rows = []
    for number, name in enumerate(("triangle.png", "shapes.png", "number.png")):
        image = {"bytes": (PICTURES / name).read_bytes(), "path": name}
        rows.append(MMMU | {"id": f"v{number}", "image_1": image})
    (tmp_path / "Art").mkdir()
    file = tmp_path / "Art/validation-00000-of-00001.parquet"
    write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)
    task = image_task(f"mmmu={tmp_path}")
    shown = [task.ask(item).prompt[0]["content"][0]["image"] for item in task.items()]
    assert shown == [row["image_1"]["bytes"] for row in rows]
    file.write_bytes(file.read_bytes()[:-9])
    with refused("task_invalid", file):
        image_task(f"mmmu={tmp_path}")


FAULTS = {  # what is wrong -> (set, row, code, what the message names)
    "no such picture": ("realworldqa", REALWORLDQA | {"image": "gone.png"}, "media_not_found", "gone.png"),
    "no picture": ("mmmu", MMMU | {"image_1": None}, "media_not_found", "image_1"),
    "a second picture": ("mmmu", MMMU | {"question": "<image 1> or <image 2>?"}, "media_not_found", "image_2"),
    "a number for a picture": ("realworldqa", REALWORLDQA | {"image": 3}, "task_invalid", "image"),
    "no answer": ("realworldqa", {"image": "shapes.png", "question": "What?"}, "task_invalid", "answer"),
    "no such letter": ("mmmu", MMMU | {"answer": "C"}, "task_invalid", "'C'"),
    "options that are none": ("mmmu", MMMU | {"options": "a, b"}, "task_invalid", "options"),
    "no such choice": ("mathvista", MATHVISTA | {"choices": ["1", "3"]}, "task_invalid", "'2'"),
    "no page": ("omnidocbench", {"layout_dets": []}, "task_invalid", "page_info"),
    "no object": ("realworldqa", 7, "task_invalid", "line 1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_that_is_not_as_published_is_named_before_anything_is_asked(written, fault):
    name, row, code, said = FAULTS[fault]
    folder = written(name, row)
    with refused(code, folder, said):
        find([f"{name}={folder}"], None)


def test_a_set_that_is_not_there_is_not_fetched(tmp_path, monkeypatch):
    with refused("task_unknown", "hf download MMMU/MMMU", "mmmu=FOLDER"):
        find(["mmmu"], None)
    with refused("task_unknown", tmp_path / "gone", "hf download"):
        find([f"mmmu={tmp_path / 'gone'}"], None)
    with refused("task_invalid", tmp_path, "validation*.parquet"):
        find([f"mmmu={tmp_path}"], None)
    with refused("task_unknown", "mmlu", "mathvista"):
        find([f"mmlu={tmp_path}"], None)


# --- nano's known scores ---------------------------------------------------------------------------------------------

SEED = json.loads((ROOT / "mlx_qwen35/nano/evaluation.json").read_text())["seed"]
KNOWN = {  # without thinking, where a completion is the answer alone
    own["task"]: [float(mark) for mark in own["ours"]]
    for own in json.loads((ROOT / "mlx_qwen35/nano/evaluation.json").read_text())["scores"]
    if not own["thinking"]
}


def picture_task(folder: Path, kinds, count: int) -> tuple[Path, list[float]]:
    """A task of one's own with held-out pictures of nano's, and the scores that nano is known to have on them."""
    lines, known = [], []
    for kind in kinds:
        for number, item in enumerate(items_of(kind, False, count, SEED)):
            *before, message = item.messages
            if before:  # a system prompt: the question has none
                continue
            picture, *rest = message["content"]
            if picture["type"] != "image":  # a question in front of its picture
                continue
            image = f"{kind}-{number}.png"
            picture["image"].save(folder / image)
            question = "".join(part["text"] for part in rest)
            lines.append({"key": f"{kind}.{number}", "question": question, "images": [image], "answer": item.answer})
            known.append(KNOWN[kind][number])
    (folder / "drawn.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = "{temp: 0, max_tokens: 160, enable_thinking: false}"
    (folder / "drawn.yaml").write_text(f"questions: drawn.jsonl\noptions: {options}\n")
    return folder / "drawn.yaml", known


def test_nano_has_its_known_scores_on_pictures_that_its_tasks_draw(tmp_path):
    task, known = picture_task(tmp_path, ("describe", "digits", "count"), 6)
    found = evaluate("nano", str(task), tmp_path / "out")["tasks"]["drawn"]
    lines = [json.loads(line) for line in (tmp_path / "out/drawn.jsonl").read_text().splitlines()]
    assert len(lines) > 10 and 0 < sum(known) < len(known)
    assert [line["score"] for line in lines] == known
    assert found["score"] == pytest.approx(sum(known) / len(known))
    assert all(line["image_tokens"] == 4 for line in lines) and found["image_tokens"] == 4 * len(lines)


@pytest.mark.full
def test_questions_about_the_example_pictures_are_all_answered_by_nano(tmp_path):
    found = evaluate("nano", str(ROOT / "examples/evaluate/pictures.yaml"), tmp_path / "out")
    assert found["tasks"]["pictures"]["score"] == 1.0


def test_pixels_of_a_set_reach_the_encoder_and_a_users_win(written, tmp_path):
    folder = written("realworldqa", {"image": "triangle.png", "question": "What shape is it?", "answer": "triangle"})
    options = {"temp": 0.0, "enable_thinking": False, "max_tokens": 20, "min_pixels": 4096, "max_pixels": 4096}
    found = evaluate("nano", f"realworldqa={folder}", tmp_path / "out", **options)["tasks"]["realworldqa"]
    assert (found["image_tokens"], found["score"], found["settings"]["max_pixels"]) == (4, 1.0, 4096)
    for name, least in {"realworldqa": 768 * 28 * 28, "mmmu": 1280 * 28 * 28}.items():
        task, item, _ = asked(written(name), name)
        assert task.ask(item).options == {"min_pixels": least, "max_pixels": 5120 * 28 * 28}


def test_a_damaged_picture_ends_the_run_with_an_error(written, tmp_path):
    folder = written("realworldqa")
    (folder / "shapes.png").write_bytes(b"no picture")
    with refused("media_not_opened", "shapes.png"):
        evaluate("nano", f"realworldqa={folder}", tmp_path / "out")
