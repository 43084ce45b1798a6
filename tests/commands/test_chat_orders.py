"""The commands of mlx_qwen35.chat: what each does to the conversation, and that it says so."""

import json
import shutil
import sys
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageGrab
from refusing import refused
from tasks.tools import WEATHER_TOOLS

from mlx_qwen35 import Session, load
from mlx_qwen35.commands.chat.attach import dropped
from mlx_qwen35.commands.chat.clipboard import Clipboard
from mlx_qwen35.commands.chat.loop import run
from mlx_qwen35.commands.chat.orders import COMMAND, ORDERS, find, help_text
from mlx_qwen35.commands.chat.screen import PlainScreen
from mlx_qwen35.commands.chat.settings import NAMES, completions
from mlx_qwen35.commands.chat.talk import Talk
from mlx_qwen35.commands.chat.terminal import TerminalScreen
from mlx_qwen35.commands.output import tell_cut
from mlx_qwen35.console.progress import Step
from mlx_qwen35.engine.conversation import Conversation
from mlx_qwen35.model.model import Model

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
SHAPES, TRIANGLE, MOVING = (str(PICTURES / name) for name in ("shapes.png", "triangle.png", "moving.mp4"))
ASK, OTHER, THIRD = "What is 34 + 58?", "Who are you?", "What is 3 + 4?"
OPTIONS = {"seed": 1, "max_tokens": 6, "enable_thinking": False, "temp": 0.9}


@pytest.fixture(scope="module")
def nano():
    return load("nano")


class Paused(Exception):
    """The lines are at their end, the chat is not."""


class Script:
    """A reader of lines that are given; `texts` are what they began with. ^C and ^D are these keys."""

    def __init__(self, lines: Iterable[str]):
        self.lines, self.texts = list(lines), []

    def read(self, text: str = "", attached: str = "") -> str | None:
        self.texts.append(text)
        if not self.lines:
            raise Paused
        line = self.lines.pop(0)
        if line == "^C":
            raise KeyboardInterrupt
        return None if line == "^D" else line


class Notes(PlainScreen):
    """A screen that keeps what is said."""

    def __init__(self):
        super().__init__()
        self.said: list[str] = []
        self.failed: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def note(self, text: str) -> None:
        self.said.append(text)

    def fail(self, text: str) -> None:
        self.failed.append(text)


class Kept(Clipboard):
    """A clipboard that holds this."""

    def __init__(self, content: object):
        self.content = content

    def image(self):
        return self.content

    def copy(self, text: str) -> str:
        self.content = text
        return "a hand"


@pytest.fixture
def chat(nano, capsys):
    """(lines, options) -> the chat behind these lines. talk: one that goes on."""

    def go(*lines: str, talk: Talk | None = None, clipboard: Clipboard | None = None, **options) -> Talk:
        if talk is None:
            conversation = Conversation(*nano, **{**OPTIONS, **options})
            talk = Talk(conversation, Script(()), Notes(), name="nano", clipboard=clipboard)
        talk.reader, talk.screen = Script(lines), Notes()
        with suppress(Paused):
            run(talk)
        return talk

    return go


def asked(talk: Talk) -> list[str]:
    return [message["content"] for message in talk.conversation.messages if message["role"] == "user"]


def kinds(talk: Talk) -> list[str]:
    return [part["type"] for part in talk.media]


def codes(talk: Talk) -> list[str]:
    return [text.rpartition("[")[2].removesuffix("]") for text in talk.screen.failed]


# --- the table -------------------------------------------------------------------------------------------------------


def test_help_names_every_command_in_80_columns(chat):
    talk = chat("/help")
    assert talk.screen.said == [help_text()]
    assert all(f"  /{order.name} " in help_text() for order in ORDERS) and len({o.name for o in ORDERS}) == len(ORDERS)
    assert max(map(len, help_text().splitlines())) <= 80


@pytest.mark.parametrize("line", ["/fly", "/", "/ help", "/images x", "/exit now", "/undo\n2"])
def test_what_is_no_command_is_refused_and_the_chat_goes_on(chat, line):
    talk = chat(line, "/exit", "never asked")
    assert codes(talk) == ["option_unknown"] and talk.conversation.messages == []


