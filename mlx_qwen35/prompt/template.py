"""A checkpoint's chat template: messages -> the text of a prompt, its own control tokens marked."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template as JinjaTemplate
from jinja2 import meta
from jinja2.exceptions import TemplateError

from mlx_qwen35.errors import InputError
from mlx_qwen35.options import spelled
from mlx_qwen35.prompt.control import ControlTokens, unmarked
from mlx_qwen35.prompt.limits import Budget
from mlx_qwen35.prompt.sandbox import BUDGET, Sandbox

# What running code from outside can end in, beside the errors of Jinja.
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
        special: what the template may ask for by name, as eos_token.

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

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], budget: Budget) -> str:
        """The text of a prompt, a mark in each control token that the template wrote.

        messages and options must be plain values, see messages.py. Raises InputError in the template's own words where
        it refuses the messages, where it goes beyond the budget, and where its control tokens cannot be told from those
        in messages.
        """
        names = {"tools": None, "documents": None, **self._special, **options, "messages": messages}
        text = self._run(self._template, names, budget)
        if not self._checked:
            self._check_own_tokens()
            self._checked = True
        return text

    def _check_own_tokens(self) -> None:
        """With marks the template must render as it does without, and write every control token with its mark."""
        plain = Sandbox(str, str).from_string(self._source)
        for messages in _SAMPLES:
            names = {
                "messages": messages,
                "tools": None,
                "documents": None,
                "add_generation_prompt": True,
                **self._special,
            }
            try:
                text = self._run(self._template, names, Budget(100, 100))
                expected = self._run(plain, names, Budget(100, 100))
            except InputError:  # it need not like the sample
                continue
            if lost := self._control.unmarked_in(text):
                raise InputError(
                    "chat_template_refused",
                    "the chat template must write each control token in one piece, so that it can be told from one in "
                    f"a message; this one puts {lost[0]} together. Use another template",
                )
            if unmarked(text) != unmarked(expected):
                raise InputError(
                    "chat_template_refused",
                    "the chat template must not take apart what it wrote itself: its control tokens cannot be told "
                    "from those in messages then. Use another template",
                )

    @staticmethod
    def _run(template: JinjaTemplate, names: Mapping[str, Any], budget: Budget) -> str:
        try:
            return "".join(template.generate({**names, BUDGET: budget}))
        except (TemplateError, *_FAULTS) as error:
            raise _refused("refuses these messages", error) from error


def choose(templates: Any, tools: bool) -> str:
    """The text of the template to use, of one or several named ones, as Hugging Face stores them."""
    if isinstance(templates, Mapping):
        templates = templates.get("tool_use" if tools and "tool_use" in templates else "default")
    if templates is None:
        raise InputError(
            "chat_template_missing",
            "this checkpoint has no chat template: it completes raw text, in generate with "
            + spelled("ignore_chat_template", True),
        )
    if not isinstance(templates, str):
        raise InputError(
            "chat_template_refused",
            f"the chat template must be text, got {type(templates).__name__}. Download it again",
        )
    return templates


def _refused(what: str, error: Exception) -> InputError:
    words = " ".join(unmarked(str(error)).split())[:_WORDS]
    if not isinstance(error, TemplateError):  # Python's words need to be told what they are about
        words = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return InputError("chat_template_refused", f"the chat template {what}: {words}")
