"""An option is declared once, as a field of a frozen dataclass made by `option`.

Command lines (console/options.py), checks of values and the table of docs/options.md follow from the field. `spelled`
names an option in a message as the user does, in Python or on the command line.
"""

import difflib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Any, get_args

from mlx_qwen35.errors import InputError
from mlx_qwen35.values import choice, flag, number, text, whole


@dataclass(frozen=True)
class Option:
    """One option.

    kind: the type of its value beside None; `object` for several types.
    help: its meaning, for --help and the documents.
    least, most: bounds of a number; `above` excludes the lower one.
    check: (name, value) -> the value to use, in place of the check that kind, choices and bounds give.
    read: on the command line (name, text) -> the value that is checked, where it is no text or number.
    aliases: other names; those of one letter belong to the command line alone.
    flag: its name on the command line, where that is another one.
    each: on the command line it gives one item of a list, and may be repeated.
    python_only: absent from command lines.
    prompts: the kinds of prompt that it has an effect on ("text", "raw text", "messages", "tokens"); empty: all.
    media: what a prompt must show for it to have an effect: "image", "video", "image or video"; empty: nothing.
    bare: its value on the command line where none follows it; None: one must follow.
    optional: whether its value may be None.
    """

    name: str
    kind: Any
    default: Any
    optional: bool
    help: str
    least: float | None = None
    most: float | None = None
    above: bool = False
    choices: tuple[str, ...] = ()
    check: Callable[[str, Any], Any] | None = None
    read: Callable[[str, str], Any] | None = None
    aliases: tuple[str, ...] = ()
    metavar: str | None = None
    flag: str = ""
    each: bool = False
    python_only: bool = False
    prompts: tuple[str, ...] = ()
    media: str = ""
    bare: Any = None

    @property
    def keywords(self) -> tuple[str, ...]:
        """Its names in Python."""
        return (self.name, *(alias for alias in self.aliases if len(alias) > 1))

    @property
    def flags(self) -> tuple[str, ...]:
        """Its names on the command line; a switch that is on is turned off there, one without a default either way."""
        off = (f"no_{self.name}",) if self.kind is bool and self.default is not False else ()
        on = () if self.kind is bool and self.default else (self.flag or self.name,)
        return tuple(as_flag(name) for name in (*on, *off, *self.aliases))

    @property
    def rule(self) -> str:
        """What a number must be, in words."""
        least, most = _digits(self.least), _digits(self.most)
        rule = f"above {least}" if self.above else f"at least {least}"
        if self.most is None or self.most > 1e30:
            return rule + " and finite" * (self.kind is float)
        return f"{rule} and at most {most}" if self.above else f"{least} to {most}"

    def checked(self, name: str, value: Any) -> Any:
        """The value to use, numbers of numpy and MLX made Python's. InputError, which calls the option `name`."""
        if self.check:
            return self.check(name, value)
        if self.choices:
            return choice(name, value, self.choices)
        if self.kind is int:
            assert self.least is not None
            return whole(name, value, int(self.least), None if self.most is None else int(self.most))
        if self.kind is float:
            assert self.least is not None and self.most is not None
            return number(name, value, self.rule, self.least, self.most, self.above)
        return {bool: flag, str: text}.get(self.kind, as_given)(name, value)


def _digits(number: float | None) -> str:
    return f"{number or 0:,.6f}".rstrip("0").rstrip(".")


def as_given(name: str, value: Any) -> Any:
    return value


def option(default: Any = None, *, default_factory: Any = MISSING, **declared: Any) -> Any:
    """A dataclass field that declares an option; for the keywords see `Option`."""
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=declared)
    return field(default=default, metadata=declared)


@functools.cache
def options_of(group: type) -> Mapping[str, Option]:
    """The options that a dataclass declares, by name."""
    found = {}
    for declared in fields(group):
        kinds = set(get_args(declared.type) if isinstance(declared.type, UnionType) else [declared.type])
        optional = type(None) in kinds
        kinds.discard(type(None))
        kind = kinds.pop() if len(kinds) == 1 else object
        default = None if declared.default is MISSING else declared.default
        found[declared.name] = Option(declared.name, kind, default, optional, **declared.metadata)
    return found


def check_fields(group: Any) -> None:
    """Replace the fields of a frozen dataclass of options by their checked values; None stays where the type has it."""
    for name, declared in options_of(group.__class__).items():
        value = getattr(group, name)
        if value is not None or not declared.optional:
            object.__setattr__(group, name, declared.checked(spelled(name), value))


def settle_switches(group: Any) -> None:
    """Replace None, which chooses nothing, by the default in the switches of a frozen dataclass of options."""
    for name, declared in options_of(group.__class__).items():
        if declared.kind is bool and getattr(group, name) is None:
            object.__setattr__(group, name, declared.default)