def test_the_nearest_command_is_named(chat):
    assert "/image?" in chat("/imgae x").screen.failed[0]


def test_two_slashes_send_one(chat):
    assert asked(chat("//undo is a command", "/undo", "//")) == ["/"]


def test_every_command_says_what_it_did(chat, tmp_path, closing):
    picture, document, other = Image.new("RGB", (64, 64)), tmp_path / "a.pdf", tmp_path / "other"
    picture.save(document)
    chat(ASK, f"/save {other}").close()
    given = {"image": SHAPES, "video": MOVING, "pdf": document, "load": other, "save": tmp_path / "talk"}
    closing(talk := chat(clipboard=Kept(picture)))
    for order in ORDERS:
        chat("/drop", ASK, talk=talk)  # what goes back needs an answer
        talk.clipboard.content = picture
        chat(f"/{order.name} {given.get(order.name, '')}".strip(), talk=talk)
        assert not talk.screen.failed, order.name
        assert (talk.screen.said and all(talk.screen.said)) or order.name == "exit", order.name
    assert talk.ended


# --- going back ------------------------------------------------------------------------------------------------------


def stored(conversation: Conversation, messages: list[dict]) -> int:
    """Tokens of the prompt of these messages that its library holds."""
    tokens = list(conversation.encode(messages).tokens)
    held = [entry.prefix.tokens.tolist() for entry in conversation.library.entries()]
    return max((len(own) for own in held if len(own) < len(tokens) and own == tokens[: len(own)]), default=0)


FULL = pytest.mark.full
WAYS = [
    (OTHER, "/undo", THIRD),
    pytest.param((OTHER, "/edit", THIRD), marks=FULL),
    pytest.param((OTHER, "/retry", "/undo", THIRD), marks=FULL),
    pytest.param((OTHER, "/edit", "", "/undo", THIRD), marks=FULL),
    pytest.param((OTHER, THIRD, "/undo", "/undo", THIRD), marks=FULL),
    pytest.param((OTHER, THIRD, "/undo", "/edit", THIRD), marks=FULL),
    pytest.param(("/image " + SHAPES, OTHER, "/undo", THIRD), marks=FULL),
]


@pytest.mark.parametrize("thinking", [False, pytest.param(True, marks=FULL)])
@pytest.mark.parametrize("lines", WAYS)
def test_what_was_taken_back_was_never_there_and_nothing_stored_is_read(chat, lines, thinking):
    options = {"enable_thinking": thinking, "system_prompt": "Be brief."}
    plain, talk = chat(ASK, THIRD, **options), chat(ASK, *lines[:-1], **options)
    before = plain.conversation.messages[:3]
    held = stored(talk.conversation, [*before, {"role": "user", "content": THIRD}])
    chat(lines[-1], talk=talk)
    assert talk.conversation.messages == plain.conversation.messages and not talk.media
    assert talk.last.text == plain.last.text and talk.last.reasoning == plain.last.reasoning
    assert talk.last.cached_tokens == held >= plain.last.cached_tokens


def test_undo_names_what_it_took_back_until_nothing_is_left(chat):
    talk = chat(ASK, OTHER + " x" * 100, "/undo", "/undo", "/undo")
    first, second = [text for text in talk.screen.said if text.startswith("took back")]
    assert OTHER in first and " x" * 100 not in first and ASK in second
    assert talk.conversation.messages == [] and codes(talk) == ["messages_invalid"]


def test_retry_answers_anew_and_reads_the_generation_prompt_alone(chat):
    talk = chat(ASK, "/retry", temp=3.0)
    assert talk.last.seed == 2 and any("seed 2" in text for text in talk.screen.said)
    assert talk.last.prompt_tokens - talk.last.cached_tokens < 10
    assert talk.conversation.messages == chat(ASK, temp=3.0, seed=2).conversation.messages
    chat("/retry", talk=talk)
    assert talk.last.seed == 3
    chat("/retry 1", talk=talk)
    assert talk.last.text == chat(ASK, temp=3.0).last.text and len(asked(talk)) == 1


def test_retry_needs_an_answer_and_a_seed(chat):
    talk = chat("/retry", ASK, "/retry x", "/retry -1", f"/retry {'9' * 5000}", "/retry 1 2")
    assert codes(talk) == ["messages_invalid", *["option_invalid"] * 4] and len(talk.conversation.messages) == 2


