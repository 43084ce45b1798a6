"""The tokens of a tokenizer as bytes, and as bits of a mask."""

from bisect import bisect_left
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mlx_qwen35.engine.constraints.bits import words
from mlx_qwen35.prompt.tokenizer import bytes_of

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer


class Vocabulary:
    """The tokens of a tokenizer.

    Args:
        backend: the tokenizer.
        size: of the vocabulary V, one more than its highest id.
        stop_ids: the tokens that end an answer.
    """

    def __init__(self, backend: "Tokenizer", size: int, stop_ids: Collection[int]):
        self.size, self.words = size, words(size)
        self.stop_ids = frozenset(token for token in stop_ids if token < size)
        self._backend = backend
        self.added = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
        self.bytes = [b""] * size  # of an ordinary token; empty for all others
        never = self.stop_ids | set(self.added.values())
        for text, number in backend.get_vocab(with_added_tokens=False).items():
            if number not in never:
                self.bytes[number] = bytes_of(text)
        self.ids = {data: number for number, data in enumerate(self.bytes) if data}
        self._sorted = sorted(self.ids)
        self.longest = max(map(len, self.ids), default=0)
        self.ordinary = self.bits(self.ids.values())
        self.stops = self.bits(self.stop_ids)

    def bits(self, tokens: Iterable[int]) -> np.ndarray:
        """(W,) uint32 with the bits of these tokens."""
        bits, numbers = np.zeros(self.words, np.uint32), np.fromiter(tokens, np.uint32)
        np.bitwise_or.at(bits, numbers >> 5, np.uint32(1) << (numbers & 31))
        return bits

    def beginning_with(self, start: bytes) -> list[int]:
        """The ordinary tokens whose bytes begin so."""
        found, place = [], bisect_left(self._sorted, start)
        while place < len(self._sorted) and self._sorted[place].startswith(start):
            found.append(self.ids[self._sorted[place]])
            place += 1
        return found

    @cached_property
    def guidance(self) -> "LLTokenizer":
        """llguidance's tokenizer. Every added token is special there: no text of a grammar matches it."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Guided(self)), n_vocab=self.size, eos_token=sorted(self.stop_ids))

    def encode(self, text: bytes) -> list[int]:
        return self._backend.encode(text.decode(errors="replace"), add_special_tokens=False).ids


class _Guided:
    """The tokenizer as llguidance's TokenizerWrapper takes it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary):
        special = {number: text.encode() for text, number in vocabulary.added.items()}
        self.eos_token_id = min(vocabulary.stop_ids, default=0)
        self.special_token_ids = sorted({*special, *vocabulary.stop_ids})
        self.tokens = [special.get(number, data) for number, data in enumerate(vocabulary.bytes)]
        self._encode = vocabulary.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text)
