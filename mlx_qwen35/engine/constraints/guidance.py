"""What llguidance does for us: JSON by a schema, and regular expressions. It is imported when a grammar needs it."""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_qwen35.engine.constraints.states import End, Next, State
from mlx_qwen35.engine.constraints.vocabulary import Vocabulary
from mlx_qwen35.errors import InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Blanks as json.dumps writes them. Free ones let a model end in blanks without end.
_BLANKS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# A mask has all tokens that may come, not only those in which the tokenizer would spell a text that is certain.
_EVERY_TOKEN = '%llguidance {"no_forcing": true}\n'


def json_rule(schema: Mapping[str, Any], lenient: bool = False) -> str:
    """JSON that a schema allows, as an expression of Lark. lenient: pass over keywords that llguidance has not."""
    own = schema.get("x-guidance")
    settings = {**(own if isinstance(own, Mapping) else {}), **_BLANKS, **({"lenient": True} if lenient else {})}
    return f"%json {json.dumps({**_closed(schema), 'x-guidance': settings})}"


# What may add properties to an object from elsewhere: then it cannot be closed.
_ELSEWHERE = (
    "allOf", "anyOf", "oneOf", "$ref", "if", "patternProperties", "unevaluatedProperties", "dependentSchemas",
    "minProperties", "propertyNames",
)  # fmt: skip


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema whose objects have no more properties than it lists, where it does not say whether they may.

    The schema allows more. A model that is asked for listed ones would go on with names of its own.
    """
    return dict(schema) if _joins(schema) else _closed_inside(schema)


def _joins(value: Any) -> bool:
    """Whether an allOf joins several schemas somewhere: one may list what another has."""
    if isinstance(value, Mapping):
        several = value.get("allOf")
        return (isinstance(several, list) and len(several) > 1) or any(map(_joins, value.values()))
    return isinstance(value, list) and any(map(_joins, value))


def _closed_inside(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = {key: _each(key, item) for key, item in schema.items()}
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, Mapping) or any(key in schema for key in _ELSEWHERE):
        return found
    if isinstance(required, list) and all(isinstance(name, str) and name in properties for name in required):
        found.setdefault("additionalProperties", False)
    return found


def _each(key: str, item: Any) -> Any:
    """The value of a keyword, the schemas in it closed."""
    if key in ("properties", "$defs", "definitions", "patternProperties") and isinstance(item, Mapping):
        return {name: _closed_inside(schema) for name, schema in item.items()}
    if key in ("allOf", "anyOf", "oneOf", "prefixItems") and isinstance(item, list):
        return [_closed_inside(schema) for schema in item]
    return _closed_inside(item) if key in ("items", "additionalProperties") else item


def regex_rule(pattern: str) -> str:
    """A regular expression as a terminal of Lark, matched as a whole. Its digits are 0 to 9."""
    return f"/{_llguidance().regex_to_lark(without_anchors(pattern)[0], use_ascii='d')}/"


def without_anchors(pattern: str) -> tuple[str, bool]:
    """A regular expression without ^ at its beginning and $ at its end, and whether it had that."""
    last = len(pattern) - 1
    ends = pattern.endswith("$") and (last - len(pattern[:last].rstrip("\\"))) % 2 == 0
    return pattern.removeprefix("^")[: -1 if ends else None], ends


def _llguidance() -> Any:
    """The library. InputError where it is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise InputError(
            "package_missing",
            "this form of an answer needs llguidance, which is not installed: pip install 'mlx-qwen35[grammar]'",
        ) from error
    return llguidance


class Grammar:
    """A grammar of llguidance, compiled.

    Args:
        vocabulary: whose tokens it takes.
        rules: in the Lark of llguidance; `start` is the first.
        what: the option that asked for it, for errors.

    InputError if llguidance refuses it.
    """

    def __init__(self, vocabulary: Vocabulary, rules: str, what: str):
        library, self.vocabulary = _llguidance(), vocabulary
        limits = library.LLParserLimits(verbose_errors=False)  # low by themselves: a schema of 64 KB takes some 0.1 s
        self._matcher = library.LLMatcher(vocabulary.guidance, _EVERY_TOKEN + rules, log_level=0, limits=limits)
        if self._matcher.is_error():
            raise InputError("grammar_invalid", f"{what} must be something that an answer can be held to: "
                             f"{_shortened(self._matcher.get_error())}. Change it, or leave it out")  # fmt: skip

    def start(self, then: Next | None = None) -> State:
        """The state before its first token. then: what follows it; None: the answer may end where it may."""
        return Matched(_Run(self.vocabulary, self._matcher.deep_copy()), then)


def _shortened(message: str) -> str:
    """llguidance's words on one line, without the grammar that we made."""
    words = re.sub(r"^at \d+\(\d+\): ", "", re.split(r"\n\s*\d+ \| ", message)[0])
    words = re.sub(r"\s*Enable '\w+' option[^.]*\.?", "", words)  # it is none of ours
    return " ".join(words.split())[:300].rstrip(".")


class _Run:
    """A matcher of one answer, which can be taken back."""

    def __init__(self, vocabulary: Vocabulary, matcher: "LLMatcher"):
        self.vocabulary, self._matcher = vocabulary, matcher
        self._taken = 0

    def at(self, place: int) -> "LLMatcher":
        """The matcher behind its first `place` tokens, of those that it took."""
        assert place <= self._taken
        if place < self._taken:
            self._matcher.rollback(self._taken - place)
            self._taken = place
        return self._matcher

    def take(self, place: int, token: int) -> bool:
        """Go on behind the first `place` tokens; whether the grammar may end then."""
        matcher = self.at(place)
        self._checked(matcher.consume_token(token))
        self._taken += 1
        return matcher.is_accepting()

    def bits(self, place: int) -> np.ndarray:
        matcher = self.at(place)
        bits = np.zeros(self.vocabulary.words, np.uint32)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        self._checked(not matcher.is_error())
        return bits

    def _checked(self, fine: bool) -> None:
        if not fine:
            raise InputError(
                "grammar_failed",
                f"the grammar of this answer became too large: {_shortened(self._matcher.get_error())}. Simplify it",
            )


class Matched:
    """A place in a grammar of llguidance.

    With something to follow, the grammar must end with a text that nothing can follow within it.
    """

    def __init__(self, run: _Run, then: Next | None, place: int = 0):
        self._run, self._then, self._place = run, then, place

    def bits(self) -> np.ndarray:
        return self._run.bits(self._place)

    def allows(self, token: int) -> bool:
        matcher = self._run.at(self._place)
        if token in self._run.vocabulary.stop_ids:
            return self._then is None and matcher.is_accepting()
        return matcher.validate_tokens([token]) == 1

    def after(self, token: int) -> State:
        if token in self._run.vocabulary.stop_ids:
            return End(self._run.vocabulary)
        may_end = self._run.take(self._place, token)
        return self._then() if self._then and may_end else Matched(self._run, self._then, self._place + 1)