def test_retry_says_that_a_seed_changes_nothing_at_temperature_0(chat):
    talk = chat(ASK, "/retry")
    assert not any("/set temp" in text for text in talk.screen.said)
    chat("/set temp 0", "/retry", talk=talk)
    assert any("/set temp" in text for text in talk.screen.said[1:])


def test_edit_offers_the_message_until_it_is_sent(chat):
    talk = chat(ASK, OTHER, "/edit", "/help", f"/image {SHAPES}", THIRD, "/info")
    assert talk.reader.texts == ["", "", "", OTHER, OTHER, OTHER, "", ""]
    first, (image, text) = asked(talk)
    assert (first, image["type"], text["text"]) == (ASK, "image", THIRD) and not talk.media


@pytest.mark.parametrize("leave", ["", "^C"])
def test_an_edit_that_is_left_changes_nothing(chat, leave):
    talk = chat(f"/image {SHAPES}", ASK)
    before = list(talk.conversation.messages)
    chat(f"/video {MOVING}", "/edit", f"/image {TRIANGLE}", leave, talk=talk)
    assert talk.conversation.messages == before and kinds(talk) == ["video"]
    chat(OTHER, talk=talk)
    assert talk.conversation.messages[:2] == before and len(asked(talk)) == 2


def test_images_of_an_edited_message_stay_with_it(chat):
    talk = chat(f"/image {TRIANGLE} {SHAPES}", "What do you see?", "/edit", "What shapes are there?")
    ((*images, text),) = asked(talk)
    assert [image["image"].tokens for image in images] and len(images) == 2
    assert text["text"] == "What shapes are there?" and not talk.media
    assert talk.reader.texts[2:4] == ["", "What do you see?"]
    chat("/edit", "/drop", ASK, talk=talk)
    assert asked(talk) == [ASK]


def test_an_edit_that_is_interrupted_before_its_first_token_is_in_the_input_again(chat, monkeypatch):
    talk = chat(ASK)
    before, hidden, interrupts = list(talk.conversation.messages), Model.hidden, iter([KeyboardInterrupt()])

    def once(*given, **options):
        for interrupt in interrupts:
            raise interrupt
        return hidden(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "hidden", once)
        chat("/edit", OTHER, talk=talk)
    assert talk.conversation.messages == before and talk.reader.texts == ["", ASK, OTHER]
    chat(OTHER, talk=talk)
    assert asked(talk) == [OTHER]


def test_a_message_that_had_no_answer_is_in_the_input_again(chat, nano):
    text = "a " * nano[0].config.max_position_embeddings
    talk = chat(text, "")
    assert talk.reader.texts == ["", text, ""] and codes(talk) == ["context_length_exceeded"]


def test_reset_forgets_all_but_the_system_prompt(chat):
    talk = chat(ASK, f"/image {SHAPES}", "/reset", system_prompt="Be brief.")
    assert [message["role"] for message in talk.conversation.messages] == ["system"] and not talk.media


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("temp 0.5", "temp", 0.5),
        ("temperature 0.5", "temp", 0.5),
        ("--top-p 0.5", "top_p", 0.5),
        ("top_k 5", "top_k", 5),
        ("max-tokens 7", "max_tokens", 7),
        ("m 7", "max_tokens", 7),
        ("seed 9", "seed", 9),
        ("preset instruct", "preset", "instruct"),
        ("loop_guard on", "loop_guard", True),
        ("stop 'the end' END", "stop", ("the end", "END")),
        ("choice yes no", "choice", ("yes", "no")),
        ("regex a b|c", "regex", "a b|c"),
        ('json_schema {"type": "object"}', "json_schema", {"type": "object"}),
        ("max_pixels 65536", "max_pixels", 65536),
        ("fps 1.5", "fps", 1.5),
    ],
)
def test_set_takes_every_name_and_default_takes_it_back(chat, line, name, value):
    talk = chat(f"/set {line}")
    assert not talk.screen.failed and talk.screen.said[0].startswith(f"{name}: ")
    assert talk.conversation.options == {**OPTIONS, name: value}
    chat(f"/set {name} default", talk=talk)
    assert talk.conversation.options == {own: kept for own, kept in OPTIONS.items() if own != name}


