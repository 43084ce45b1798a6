"""Options that ask for a form of the answer -> a grammar, which makes the constraint of each answer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_qwen35.engine.constraints.calls import Calls, Tool, read_tools
from mlx_qwen35.engine.constraints.compiler import Compiler, compiler_of
from mlx_qwen35.engine.constraints.constraint import Constraint
from mlx_qwen35.engine.constraints.forms import a_schema
from mlx_qwen35.engine.constraints.guidance import json_rule, regex_rule
from mlx_qwen35.engine.constraints.states import Anything, Chain, Either, End, Next, Texts
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import listed, spelled
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.values import shown

_FORMS = ("json_schema", "regex", "choice", "response_format")
_WORDS = ("none", "auto", "required")
Tools = Sequence[Mapping[str, Any]]


def compile_grammar(
    processor: Processor, options: Mapping[str, Any], tools: Tools | None = None
) -> Callable[[], Constraint] | None:
    """The form of an answer that these options ask for; None where none does. A call makes one answer's constraint.

    Args:
        options: checked: json_schema, regex, choice, response_format, tool_choice, parallel_tool_calls.
        tools: the functions that the answer may call.

    InputError for options that exclude each other, an unknown function, and what llguidance refuses.
    """
    forms = [name for name in _FORMS if name in options and not _is_text(options[name])]
    if len(forms) > 1:
        raise InputError("option_conflict", f"{listed(forms)} must not be given together: each is the whole answer")
    functions = read_tools(tools or ())
    choice = _tool_choice(options, functions)
    if forms and choice not in ("none", "auto"):
        raise InputError(
            "option_conflict",
            f"{spelled(forms[0])} must not be given with {spelled('tool_choice', choice)}, with which the answer is a "
            "call. Leave one out",
        )
    called = _called(functions, choice, bool(forms))
    if not forms and not called:
        return None
    compiler = compiler_of(processor)
    form = _form(compiler, forms[0], options[forms[0]]) if forms else None
    start = _with_calls(compiler, options, choice, called, form) if called else form
    assert start
    return lambda: Chain(start())


def _with_calls(
    compiler: Compiler, options: Mapping[str, Any], choice: str, called: Sequence[Tool], form: Next | None
) -> Next:
    """What makes the first state of an answer that may be calls, or of this form if there is one."""
    parallel = options.get("parallel_tool_calls", True) and choice in ("auto", "required")
    calls = Calls(compiler, called, parallel)
    if form:
        return lambda: Either([calls.start(), form()])
    if choice == "auto":
        return lambda: Anything({calls.opener: calls.inside})
    return calls.start


def _form(compiler: Compiler, name: str, value: Any) -> Next:
    """What makes the first state of an answer in the form of one of the options _FORMS."""
    if name == "choice":
        end = End(compiler.vocabulary)
        return lambda: Texts(compiler.vocabulary, {text.encode(): lambda: end for text in value})
    rule = regex_rule(value) if name == "regex" else json_rule(value if name == "json_schema" else _schema(value))
    return compiler.grammar(f"start: {rule}", spelled(name)).start


def _schema(response_format: Mapping[str, Any]) -> Mapping[str, Any]:
    if response_format["type"] == "json_object":
        return {"type": "object"}
    return a_schema(spelled("response_format"), response_format["json_schema"]["schema"])


def _is_text(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("type") == "text"


# --- tool_choice -----------------------------------------------------------------------------------------------------


def _tool_choice(options: Mapping[str, Any], tools: Sequence[Tool]) -> str:
    """none, auto, required, or = and a function's name."""
    given = options.get("tool_choice", "auto")
    if "tool_choice" in options and given != "none" and not tools:
        raise InputError("option_no_effect", f"{spelled('tool_choice')} must be given with {spelled('tools')}")
    if given in _WORDS:
        return given
    name, known = given if isinstance(given, str) else given["function"]["name"], [tool.name for tool in tools]
    if name not in known:
        raise InputError(
            "option_invalid",
            f"{spelled('tool_choice')} must be none, auto, required or the name of a tool; got {shown(name)}, and the "
            f"tools are {', '.join(known)}",
        )
    return f"={name}"


def _called(tools: Sequence[Tool], choice: str, form: bool) -> list[Tool]:
    """The tools whose calls are held to their schemas. With auto that takes a strict one, or a form of the answer."""
    if choice == "auto" and not form and not any(tool.strict for tool in tools):
        return []
    return [tool for tool in tools if choice in ("auto", "required", f"={tool.name}")]
