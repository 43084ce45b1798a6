"""Options on command lines: names of other programs, the nearest name, several files, and how errors name them."""

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from inspect import signature
from types import ModuleType

import pytest
from refusing import refused

from mlx_qwen35.bench import command as bench
from mlx_qwen35.commands import chat, generate
from mlx_qwen35.console.options import given_options
from mlx_qwen35.convert import __main__ as convert_command
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.fusion import AdapterOptions
from mlx_qwen35.convert.options import FolderOptions, WritingOptions
from mlx_qwen35.convert.recipes import StorageOptions
from mlx_qwen35.doctor import command as doctor
from mlx_qwen35.engine.options import check_options
from mlx_qwen35.options import on_command_line, option, options_of, spelled


def parse(*words: str, command: ModuleType = generate) -> Namespace:
    with on_command_line():
        return command.parser().parse(words)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (("--temperature", "0.5"), {"temp": 0.5}),
        (("--temp", "0.5"), {"temp": 0.5}),
        (("-m", "7"), {"max_tokens": 7}),
        (("--max-tokens=7",), {"max_tokens": 7}),
        (("--system", "Be brief."), {"system_prompt": "Be brief."}),
        (("--no-enable-thinking",), {"enable_thinking": False}),
        (("--stop", "a", "--stop", "b"), {"stop": ("a", "b")}),
        (("--published-limits",), {"published_limits": True}),
        ((), {}),
    ],
)
@pytest.mark.parametrize("command", [generate, chat])
def test_generate_and_chat_take_an_option_under_each_of_its_names(command, words, given):
    assert given_options(parse(*words, command=command)) == given


def test_convert_takes_the_source_as_model_too(monkeypatch, tmp_path):
    for name in ("--hf-path", "--model"):
        with pytest.raises(SystemExit) as ended:
            convert_command.main([name, str(tmp_path / "absent"), "--dry-run"])
        assert ended.value.code == 2


def test_convert_in_python_takes_what_its_command_declares():
    groups = (FolderOptions, StorageOptions, AdapterOptions, WritingOptions)
    declared = {name: option.default for group in groups for name, option in options_of(group).items()}
    parameters = {name: parameter.default for name, parameter in signature(convert).parameters.items()}
    assert parameters.keys() == declared.keys()
    assert {name: default for name, default in parameters.items() if name not in ("hf_path", "mlx_path")} == {
        name: default for name, default in declared.items() if name not in ("hf_path", "mlx_path")
    }


@pytest.mark.parametrize("names", [("bf16", "bfloat16"), ("half", "float16"), ("fp32", "float32")])
def test_dtypes_have_short_names(names):
    assert {parse("--dtype", name).dtype for name in names} == {names[1]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--temp", "1", "--temperature", "1"), ("--temp", "--temperature")),
        (("-m", "5", "--max-tokens", "5"), ("-m", "--max-tokens")),
    ],
)
def test_two_names_of_one_option_contradict_each_other(words, said):
    with refused("option_conflict", *said):
        parse(*words)


def test_the_last_of_an_option_given_twice_counts():
    assert parse("--temp", "1", "--temp", "0").temp == 0


# --- unknown ones ----------------------------------------------------------------------------------------------------

MAINS: dict[str, Callable[[list[str]], None]] = {
    "convert": convert_command.main, "bench": bench.main, "doctor": doctor.main,
}  # fmt: skip


@pytest.mark.parametrize(
    ("word", "nearest"),
    [("--tempreature", "--temperature"), ("--max-new-tokens", "--max-tokens"), ("--imge=a.png", "--image")],
)
def test_the_nearest_option_is_named_for_an_unknown_one(word, nearest):
    with refused("option_unknown", word.partition("=")[0], f"{nearest}?"):
        parse(word, "1")


@pytest.mark.parametrize(
    ("name", "word", "nearest"),
    [
        ("convert", "--quantise", "--quantize"),
        ("bench", "--prompt-length-s", "--prompt-lengths"),
        ("doctor", "--no-chek", "--no-check"),
    ],
)
def test_every_command_names_the_nearest(name, word, nearest, capsys):
    with pytest.raises(SystemExit) as ended:
        MAINS[name](["--model", "nano", word])
    assert ended.value.code == 2
    assert word in (said := capsys.readouterr().err) and f"{nearest}?" in said and "[option_unknown]" in said