def test_what_is_set_holds_for_the_next_answer(chat):
    talk = chat("/set max_tokens 3", "/set temp 3", "/set seed 5", OTHER)
    assert talk.last.generation_tokens == 3
    assert talk.conversation.messages == chat(OTHER, max_tokens=3, temp=3, seed=5).conversation.messages


@pytest.mark.parametrize(
    ("line", "code", "fact"),
    [
        ("tmep 1", "option_unknown", "temp"),
        ("temp -1", "option_invalid", "temp"),
        ("temp warm", "option_invalid", "warm"),
        ("max_tokens 1.5", "option_invalid", "1.5"),
        ("loop_guard perhaps", "option_invalid", "perhaps"),
        ("stop 'a", "option_invalid", "stop"),
        ("preset thinking", "option_conflict", "preset"),
        ("kv_bits 8", "option_no_effect", "--kv-bits"),
        ("--memory-limit 4", "option_no_effect", "--memory-limit"),
        ("max_kv_size 9", "option_unknown", "DeltaNet"),
        ("logprobs on", "option_unknown", "logprobs"),
        ("images x", "option_unknown", "images"),
        ("json_schema none.json", "text_unreadable", "none.json"),
    ],
)
def test_set_refuses_and_changes_nothing(chat, line, code, fact):
    talk = chat(f"/set {line}")
    assert codes(talk) == [code] and fact in talk.screen.failed[0]
    assert talk.conversation.options == OPTIONS


def test_set_alone_shows_all_options_and_their_values(chat):
    (told,) = chat("/set").screen.said
    rows = dict(line.split(None, 1) for line in told.splitlines())
    assert set(NAMES) <= set(rows) and rows["temp"] == "0.9" and rows["enable_thinking"] == "off"
    assert rows["top_k"] == "default (20)" and rows["stop"] == "default"
    assert chat("/set seed").screen.said == ["seed: 1"]


def test_every_option_that_is_listed_can_be_set_and_reset(chat):
    lines = [f"/set {name} {value}" for name in NAMES for value in ("1", "on", "x", "default")]
    talk = chat(*lines)
    assert all(f"{name}: " in "\n".join(talk.screen.said) for name in NAMES)
    refused = {"option_invalid", "option_conflict", "option_no_effect", "text_unreadable", "adapter_unknown"}
    assert set(codes(talk)) <= refused
    assert set(talk.conversation.options) <= set(NAMES)


def test_names_and_values_of_options_complete():
    assert find("set").choices("") == NAMES == completions("")
    assert "instruct" in completions("preset") and "default" in completions("temp")
    assert completions("enable_thinking")[:2] == ("on", "off") and completions("nothing") == ()
    assert find("think").choices("") == ("on", "off") and find("think").choices("on") == find("undo").choices("") == ()


def test_think_turns_thinking_on_within_a_budget_and_off(chat):
    talk = chat("/think on", ASK)
    assert talk.last.in_reasoning and talk.conversation.options["enable_thinking"] is True
    chat("/set max_tokens 300", "/think 5", talk=talk)
    assert talk.conversation.options["thinking_budget"] == 5 and "5" in talk.screen.said[-1]
    chat("/think on", talk=talk)
    assert "thinking_budget" not in talk.conversation.options
    chat("/think 5", "/think off", "/set max_tokens 3", ASK, talk=talk)
    assert not talk.last.in_reasoning and "thinking_budget" not in talk.conversation.options
    chat("/set enable_thinking default", "/set reasoning_effort none", "/think on", talk=talk)
    assert not talk.screen.failed
    before = dict(talk.conversation.options)
    chat("/think", "/think deeply", f"/think {'9' * 5000}", "/think -1", talk=talk)
    assert codes(talk) == ["option_invalid"] * 3 and talk.conversation.options == before


def test_system_is_shown_set_and_removed(chat):
    talk = chat(ASK, "/system Be brief.\nAnd kind.", "/system")
    assert talk.screen.said[-1] == "Be brief.\nAnd kind." == talk.conversation.messages[0]["content"]
    assert len(talk.conversation.messages) == 3
    chat("/system off", "/system", talk=talk)
    assert [message["role"] for message in talk.conversation.messages] == ["user", "assistant"]


# --- media -----------------------------------------------------------------------------------------------------------


