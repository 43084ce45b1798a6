"""Tasks of one's own: what matches, and what is wrong with a file."""

import json

import pytest
from questions import FILE, lines
from refusing import refused

from mlx_qwen35.evaluate.local import MATCHES, bundled, read_task
from mlx_qwen35.evaluate.names import find


@pytest.fixture
def write(tmp_path):
    """(the lines of questions, fields of the task) -> the task's file"""

    def written(rows, **fields):
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        (tmp_path / "house.jsonl").write_text(text, encoding="utf-8")
        file = tmp_path / "house.yaml"
        file.write_text(json.dumps({"questions": "house.jsonl", **fields}))  # JSON is YAML
        return file

    return written


def test_a_task_is_asked_by_its_options_and_those_of_a_question(write, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    first = {"question": "Who?", "answer": "nano", "options": {"max_tokens": 9}, "images": ["a.png"]}
    asked = [{"role": "user", "content": "Who?"}]
    second = {"messages": asked, "answer": ["a", "b"], "key": "who", "choices": ["a", "c"]}
    fields = {"options": {"temp": 0, "max_tokens": 5}, "published": {"score": 1, "source": "x"}}
    task = read_task(write([first, "", second], **fields))
    assert (task.name, [item.key for item in task.items()], task.published.score) == ("house", ["1", "who"], 1.0)
    one, two = map(task.ask, task.items())
    assert one.prompt == "Who?" and one.options == {"temp": 0, "max_tokens": 9, "images": [str(tmp_path / "a.png")]}
    assert (two.prompt, two.options, two.choices) == (asked, {"temp": 0, "max_tokens": 5}, ["a", "c"])
    assert [task.judge(task.items()[1], answer) for answer in ("a", "b", "ab")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("match", "answer", "right", "does"),
    [
        ("exact", " 9 2\n", "9  2", True), ("exact", "92.", "92", False), ("contains", "It is\n92.", "is 92", True),
        ("contains", "It is 91.", "92", False), ("regex", "It is 92.", r"\b9\d\b", True),
        ("contains", "It is 14.", "4", False), ("contains", "它是猫咪", "猫", True),
        ("contains", "Nano", "nano", False), ("regex", "192", r"^9", False),
    ],
)  # fmt: skip
def test_what_matches(match, answer, right, does):
    assert MATCHES[match](answer, right) is does


def test_the_version_changes_with_the_task_and_with_its_questions(write):
    row = {"question": "Who?", "answer": "nano"}
    versions = [
        read_task(write(*given[:1], **given[1])).version
        for given in (([row], {}), ([row, row | {"key": 7}], {}), ([row], {"match": "contains"}), ([row], {}))
    ]
    assert len({*versions}) == 3 and versions[0] == versions[3]


def test_the_version_changes_with_the_bytes_of_a_picture(write, tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    part = [{"type": "image", "image": "a.png"}]
    rows = [{"question": "Who?", "answer": "a", "images": ["a.png"]},
            {"messages": [{"role": "user", "content": part}], "answer": "a"}]  # fmt: skip
    for row in rows:
        before = read_task(write([row])).version
        (tmp_path / "a.png").write_bytes(b"b" + (tmp_path / "a.png").read_bytes())
        assert read_task(write([row])).version != before


def test_images_of_messages_are_found_beside_the_questions(write, tmp_path):
    given = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Who?"}]
    row = {"messages": [{"role": "user", "content": given}, {"role": "user", "content": "Who?"}], "answer": "a"}
    with refused("media_not_found", "line 1", tmp_path / "a.png"):
        read_task(write([row]))
    (tmp_path / "a.png").write_bytes(b"")
    task = read_task(write([row]))
    first, second = task.ask(task.items()[0]).prompt
    assert first["content"] == [given[0] | {"image": str(tmp_path / "a.png")}, given[1]] and second["content"] == "Who?"


GOOD = {"question": "Who?", "answer": "nano"}


@pytest.mark.parametrize("name", ["a/b", "kl", ".a"])
def test_a_name_that_files_of_answers_cannot_have_is_refused(write, name):
    with refused("task_invalid", name):
        find([str(write([GOOD], task=name))], None)


def test_a_field_that_stands_twice_is_refused(write):
    file = write([GOOD])
    file.write_text("questions: house.jsonl\nquestions: other.jsonl\n")
    with refused("task_invalid", "questions is there twice"):
        read_task(file)


@pytest.mark.parametrize(
    ("rows", "fields", "told"),
    [
        ([GOOD], {"question": "house.jsonl"}, "question;"), ([GOOD], {"questions": 3}, "3"),
        ([GOOD], {"match": "fuzzy"}, "exact, contains, regex"), ([GOOD], {"task": 3}, "3"),
        ([GOOD], {"options": {"tempo": 1}}, "tempo"), ([GOOD], {"options": {"seed": 1}}, "seed"),
        ([GOOD], {"published": {"score": 79.1, "source": "x"}}, "79.1"), ([], {}, "empty"),
        ([GOOD, "{"], {}, "line 2"), ([GOOD, "[]"], {}, "line 2"), ([GOOD | {"pictures": []}], {}, "pictures"),
        ([{"question": "Who?"}], {}, "line 1"), ([GOOD | {"messages": []}], {}, "line 1"),
        ([GOOD | {"answer": 92}], {}, "92"), ([GOOD | {"choices": "ab"}], {}, "choices"),
        ([GOOD, '{"question": "a", "question": "b", "answer": "c"}'], {}, "line 2"),
        ([GOOD | {"answer": " "}], {}, "blank"), ([GOOD | {"answer": ["a", ""]}], {}, "blank"),
        ([GOOD | {"choices": ["a", "b"]}], {}, "choices"),
        ([GOOD | {"options": {"top_k": -1}}], {}, "top_k"), ([GOOD | {"answer": "("}], {"match": "regex"}, "line 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_task_is_told_with_its_place(write, rows, fields, told):
    with refused("task_invalid", told):
        read_task(write(rows, **fields))


def test_a_missing_picture_and_a_missing_file_are_refused_before_anything_is_asked(write, tmp_path):
    with refused("media_not_found", "line 1", "none.png"):
        read_task(write([GOOD | {"images": ["none.png"]}]))
    with refused("text_unreadable", "none.yaml"):
        read_task(tmp_path / "none.yaml")
    with refused("text_unreadable", "none.jsonl"):
        read_task(write([GOOD], questions="none.jsonl"))


def test_nano_s_questions_are_those_of_its_generators():
    assert FILE.read_text(encoding="utf-8").splitlines() == lines()
    assert len(bundled().items()) == 200 and len({item.key for item in bundled().items()}) == 200
