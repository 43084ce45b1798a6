"""Commands that change options between turns: /set, /think, /system, /tools."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_qwen35.commands.chat.attach import one_name
from mlx_qwen35.commands.chat.talk import Talk
from mlx_qwen35.engine.constraints.calls import read_tools
from mlx_qwen35.engine.constraints.forms import read_tool_list
from mlx_qwen35.engine.conversation import OF_ONE_PROMPT
from mlx_qwen35.engine.options import GROUPS, GenerationOptions
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions
from mlx_qwen35.options import Option, as_flag, options_of, unknown_option
from mlx_qwen35.values import shown

ANEW = "the prompt is read anew from its beginning"
DEFAULT = "default"  # the value that resets an option
_ELSEWHERE = {*OF_ONE_PROMPT, "logprobs", "top_logprobs"}  # --json alone shows those two
_SWITCH = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def _named(*groups: type) -> dict[str, Option]:
    """Options of a command line, by each of their names."""
    declared = [option for group in groups for option in options_of(group).values() if not option.python_only]
    return {name: option for option in declared for name in (option.name, option.flag, *option.aliases) if name}


_ADAPTER = {"adapter": options_of(GenerationOptions)["adapter"]}  # on the command line that is the folder of one
SETTABLE: Mapping[str, Option] = _ADAPTER | {
    name: own for name, own in _named(*GROUPS).items() if own.name not in _ELSEWHERE
}
_LOADING = {name: own for name, own in _named(LoadOptions).items() if name not in SETTABLE}


def find(name: str) -> Option:
    """The option of this name, as in Python or as a flag. InputError for another, with the nearest."""
    key = name.lstrip("-").replace("-", "_")
    if key in _LOADING:
        flag = as_flag(_LOADING[key].name)
        raise InputError("option_no_effect", f"{flag} is an option of loading: leave, and start again with {flag}")
    if key not in SETTABLE:
        raise unknown_option(key, SETTABLE)
    return SETTABLE[key]


NAMES = sorted({option.name for option in SETTABLE.values()})


def completions(before: str) -> Sequence[str]:
    """What may come next behind /set: a name, and behind it a value that has a name."""
    if not before.strip():
        return NAMES
    option = SETTABLE.get(before.strip())
    values = ("on", "off") if option and option.kind is bool else option.choices if option else ()
    return (*values, DEFAULT) if option else ()


def set_option(talk: Talk, argument: str) -> None:
    name, *rest = argument.split(None, 1)
    option = find(name)
    if rest:
        talk.conversation.change(**{option.name: _value(option, rest[0])})
    talk.screen.say(f"{option.name}: {_current(talk, option.name)}")


def set_or_show(talk: Talk, argument: str) -> None:
    if argument:
        set_option(talk, argument)
        return
    width = max(map(len, NAMES))
    lines = [f"{name:{width}}  {_current(talk, name)}" for name in NAMES]
    talk.screen.say("\n".join([*lines, f"/set OPTION VALUE changes one, /set OPTION {DEFAULT} resets it."]))


def changed(talk: Talk) -> dict[str, str]:
    """The options that are not at their defaults, by name, and how their values are shown."""
    return {name: _shown(value) for name, value in sorted(talk.conversation.options.items())}


def _current(talk: Talk, name: str) -> str:
    given: Mapping[str, Any] = talk.conversation.options
    if name in given:
        return _shown(given[name])
    if name in options_of(Sampling):
        return f"{DEFAULT} ({getattr(talk.conversation.sampling, name)})"
    return DEFAULT


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) if isinstance(value, int | float) else shown(value)


def _value(option: Option, text: str) -> Any:
    """The value that a text stands for; None: the default."""
    if text == DEFAULT:
        return None
    if option.kind is bool:
        if text not in _SWITCH:
            raise InputError("option_invalid", f"{option.name} must be on, off or {DEFAULT}, got {shown(text)}")
        return _SWITCH[text]
    if option.read:
        return option.read(option.name, one_name(text))
    if option.each:
        return _words(option.name, text)
    return number(text, option.kind) if option.kind in (int, float) else text


def number(text: str, kind: type = int) -> Any:
    """The number that is typed; other text as it is, for a check that says the rule."""
    try:
        return kind(text)
    except ValueError:
        return text


def _words(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError("option_invalid", f"{name} must be words, or texts in quotation marks: {error}") from error


def think(talk: Talk, argument: str) -> None:
    """on: without a budget. A number is a budget, and turns thinking on."""
    budget = None if argument in _SWITCH else number(argument)
    if isinstance(budget, str) and argument:
        raise InputError("option_invalid", f"/think must be on, off or a number of tokens, got {shown(argument)}")
    if argument:
        thinks = _SWITCH.get(argument, True)
        talk.conversation.change(enable_thinking=thinks, thinking_budget=budget, reasoning_effort=None)
    given = talk.conversation.options
    switch = given.get("enable_thinking")
    state = "as the preset or the chat template has it" if switch is None else _shown(switch)
    most = f", at most {given['thinking_budget']:,} tokens" if "thinking_budget" in given else ""
    talk.screen.say(f"thinking: {state}{most}")


def system(talk: Talk, argument: str) -> None:
    if argument:
        talk.conversation.change(system_prompt=None if argument == "off" else argument)
        told = "no system prompt" if argument == "off" else f"system prompt of {len(argument):,} characters"
        talk.screen.say(f"{told}; {ANEW}")
    else:
        talk.screen.say(talk.conversation.system or "there is no system prompt; /system TEXT sets one")


def tools(talk: Talk, argument: str) -> None:
    if argument:
        talk.conversation.change(tools=None if argument == "off" else read_tool_list("/tools", one_name(argument)))
    found = read_tools(talk.conversation.options.get("tools", ()))
    names = ", ".join(tool.name for tool in found)
    told = f"{len(found)} tool{'s' * (len(found) > 1)}: {names}" if found else "no tools"
    talk.screen.say(f"{told}; {ANEW}" if argument else told)