def check_keywords(given: Mapping[str, Any], groups: Iterable[type], none: bool = False) -> dict[str, Any]:
    """Name -> checked value of the options given to a Python function, aliases resolved. none: whether None stays."""
    declared = [option for group in groups for option in options_of(group).values()]
    known = {keyword: option for option in declared for keyword in option.keywords}
    checked: dict[str, Any] = {}
    for keyword, value in given.items():
        if keyword not in known:
            raise unknown_option(keyword, known)
        if value is None and not none:
            continue
        name = known[keyword].name
        if name in checked:
            raise same_option(*(keyword for keyword in known[name].keywords if none or given.get(keyword) is not None))
        checked[name] = None if value is None else known[keyword].checked(spelled(keyword), value)
    return checked


# Options of other programs, by their names in Python or on a command line, and why they are not here.
DECLINED = {
    "max_kv_size": "dropping the oldest keys and values would leave their trace in the DeltaNet layers. Start a new "
    "conversation where the context is full; keys and values in fewer bits make room for a longer one",
    "quantized_kv_start": "keys and values have one form from the first token on. To convert them later would take the "
    "memory of both forms where it is fullest, and results would depend on where chunks end",
    "adapter_path": "an adapter, whichever program made it, is the option adapter: --adapter FOLDER",
    "chat_template_config": "the switches of the template are options: --enable-thinking and --preserve-thinking",
    "draft_model": "the checkpoint's own head drafts: --mtp",
    "extra_eos_token": "give its text to --stop",
    "num_draft_tokens": "the checkpoint's own head drafts: --mtp-depth",
    "prefill_response": "in Python the last message may be the assistant's, with continue_final_message=True",
    "prompt_cache_file": "--session keeps a conversation and what was read of it",
    "quantize_activations": "activations stay in the dtype",
    "trust_remote_code": "no code of a checkpoint runs, so none must be trusted",
    "use_default_chat_template": "the checkpoint's template is the one that it was trained with",
    "kv_group_size": "64 elements of a head share a scale and a bias",
    "kv_bits": "the form of keys and values belongs to the model: load(kv_bits=...)",
    "--kv-bits": "keys and values are in no folder. It is an option of mlx_qwen35.generate, chat and doctor, and of "
    "bench with --needle",
}


def unknown_option(name: str, known: Iterable[str]) -> InputError:
    if why := DECLINED.get(name) or DECLINED.get(name.lstrip("-").replace("-", "_")):
        return InputError("option_unknown", f"there is no option {name}: {why}")
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return InputError(
        "option_unknown", f"there is no option {name}" + (f"; did you mean {nearest[0]}?" if nearest else "")
    )


def same_option(first: str, second: str) -> InputError:
    return InputError("option_conflict", f"{first} and {second} must not be given together. Leave one out")


# Name -> spelling of the options on a command line; None where options are keywords in Python.
_TYPED: ContextVar[dict[str, str] | None] = ContextVar("typed", default=None)
# Names of options that were given on a command line where others are not, as a server's.
_FLAGS: ContextVar[Collection[str]] = ContextVar("flags", default=())


def spell_as_flags(names: Collection[str]) -> None:
    """From here on `spelled` names these options as on a command line, in this thread."""
    _FLAGS.set(names)


@contextmanager
def on_command_line() -> Iterator[None]:
    """In the block `spelled` names options as on a command line."""
    token = _TYPED.set({})
    try:
        yield
    finally:
        _TYPED.reset(token)


def note_spelling(name: str, typed: str) -> None:
    """An option was typed as this. InputError where it was typed before under another name, as by an alias."""
    spellings = _TYPED.get()
    if spellings is None:
        return
    before = spellings.setdefault(name, typed)
    if before != typed:
        raise same_option(before, typed)


def spelled(name: str, value: Any = None) -> str:
    """An option as the user names it: max_tokens or --max-tokens; with a value dtype='float32' or --dtype float32."""
    typed = {} if name in _FLAGS.get() else _TYPED.get()
    if typed is None:
        return name if value is None else f"{name}={value!r}"
    if isinstance(value, bool):
        return as_flag(name if value else f"no_{name}")
    known = typed.get(name) or as_flag(name)
    return known if value is None else f"{known} {value}"


def listed(names: Iterable[str]) -> str:
    """Options as the user names them, sorted."""
    return ", ".join(spelled(name) for name in sorted(names))


def either(ways: Iterable[str]) -> str:
    """Ways out of an error: "a, b or c"."""
    *first, last = ways
    return " or ".join(filter(None, (", ".join(first), last)))


def as_flag(name: str) -> str:
    return ("--" if len(name) > 1 else "-") + name.replace("_", "-")
