"""A checkpoint's chat template: messages -> the text of a prompt, its own control tokens marked."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template as JinjaTemplate
from jinja2 import meta
from jinja2.exceptions import TemplateError

from mlx_qwen35.errors import InputError
from mlx_qwen35.options import spelled
from mlx_qwen35.prompt.control import ControlTokens, unmarked
from mlx_qwen35.prompt.limits import RenderLimits
from mlx_qwen35.prompt.sandbox import LIMITS, Sandbox

# Errors of code from outside, beside those of Jinja.
_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, RuntimeError, SyntaxError,
    TypeError, ValueError,
)  # fmt: skip
_WORDS = 500  # characters of an error that are shown

_CALL = {"type": "function", "function": {"name": "f", "arguments": {"k": "v"}}}
_QUESTION = {"role": "user", "content": "q"}
_SAMPLES = (
    [
        {"role": "system", "content": "s"}, _QUESTION,
        {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": [_CALL]},
        {"role": "tool", "content": "t"}, _QUESTION,
    ],
    [_QUESTION],
)  # fmt: skip


class Template:
    """One chat template, compiled.

    Args:
        source: its text.
        control: the control tokens of the checkpoint's tokenizer.
        special: the tokens that the template may use by name, as eos_token.

    Raises InputError (chat_template_refused) when it does not compile.
    """

    def __init__(self, source: str, control: ControlTokens, special: Mapping[str, str]):
        self._control = control
        self._special = {name: control.mark(text) for name, text in special.items() if isinstance(text, str)}
        try:
            environment = Sandbox(control.mark, unmarked)
            self._template = environment.from_string(source)
            self.reads = frozenset(meta.find_undeclared_variables(environment.parse(source)))  # names of its options
        except (TemplateError, *_FAULTS) as error:
            raise _refused("cannot be used", error) from error
        self._source, self._checked = source, False

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], limits: RenderLimits) -> str:
        """The text of a prompt, a mark in each control token that the template wrote.

        messages and options must be plain values, see messages.py. Raises InputError in the template's own words if it
        refuses the messages, if it exceeds the limits, and if its control tokens cannot be told from those in messages.
        """
        text = self._run(self._template, {**options, "messages": messages}, limits)
        if not self._checked:
            self._check_own_tokens()
            self._checked = True
        return text

    def _check_own_tokens(self) -> None:
        """Refuse a template that renders differently with marks, or writes a control token without its mark."""
        plain = Sandbox(str, str).from_string(self._source)
        for messages in _SAMPLES:
            names = {"messages": messages, "add_generation_prompt": True}
            try:
                text, expected = (self._run(t, names, RenderLimits(100, 100)) for t in (self._template, plain))
            except InputError:  # it may refuse the sample
                continue
            if lost := self._control.unmarked_in(text):
                rule = f"must write each control token in one piece; it puts {lost[0]} together"
            elif unmarked(text) != unmarked(expected):
                rule = "must not take apart its own text"
            else:
                continue
            raise InputError(
                "chat_template_refused",
                f"the chat template {rule}. Its control tokens cannot be told from those in messages. Use another",
            )

    def _run(self, template: JinjaTemplate, names: Mapping[str, Any], limits: RenderLimits) -> str:
        names = {"tools": None, "documents": None, **self._special, **names, LIMITS: limits}
        try:
            return "".join(template.generate(names))
        except (TemplateError, *_FAULTS) as error:
            raise _refused("refuses these messages", error) from error


def choose(templates: Any, tools: bool) -> str:
    """The template to use, of one or of several by name, as Hugging Face stores them."""
    if isinstance(templates, Mapping):
        templates = templates.get("tool_use" if tools and "tool_use" in templates else "default")
    if templates is None:
        raise InputError(
            "chat_template_missing",
            "this checkpoint has no chat template and completes raw text alone: give "
            + spelled("ignore_chat_template", True),
        )
    if not isinstance(templates, str):
        kind = type(templates).__name__
        raise InputError("chat_template_refused", f"the chat template must be text, got {kind}. Download it again")
    return templates


def _refused(what: str, error: Exception) -> InputError:
    words = " ".join(unmarked(str(error)).split())[:_WORDS]
    if not isinstance(error, TemplateError):  # Python's words need to be told what they are about
        words = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return InputError("chat_template_refused", f"the chat template {what}: {words}")