def test_a_word_that_belongs_to_no_option_is_told_where_a_prompt_goes():
    with refused("option_unknown", "What is this?", "--prompt"):
        parse("--model", "nano", "What is this?")


# --- several files ---------------------------------------------------------------------------------------------------


def test_several_files_follow_one_option_and_all_keep_their_order():
    args = parse("--image", "a.png", "b.png", "--video", "c.mp4", "--image", "d.png", "--prompt", "hi")
    assert args.media == [("image", "a.png"), ("image", "b.png"), ("video", "c.mp4"), ("image", "d.png")]
    assert args.prompt == "hi"


def test_a_prompt_among_the_files_is_told_where_it_goes(tmp_path):
    (tmp_path / "a.png").touch()
    args = parse("--image", str(tmp_path / "a.png"), "What is this?")
    with refused("media_not_found", "--image", "What is this?", "--prompt"):
        generate.check_there(args.media)


# --- how errors name options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (("--temp", "-1"), "--temp "), (("--temperature", "-1"), "--temperature "), (("--temp", "x"), "--temp "),
        (("-m", "0"), "-m "), (("--max-tokens", "1.5"), "--max-tokens "), (("--stop", ""), "--stop "),
        (("--mtp", "yes"), "--mtp "), (("--dtype", "int8"), "--dtype "), (("--fps", "0"), "--fps "),
        (("--memory-limit", "0"), "--memory-limit "), (("--top-p", "nan"), "--top-p "),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_under_the_name_that_was_typed(words, typed):
    with refused("option_invalid") as caught:
        parse(*words)
    assert str(caught.value).startswith(typed)


@pytest.mark.parametrize(
    ("options", "typed", "in_python"),
    [
        ({"preset": "instruct", "enable_thinking": True}, ("--preset", "--enable-thinking"), ("enable_thinking=True",)),
        ({"fps": 2, "video_num_frames": 4}, ("--fps", "--video-num-frames"), ("fps (", "video_num_frames (")),
    ],
)
def test_options_that_exclude_each_other_are_named_as_the_caller_names_them(options, typed, in_python):
    with refused("option_conflict", *in_python) as caught:
        check_options(options)
    assert "--" not in str(caught.value)
    with on_command_line(), refused("option_conflict", *typed):
        check_options(options)


def test_an_option_is_spelled_as_in_python_or_as_on_the_command_line():
    assert (spelled("max_tokens"), spelled("dtype", "float32")) == ("max_tokens", "dtype='float32'")
    with on_command_line():
        assert (spelled("max_tokens"), spelled("dtype", "float32")) == ("--max-tokens", "--dtype float32")
        assert (spelled("keep_vision", True), spelled("enable_thinking", False)) == (
            "--keep-vision", "--no-enable-thinking",
        )  # fmt: skip
        generate.parser().parse(["-m", "5"])
        assert spelled("max_tokens") == "-m"
    assert spelled("max_tokens") == "max_tokens"


# --- declarations ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Example:
    count: int | None = option(help="", least=1, most=3, aliases=("n", "number"))
    share: float = option(0.5, help="", least=0, above=True, most=1)
    check: bool = option(True, help="")
    think: bool | None = option(help="")
    item: str | float | None = option(help="")


def test_names_follow_from_a_declaration():
    declared = options_of(Example)
    assert declared["count"].keywords == ("count", "number") and declared["count"].flags == (
        "--count",
        "-n",
        "--number",
    )
    assert declared["check"].flags == ("--no-check",)
    assert declared["think"].flags == ("--think", "--no-think")


def test_checks_follow_from_a_declaration():
    declared = options_of(Example)
    assert declared["item"].checked("item", 5) == 5
    assert declared["share"].checked("share", 1) == 1.0
    for name, value, rule in (("count", 4, "1 to 3"), ("share", 0, "above 0 and at most 1"), ("think", 1, "True or")):
        with refused("option_invalid", name, rule, value):
            declared[name].checked(name, value)


@pytest.mark.parametrize("command", [generate, chat, doctor])
def test_help_fits_a_terminal_of_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = command.parser().format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert not {"clip", "tower", "None"} & set(text.split())


@pytest.mark.parametrize(("last", "thinks"), [("--enable-thinking", True), ("--no-enable-thinking", False)])
def test_of_a_switch_the_last_word_counts(last, thinks):
    with on_command_line():
        found = given_options(parse("--prompt", "Hi", "--enable-thinking", "--no-enable-thinking", last))
    assert found["enable_thinking"] is thinks
