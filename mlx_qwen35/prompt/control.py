"""Control tokens: the template's own, or a raw text's, become tokens; in texts from outside they stay text.

The string of every added token of the tokenizer, <|im_start|> or <think>, is a control token where the template writes
it, and ordinary text where a user, a tool or an answer does. So the template's own strings are marked inside the tag
before it is rendered. A tag that bears no mark came from outside, however it got there: in one piece, put together from
two parts, or from a text and what the template has beside it.
"""

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from mlx_qwen35.errors import InputError
from mlx_qwen35.prompt.tokenizer import encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Lone surrogates, so no valid text holds them: texts are checked before, and no string operation makes one.
MARK = "\ud800"  # in a control token that is the template's own
VEIL = "\ud801"  # in one that a user wrote, so that the template does not take it for its own while it decides things
_MARKS = {ord(MARK): None, ord(VEIL): None}


def marked(tag: str) -> str:
    return tag[:1] + MARK + tag[1:]


def unmarked(text: str) -> str:
    """The text as it is meant, without marks."""
    return text.translate(_MARKS) if MARK in text or VEIL in text else text


def check_text(text: str, name: Callable[[], str] = lambda: "the text") -> None:
    """InputError unless a text can be written in UTF-8. name: what the text is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            "text_invalid",
            f"a prompt must be valid Unicode text, in UTF-8 where it is typed or piped; {name()} is not: {error}",
        ) from error


class ControlTokens:
    """The added tokens of one tokenizer."""

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        self.ids = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
        self._numbers = frozenset(self.ids.values())
        longest_first = sorted(filter(None, self.ids), key=len, reverse=True)
        self._tags = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._own = re.compile("|".join(re.escape(marked(tag)) for tag in longest_first) or "(?!)")

    def mark(self, text: str) -> str:
        """A text of the template's own, with a mark in each tag."""
        return self._tags.sub(lambda match: marked(match.group()), text)

    def unmarked_in(self, text: str) -> list[str]:
        """The tags without a mark in a rendered text."""
        return self._tags.findall(text)

    def veil(self, texts: list[str]) -> list[str]:
        """Neighbouring texts from outside, with a veil in each tag, even in a tag that spans several texts."""
        joined = "".join(texts)
        places = [match.start() + 1 for match in self._tags.finditer(joined)]
        out, start = [], 0
        for text in texts:
            stop = start + len(text)
            cuts = [start, *(place for place in places if start < place <= stop), stop]
            pieces = (joined[a:b] for a, b in pairwise(cuts))
            out.append(VEIL.join(pieces))
            start = stop
        return out

    def encode(self, text: str) -> list[int]:
        """Tokens of a rendered text: marked tags are control tokens, all else is ordinary text.

        If the text without marks has no other control tokens, these are that text's tokens. Raises InputError if the
        tokenizer makes a control token of ordinary text.
        """
        plain = unmarked(text)
        tokens = self._encode(plain)
        own = [unmarked(tag) for tag in self._own.findall(text)]
        if [token for token in tokens if token in self._numbers] == [self.ids[tag] for tag in own]:
            return tokens
        pieces = [unmarked(piece) for piece in self._own.split(text)]
        tokens = self._as_text(pieces[0])
        for tag, piece in zip(own, pieces[1:], strict=True):
            tokens += [self.ids[tag], *self._as_text(piece)]
        return tokens

    def encode_raw(self, text: str) -> list[int]:
        """Tokens of a text in which every tag is a control token."""
        return self._encode(unmarked(text))

    def among(self, tokens: Sequence[int]) -> list[int]:
        """Where tokens are control tokens."""
        return [place for place, token in enumerate(tokens) if token in self._numbers]

    def _encode(self, text: str) -> list[int]:
        return encode(self._tokenizer, text)

    @cached_property
    def _bare(self) -> "Tokenizer":
        """The tokenizer without added tokens."""
        bare = type(self._tokenizer)(self._tokenizer.model)
        bare.normalizer, bare.pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        return bare

    def _as_text(self, text: str) -> list[int]:
        """Tokens of a text without control tokens, as a tokenizer without added tokens makes them."""
        tokens = self._encode(text)
        if self._numbers.isdisjoint(tokens):
            return tokens
        tokens = encode(self._bare, text)
        if not self._numbers.isdisjoint(tokens):
            raise InputError(
                "text_invalid",
                "the tokenizer must be able to encode every text without control tokens; for this one it makes "
                f"{', '.join(tag for tag, number in self.ids.items() if number in tokens)} of it. Leave that out",
            )
        return tokens