class Pixels(Step):
    """Keeps how many images were encoded."""

    def __init__(self, *given):
        super().__init__(*given)
        self.encoded: list[tuple[int, int]] = []

    def images(self, done: int, total: int) -> None:
        self.encoded.append((done, total))


@pytest.mark.parametrize("kind", [PlainScreen, TerminalScreen])
def test_both_screens_show_how_many_images_are_encoded(nano, monkeypatch, kind):
    screen, steps = kind(), []

    def step(*given, **options) -> Pixels:
        steps.append(Pixels("prefill"))
        return steps[-1]

    monkeypatch.setattr(screen, "step", step)
    conversation = Conversation(*nano, **OPTIONS)
    parts = [{"type": "image", "image": name} for name in (SHAPES, TRIANGLE)]
    assert screen.answer(conversation, conversation.send([*parts, {"type": "text", "text": ASK}]))
    assert {total for _, total in steps[0].encoded} == {2}


@pytest.fixture
def blank(tmp_path) -> Path:
    """A picture whose name has a blank."""
    return Path(shutil.copy(TRIANGLE, tmp_path / "my picture.png"))


def test_images_and_videos_take_several_names(chat, blank, monkeypatch):
    monkeypatch.setenv("HOME", str(blank.parent))
    escaped = str(blank).replace(" ", r"\ ")
    several = f"/image {SHAPES} '{blank}' {escaped}"
    talk = chat(several, f"/image {blank}", f"/video {MOVING}", "/image '~/my picture.png'")
    assert kinds(talk) == ["image"] * 4 + ["video", "image"]
    told = [text.split(":")[0] for text in talk.screen.said]
    assert told == ["image 1", "image 2", "image 3", "image 4", "video 1", "image 5"]
    chat("/drop", "/drop", talk=talk)
    assert not talk.media and "5 images, 1 video" in talk.screen.said[0]


def test_a_name_that_is_wrong_adds_none_of_them(chat):
    talk = chat(f"/image {SHAPES} none.png", "/image", "/video")
    assert codes(talk) == ["media_not_found", "option_missing", "option_missing"] and not talk.media


