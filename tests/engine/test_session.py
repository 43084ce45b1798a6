"""A conversation in a file goes on as if its process had never ended."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from refusing import refused

from mlx_qwen35 import Conversation, Session, load
from mlx_qwen35.cache.session_file import SessionFile
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.shapes import text_shapes
from mlx_qwen35.engine.session_record import identity
from mlx_qwen35.model.model import Model
from mlx_qwen35.model.weights import Weights

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "examples" / "pictures"
TOOLS = json.loads((ROOT / "examples" / "tools.json").read_text())
QUESTIONS = ["What is 34 + 58?", "Add 10 to that.", "Who are you?"]
OPTIONS = {"temp": 1.0, "seed": 3, "max_tokens": 8}


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "talk"


def image(file: Path = PICTURES / "shapes.png") -> list[dict[str, Any]]:
    return [{"type": "image", "image": str(file)}, {"type": "text", "text": "What do you see?"}]


def video() -> list[dict[str, Any]]:
    clip = str(PICTURES / "moving.mp4")
    return [{"type": "video", "video": clip}, {"type": "text", "text": "Which way does the circle move?"}]


def said(conversation: Conversation, message: Any) -> tuple[Any, ...]:
    """The tokens of the answer to a message, and how many of the prompt were not read again."""
    turn = conversation.send(message)
    return (turn.text and turn.result.tokens), turn.reused


def asked(path: Path, nano: Any, *messages: Any, **options: Any) -> list[tuple[Any, ...]]:
    """What a session that goes on with these messages says. It is saved and let go of."""
    with Session.load(path, *nano, **OPTIONS, **options) as session:
        found = [said(session.conversation, message) for message in messages]
        assert session.changed
        assert session.save() == path.stat().st_size
        assert not session.changed
    return found


PLAIN, DRAFTS = {"enable_thinking": False}, {"mtp": "on", "system_prompt": "Be brief."}
FULL = [pytest.param(*case, marks=pytest.mark.full) for case in (("Hi", DRAFTS), (video(), PLAIN))]


@pytest.mark.parametrize(("first", "options"), [(image(), PLAIN), *FULL])
def test_a_session_answers_and_reuses_as_the_conversation_that_never_stopped(nano, path, first, options):
    whole = Conversation(*nano, **OPTIONS, **options)
    expected = [said(whole, message) for message in (first, *QUESTIONS)]
    assert [asked(path, nano, message, **options)[0] for message in (first, *QUESTIONS)] == expected
    assert expected[-1][1] > expected[1][1] > 0


@pytest.mark.full
def test_calls_and_their_results_go_on_behind_what_was_read(nano, path):
    options = {"temp": 0, "seed": 3, "tools": TOOLS}
    weather = "What is the weather in Paris?"
    with Session.load(path, *nano, **options) as session:
        calls = said(session.conversation, weather) and session.conversation.messages[-1]["tool_calls"]
        session.save()
    whole = Conversation(*nano, **options)
    said(whole, weather)
    results = {call["id"]: "21 degrees, sunny" for call in calls}
    with Session.load(path, *nano, **options) as session:
        turns = [talk.send_results(results) for talk in (session.conversation, whole)]
        assert turns[0].text == turns[1].text
        assert turns[0].reused == turns[1].reused > 0
        assert session.conversation.messages == whole.messages


def test_images_are_in_the_file_and_their_own_files_may_go(nano, path, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes((PICTURES / "shapes.png").read_bytes())
    asked(path, nano, image(picture), enable_thinking=False)
    picture.unlink()
    with Session.load(path, *nano, **OPTIONS, enable_thinking=False) as session:
        conversation = session.conversation
        conversation.messages = [{"role": "system", "content": "Be exact."}, *conversation.messages]  # before the image
        found = said(conversation, QUESTIONS[0])
    fresh = Conversation(*nano, **OPTIONS, enable_thinking=False)
    fresh.messages = list(conversation.messages[:-2])
    fresh.messages[1] = {"role": "user", "content": image()}
    assert found == said(fresh, QUESTIONS[0])


@pytest.mark.full
def test_a_message_that_was_interrupted_while_it_was_read_goes_on_where_it_stopped(nano, path):
    options = {"enable_thinking": False, "prefill_step_size": 16}
    long = "Remember: " + ", ".join(f"k{i} is {i}" for i in range(20))
    expected = said(Conversation(*nano, **OPTIONS, **options), long)

    def interrupt(done: int, total: int) -> None:
        if done >= 48:
            raise KeyboardInterrupt

    with Session.load(path, *nano, **OPTIONS, **options) as session:
        with pytest.raises(KeyboardInterrupt):
            list(session.conversation.send(long, interrupt))
        assert session.changed
        assert session.conversation.messages == []
        session.save()
    with Session.load(path, *nano, **OPTIONS, **options) as session:
        assert session.tokens == 48
        tokens, reused = said(session.conversation, long)
        assert (tokens, reused) == (expected[0], 48)


def test_an_image_that_was_interrupted_is_read_from_the_place_before_it(nano, path):
    options = {"enable_thinking": False, "prefill_step_size": 4}
    whole = Conversation(*nano, **OPTIONS, **options)
    expected = [said(whole, message) for message in (QUESTIONS[0], image())][1]
    with Session.load(path, *nano, **OPTIONS, **options) as session:
        conversation = session.conversation
        said(conversation, QUESTIONS[0])
        asked_next = [*conversation.messages, {"role": "user", "content": image()}]
        place = nano[1].encode_messages(asked_next, enable_thinking=False).media[0].placeholders[0]

        def interrupt(done: int, total: int) -> None:
            if place.start < turn.reused + done < place.stop:
                raise KeyboardInterrupt

        turn = conversation.send(image(), interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(turn)
        session.save()
    with Session.load(path, *nano, **OPTIONS, **options) as session:
        assert 0 < session.tokens <= place.start
        assert said(session.conversation, image()) == expected
        assert expected[1] == session.tokens


def test_a_session_without_a_message_is_one(nano, path):
    with Session.load(path, *nano, system_prompt="Be brief.") as session:
        assert (session.tokens, session.changed) == (0, False)
        session.save()
    with Session.load(path, *nano) as session:
        assert session.conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_the_system_prompt_is_the_files_own(nano, path):
    asked(path, nano, QUESTIONS[0], system_prompt="Be brief.")
    before = path.read_bytes()
    with refused("option_conflict", "Be brief.", "Be long."):
        Session.load(path, *nano, system="Be long.")
    for options in ({}, {"system": "Be brief."}):
        with Session.load(path, *nano, **options) as session:
            session.conversation.reset()
            assert [message["content"] for message in session.conversation.messages] == ["Be brief."]
    other = path.with_name("other")
    asked(other, nano, QUESTIONS[0])
    with refused("option_conflict", "Be brief."):
        Session.load(other, *nano, system_prompt="Be brief.")
    assert path.read_bytes() == before


def test_a_session_without_its_system_message_takes_the_same_prompt(nano, path):
    with Session.load(path, *nano, system_prompt="Be brief.", **OPTIONS) as session:
        session.conversation.messages = []
        said(session.conversation, QUESTIONS[0])
        session.save()
    with Session.load(path, *nano, system_prompt="Be brief.", **OPTIONS) as session:
        assert [message["role"] for message in session.conversation.messages] == ["user", "assistant"]
        session.conversation.reset()
        assert [message["content"] for message in session.conversation.messages] == ["Be brief."]


def test_a_system_message_of_parts_comes_back(nano, path):
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    with Session.load(path, *nano, **OPTIONS) as session:
        session.conversation.messages = [system]
        said(session.conversation, QUESTIONS[0])
        session.save()
        expected = said(session.conversation, QUESTIONS[1])
    with Session.load(path, *nano, **OPTIONS) as session:
        assert session.conversation.messages[0] == system
        assert said(session.conversation, QUESTIONS[1]) == expected


@pytest.mark.parametrize("container", [list, tuple])
def test_images_that_messages_name_are_read_before_they_are_saved(nano, path, tmp_path, container):
    picture = tmp_path / "picture.png"
    picture.write_bytes((PICTURES / "shapes.png").read_bytes())
    with Session.load(path, *nano, **OPTIONS) as session:
        asked_before = {"role": "user", "content": container(image(picture))}
        session.conversation.messages = [asked_before, {"role": "assistant", "content": "A shape."}]
        expected = said(session.conversation, QUESTIONS[0])
        session.save()
        picture.unlink()
        with refused("media_not_found", picture):
            session.save()
    with Session.load(path, *nano, **OPTIONS) as session:
        messages = session.conversation.messages
        assert (messages[0]["content"][0]["image"].kind, messages[1]["content"]) == ("image", "A shape.")
        session.conversation.messages = messages[:2]
        assert said(session.conversation, QUESTIONS[0])[0] == expected[0]


def test_a_change_in_place_is_one(nano, path):
    with Session.load(path, *nano, **OPTIONS) as session:
        text = {"type": "text", "text": QUESTIONS[0]}
        said(session.conversation, [text])
        session.save()
        message = session.conversation.messages[0]
        for change in (lambda: message.update(name="Ada"), lambda: message["content"][0].update(text="Edited?")):
            assert not session.changed
            change()
            assert session.changed
            session.save()


def test_a_session_is_not_saved_while_a_turn_runs(nano, path):
    with Session.load(path, *nano, **OPTIONS) as session:
        said(session.conversation, QUESTIONS[0])
        session.save()
        before = path.read_bytes()
        turn = session.conversation.send(QUESTIONS[1])
        next(turn)
        with refused("turn_running", "cancel()"):
            session.save()
        assert path.read_bytes() == before
        turn.cancel()
        assert session.changed
        session.save()


def test_a_model_without_a_checkpoint_has_no_session(nano):
    config = parse_config(geometry("tiny")).text
    arrays = {name: mx.zeros(shape) for name, shape in text_shapes(config).items()}
    made = Model(config, Weights(arrays, lambda name: None, mx.float32, 1e-6), memory_limit=0)
    with refused("option_invalid", "load()"):
        identity(made, nano[1])


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_image(nano, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("session") / "talk"
    asked(path, nano, image())
    return path


def changed(source: Path, path: Path, **metadata: str) -> bytes:
    """Another session with other metadata and a checksum of its own; its bytes."""
    file = SessionFile(source)
    arrays, values = dict(file.arrays()), file.header().metadata
    file.close()
    assert metadata.keys() <= values.keys()
    values.pop("checksum")
    file = SessionFile(path)
    file.write(values | metadata, arrays)
    file.close()
    return path.read_bytes()


@pytest.mark.parametrize("field", ["fingerprint", "dtype", "kv_format", "rope", "tokenizer"])
def test_a_session_of_another_model_is_refused_by_the_field_that_differs(nano, with_image, path, field):
    before = changed(with_image, path, **{field: "other"})
    with refused("session_foreign", path, repr(field), "other"):
        Session.load(path, *nano)
    assert path.read_bytes() == before


NONSENSE = ["", "3", "[]", "[[1]]", '[["a", [[0, 1, 1]]]]', '[[0, "query"]]', '[{"role": 1}]', "null"]


@pytest.mark.parametrize("value", NONSENSE)
@pytest.mark.parametrize("field", ["places", "next_positions", "runs", "media"])
def test_values_that_cannot_be_are_refused(nano, with_image, path, field, value):
    before = changed(with_image, path, **{field: value})
    with refused("session_invalid", path):
        Session.load(path, *nano)
    assert path.read_bytes() == before


def test_a_system_prompt_must_be_text(nano, with_image, path):
    changed(with_image, path, system="3")
    with refused("session_invalid", "'system'"):
        Session.load(path, *nano)


def test_positions_must_be_those_of_the_tokens_and_images(nano, with_image, path):
    file = SessionFile(with_image)
    found = json.loads(file.header().metadata["next_positions"])
    file.close()
    changed(with_image, path, next_positions=json.dumps([*found[:-1], found[-1] + 1]))
    with refused("session_invalid", "'next_positions'", found[-1]):
        Session.load(path, *nano)


@pytest.mark.parametrize("bits", ["8", "8/4", "4"])
def test_a_session_with_packed_keys_and_values_is_one_for_them_alone(nano, path, bits):
    packed, asked_for = load("nano", kv_bits=bits), [QUESTIONS[0], QUESTIONS[1]]
    whole = Conversation(*packed, **OPTIONS, **PLAIN)
    expected = [said(whole, message) for message in asked_for]
    assert [asked(path, packed, message, **PLAIN)[0] for message in asked_for] == expected
    with refused("session_foreign", "'kv_format'", bits, "16"):
        Session.load(path, *nano)


def test_a_session_of_another_dtype_is_refused(nano, with_image):
    with refused("session_foreign", "'dtype'", "float32", "float16"):
        Session.load(with_image, *load("nano", dtype="float16"))


@pytest.mark.full
def test_another_chat_template_is_told_and_reads_anew_what_it_renders_otherwise(nano, path):
    asked(path, nano, QUESTIONS[0])
    model, processor = load("nano")
    processor.tokenizer.chat_template = "{# #}" + processor.tokenizer.chat_template
    with pytest.warns(RuntimeWarning, match="template"), Session.load(path, model, processor, **OPTIONS) as session:
        assert said(session.conversation, QUESTIONS[1])[1] > 0


def test_a_file_in_use_and_options_that_are_refused_leave_no_lock(nano, path):
    asked(path, nano, QUESTIONS[0])
    with Session.load(path, *nano), refused("session_busy"):
        Session.load(path, *nano)
    with refused("option_unknown"):
        Session.load(path, *nano, tempo=1)
    with refused("option_conflict"):
        Session.load(path, *nano, system="Be long.")
    Session.load(path, *nano).close()


def test_a_session_that_was_closed_is_saved_no_more(tmp_path, nano):
    path = tmp_path / "talk"
    with Session.load(path, *nano, **OPTIONS) as session:
        list(session.conversation.send("Who are you?"))
        session.save()
    before = path.read_bytes()
    for there in (True, False):
        with refused("session_closed", str(path)):
            session.save()
        if there:
            assert path.read_bytes() == before
            path.unlink()
    assert not list(tmp_path.iterdir())
    Session.load(path, *nano).close()  # and nobody has it


def test_a_setting_that_differs_is_told_where_it_differs_with_its_option(tmp_path, nano):
    path = tmp_path / "talk"
    with Session.load(path, *nano, **OPTIONS) as session:
        list(session.conversation.send("Who are you?"))
        session.save()
    with refused("session_foreign", "'rope'", '"yarn": {', '"yarn": null', "rope_scaling"):
        Session.load(path, *load("nano", rope_scaling="yarn:2"))