def test_files_that_are_dropped_are_added_and_a_message_that_has_one_is_sent(chat, blank, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("my diary")
    escaped = str(blank).replace(" ", r"\ ")
    talk = chat(f"{escaped} {SHAPES}", f"'{blank}'", str(blank), MOVING)
    assert kinds(talk) == ["image"] * 4 + ["video"] and not talk.conversation.messages
    lines = [f"{SHAPES} is mine", f"don't {SHAPES}", str(text), str(tmp_path / "none.png"), f"{SHAPES} {text}"]
    assert not any(map(dropped, lines)) and not any(map(COMMAND.fullmatch, lines))
    assert asked(chat(lines[0])) == lines[:1]


def test_a_document_is_added_page_by_page(chat, tmp_path):
    pages = [Image.new("RGB", (200, 300), colour) for colour in ("red", "green", "blue")]
    file = tmp_path / "a file.pdf"
    pages[0].save(file, save_all=True, append_images=pages[1:])
    talk = chat(f"/pdf '{file}' 2-3", f"/pdf {file}", str(file))
    numbers = [part["image"].number for part in talk.media if part["type"] == "image"]
    assert numbers == [2, 3, 1, 2, 3, 1, 2, 3] and talk.attached == "8 pages"
    chat("/drop", f"/pdf '{file}' 2", "What is this?", "/edit", "And this?", talk=talk)
    ((label, page, text),) = asked(talk)
    assert (label["type"], page["image"].number, text["text"]) == ("text", 2, "And this?")


def test_paste_adds_the_image_of_the_clipboard_or_files_that_were_copied(chat):
    talk = chat("/paste", clipboard=Kept(Image.new("RGB", (64, 64), "red")))
    assert kinds(talk) == ["image"] and "64x64" in talk.screen.said[0]
    assert kinds(chat("/paste", clipboard=Kept([MOVING, SHAPES]))) == ["video", "image"]


@pytest.mark.parametrize(
    ("found", "code"), [(None, "media_not_found"), (NotImplementedError("no xclip"), "media_unreadable")]
)
def test_a_clipboard_without_an_image_is_told(chat, monkeypatch, found, code):
    def grab():
        if found:
            raise found

    monkeypatch.setattr(ImageGrab, "grabclipboard", grab)
    assert codes(chat("/paste")) == [code]


# --- the clipboard for text ------------------------------------------------------------------------------------------


def test_copy_takes_the_last_answer_without_its_reasoning(chat):
    clipboard = Kept(None)
    talk = chat("/copy", ASK, "/copy", clipboard=clipboard, enable_thinking=True, max_tokens=200)
    assert talk.last.reasoning and clipboard.content == talk.last.text and codes(talk) == ["messages_invalid"]
    assert "a hand" in talk.screen.said[-1]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """(name, status) -> a program of this name, which keeps its input in a file, is the only one."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(name: str, status: int = 0) -> Path:
        program, kept = tmp_path / name, tmp_path / f"{name}.txt"
        program.write_text(f"#!/bin/sh\nwhile read -r line; do echo \"$line\"; done > {kept}\nexit {status}\n")
        program.chmod(0o755)
        return kept

    return install


@pytest.mark.parametrize("name", ["pbcopy", "wl-copy", "xclip"])
def test_a_program_copies(programs, name):
    kept = programs(name)
    assert Clipboard().copy("schön\n") == name and kept.read_text() == "schön\n"


def test_a_program_that_fails_is_passed_by(programs):
    programs("wl-copy", status=1)
    kept = programs("xclip")
    assert Clipboard().copy("text\n") == "xclip" and kept.read_text() == "text\n"


def test_without_a_program_the_terminal_copies_and_a_pipe_is_left_alone(programs, monkeypatch, capsys):
    with refused("output_unwritable"):
        Clipboard().copy("text")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "OSC 52" in Clipboard().copy("text")
    assert capsys.readouterr().out == "\x1b]52;c;dGV4dA==\a"


# --- tools -----------------------------------------------------------------------------------------------------------

WEATHER, SKY = "What is the weather in Paris?", "21 degrees, sunny"


@pytest.fixture
def tools(tmp_path) -> Path:
    file = tmp_path / "my tools.json"
    file.write_text(json.dumps(WEATHER_TOOLS[:1]))
    return file


def test_results_of_calls_are_asked_for_and_sent(chat, tools):
    talk = chat("/tools", f"/tools {tools}", "/tools", WEATHER, SKY, temp=0, max_tokens=64)
    told = talk.screen.said
    assert "get_weather" not in told[0] and "get_weather" in told[1] and told[1].startswith(told[2])
    assert any("get_weather" in text and "Paris" in text for text in told[3:])
    assert talk.last.text == "It is 21 degrees and sunny in Paris."
    assert [message["role"] for message in talk.conversation.messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.full
def test_calls_may_stay_without_results_and_are_taken_back_with_their_question(chat, tools):
    talk = chat(f"/tools {tools}", WEATHER, "/help", "", ASK, temp=0, max_tokens=64)
    assert asked(talk) == [WEATHER, ASK] and not talk.calls
    chat("/undo", WEATHER, "/undo", talk=talk)  # while a result is asked for
    assert asked(talk) == [WEATHER] and len(talk.conversation.messages) == 2 and not talk.calls
    chat("/undo", WEATHER, SKY, "/undo", talk=talk)
    assert talk.conversation.messages == []


def test_two_calls_are_asked_about_one_after_another(chat, tools):
    calls = [
        {"id": name, "type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
        for name, city in (("a", "Paris"), ("b", "Oslo"))
    ]
    talk = chat(f"/tools {tools}")
    talk.conversation.messages = [
        {"role": "user", "content": "What is the weather in Paris and in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    chat(SKY, f"/image {SHAPES}", "4 degrees", talk=talk)
    first, second = [message for message in talk.conversation.messages if message["role"] == "tool"]
    assert (first["tool_call_id"], first["content"], second["tool_call_id"]) == ("a", SKY, "b")
    assert [part["type"] for part in second["content"]] == ["image", "text"] and not talk.media
    assert [("Paris" in text, "Oslo" in text) for text in talk.screen.said[:2]] == [(True, False), (False, True)]
    chat("/undo", talk=talk)
    assert talk.conversation.messages == []


def test_functions_that_a_session_does_not_keep_are_told_of(chat, tools, closing, tmp_path):
    path = tmp_path / "talk"
    chat(f"/tools {tools}", WEATHER, SKY, f"/save {path}", temp=0, max_tokens=64).close()
    closing(talk := chat(f"/load {path}"))
    assert any("/tools FILE" in text for text in talk.screen.said)


def test_tools_are_removed_and_a_file_that_holds_none_is_refused(chat, tools, tmp_path):
    talk = chat(f"/tools {tools}", "/tools off")
    assert "tools" not in talk.conversation.options and "no tools" in talk.screen.said[-1]
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"a": 1}')
    assert len(chat(f"/tools {wrong}", "/tools none.json", talk=talk).screen.failed) == 2


TITLE = "\x1b]0;mine\x07"  # sets the title of a terminal


def test_what_a_screen_says_controls_no_terminal(chat, nano, capsys):
    screen = PlainScreen()
    screen.say(TITLE)
    screen.fail(TITLE)
    cut = SimpleNamespace(
        limited_by="max_tokens", generation_tokens=1, cut_in_reasoning=False, cut=SimpleNamespace(name=TITLE),
        finish_reason="length",
    )  # fmt: skip
    tell_cut(cut, nano[0])
    err = capsys.readouterr().err
    assert err.count("mine") == 3 and not {"\x1b", "\x07"} & set(err)


# --- files -----------------------------------------------------------------------------------------------------------


def held(path: Path, nano) -> list[dict]:
    with Session.load(path, *nano) as session:
        return session.conversation.messages


@pytest.fixture
def closing():
    """Talks that are closed in the end."""
    talks: list[Talk] = []
    yield talks.append
    for talk in talks:
        talk.close()


def test_save_begins_a_session_that_goes_on_in_the_file(chat, nano, tmp_path):
    path = tmp_path / "my talk"
    talk = chat(ASK, "/save", f"/save '{path}'", OTHER, "/save", f"/save {path}", THIRD)
    assert codes(talk) == ["option_missing"] and talk.session.changed
    talk.close()
    assert held(path, nano) == talk.conversation.messages and len(asked(talk)) == 3


def test_save_overwrites_no_other_file(chat, tmp_path, nano, closing):
    diary, other = tmp_path / "diary", tmp_path / "other"
    diary.write_text("my diary")
    closing(talk := chat(ASK, f"/save {other}"))
    talk.close()
    before = other.read_bytes()
    closing(talk := chat(OTHER, f"/save {diary}", f"/save {other}", f"/save {tmp_path}/none/x", f"/save {tmp_path}"))
    assert codes(talk) == ["session_invalid", "output_unwritable", "output_unwritable", "session_invalid"]
    assert (diary.read_text(), other.read_bytes(), talk.session) == ("my diary", before, None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["diary", "other"]


def test_a_reset_leaves_the_file_with_the_old_conversation(chat, nano, tmp_path, closing):
    path, other = tmp_path / "talk", tmp_path / "other"
    talk = chat(f"/save {path}", "/reset", ASK, "/save", OTHER, "/reset", "/exit")
    talk.close()
    assert [message["content"] for message in held(path, nano)[::2]] == [ASK, OTHER] and not asked(talk)
    closing(talk := chat(ASK, f"/save {other}", "/reset", THIRD, "/save", "/reset", f"/load {path}"))
    assert codes(talk) == ["option_missing"] and len(held(other, nano)) == 2 and asked(talk) == [ASK, OTHER]


@pytest.fixture
def full_disk(monkeypatch):
    """A context in which no disk has room."""

    @contextmanager
    def full():
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
            yield

    return full


@pytest.mark.parametrize("leave", ["/exit", "^D"])
def test_a_save_that_fails_at_the_end_is_told_and_a_second_end_leaves(chat, tmp_path, full_disk, leave):
    talk = chat(f"/save {tmp_path / 'talk'}", ASK)
    with full_disk():
        chat(leave, "/think", talk=talk)
        assert codes(talk) == ["disk_full"] and "/save FILE" in talk.screen.failed[0]
        assert talk.screen.said and not talk.ended
        chat(leave, "/think", talk=talk)
        assert talk.ended and not talk.screen.said
        with refused("disk_full"):
            talk.close()


def test_a_chat_whose_save_failed_goes_on_in_another_file(chat, nano, tmp_path, full_disk):
    talk = chat(f"/save {tmp_path / 'talk'}", ASK)
    with full_disk():
        chat("/exit", talk=talk)
    chat(f"/save {tmp_path / 'other'}", THIRD, talk=talk)
    with full_disk():
        chat("/exit", talk=talk)
    assert codes(talk) == ["disk_full"] and not talk.ended  # the first failure does not count any more
    chat("/exit", talk=talk)
    assert talk.ended
    talk.close()
    assert [message["content"] for message in held(tmp_path / "other", nano)[::2]] == [ASK, THIRD]


def test_load_goes_on_with_the_other_conversation_and_reads_none_of_it_again(chat, tmp_path, nano, closing):
    one, two = tmp_path / "one", tmp_path / "two"
    talk = chat(ASK, f"/save {one}", system_prompt="Be brief.")
    talk.close()
    messages = list(talk.conversation.messages)
    closing(talk := chat(f"/save {two}", OTHER, f"/load {one}"))
    assert talk.session.path == one and talk.conversation.messages == messages
    assert held(two, nano)[0]["content"] == OTHER  # saved before
    question = {"role": "user", "content": THIRD}
    kept = stored(talk.conversation, [*messages, question])
    chat(THIRD, talk=talk)
    assert talk.last.cached_tokens == kept > 0
    assert talk.last.text == chat(ASK, THIRD, system_prompt="Be brief.").last.text


def test_what_is_loaded_has_no_last_answer(chat, tmp_path, closing):
    closing(talk := chat(ASK, f"/save {tmp_path / 'one'}", "/info", "/reset", OTHER, f"/save {tmp_path / 'two'}"))
    assert any("last answer" in text for text in talk.screen.said) and talk.last
    chat(f"/load {tmp_path / 'one'}", "/info", "/set seed 1", "/retry", talk=talk)
    assert not any("last answer" in text for text in talk.screen.said)
    assert talk.last.seed != 2  # of the other conversation the next


def test_a_load_that_fails_leaves_the_conversation(chat, tmp_path, nano, closing):
    diary, taken, open_ = tmp_path / "diary", tmp_path / "taken", tmp_path / "open"
    diary.write_text("my diary")
    with Session.load(taken, *nano) as session:
        session.save()
        closing(talk := chat(ASK, f"/load {taken}"))  # in no file
        assert codes(talk) == ["option_conflict"] and talk.session is None
        lines = ("/load", f"/load {open_}", f"/load {diary}", f"/load {taken}", f"/load {tmp_path / 'none'}")
        chat(f"/save {open_}", *lines, talk=talk)
    expected = ["option_missing", "option_conflict", "session_invalid", "session_busy", "session_invalid"]
    assert codes(talk) == expected and talk.session.path == open_ and asked(talk) == [ASK]
    assert not (tmp_path / "none").exists()


# --- the rest --------------------------------------------------------------------------------------------------------


def test_info_tells_what_is_held(chat, nano, tmp_path, closing):
    closing(talk := chat(f"/save {tmp_path / 'talk'}", ASK, f"/image {SHAPES}", "/info"))
    told: dict[str, list[str]] = {}
    name = ""
    for line in talk.screen.said[-1].splitlines():
        name = line[:11].strip() or name
        told.setdefault(name, []).append(line[13:])
    conversation = talk.conversation
    assert told["model"][0].startswith("nano") and told["session"] == [f"{tmp_path / 'talk'}, not saved yet"]
    used, window = len(conversation.encode(conversation.messages).tokens), nano[0].config.max_position_embeddings
    assert told["context"][0].startswith(f"{used:,} of {window:,} ")
    entries = conversation.library.entries()
    assert told["snapshots"][0].startswith(f"{len(entries)}, ") and "0.0 MB" not in told["snapshots"][0]
    assert told["option"] == ["enable_thinking: off", "max_tokens: 6", "seed: 1", "temp: 0.9"]
    assert told["attached"][0].startswith("image 1: ") and f"{talk.last.prompt_tokens} tokens" in told["last answer"][0]


def test_info_of_a_chat_that_has_not_begun(chat):
    (told,) = chat("/info").screen.said
    assert "0 of " in told and "none" in told
