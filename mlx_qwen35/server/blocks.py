"""An answer as it comes -> its blocks. Anthropic's API and OpenAI's responses write an answer as a list of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mlx_qwen35.prompt.piece import ARGUMENTS, CALL, CALL_END, REASONING, Piece
from mlx_qwen35.server.trimmed import Trimmed


@dataclass
class Block:
    """A stretch of an answer that is all reasoning, all content, or one call.

    kind: REASONING, CONTENT or CALL. id, name: of a call. text: what has come; of a call its arguments in JSON. whole:
    whether it came to its own end; of a call, whether it may be run.
    """

    number: int
    kind: str
    id: str = ""
    name: str = ""
    text: str = ""
    whole: bool = False


class Change(NamedTuple):
    """What happens to a block; text: what is new of it."""

    what: Literal["begin", "text", "end"]
    block: Block
    text: str = ""


class Blocks:
    """The blocks so far. Reasoning has no blanks at its ends, as in `Result`; a block of blanks alone never begins."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None
        self._reasoning = Trimmed()

    def add(self, pieces: Iterable[Piece]) -> Iterator[Change]:
        """The changes that pieces make. Take all of them: each is made as it is taken."""
        for piece in pieces:
            kind = CALL if piece.kind in (ARGUMENTS, CALL_END) else piece.kind
            text = self._reasoning.add(piece.text) if kind == REASONING else piece.text
            if kind != CALL and not text:
                continue
            if self._open is None or self._open.kind != kind or piece.kind == CALL:
                yield from self.end()
                self._open = Block(len(self.all), kind, piece.id, piece.name)
                self.all.append(self._open)
                yield Change("begin", self._open)
            if text:
                self._open.text += text
                yield Change("text", self._open, text)
            if piece.kind == CALL_END:
                self._open.whole = True
                yield from self.end()

    def end(self, cut: bool = False) -> Iterator[Change]:
        """End the last block. cut: the answer did not end by itself."""
        if self._open:
            block, self._open = self._open, None
            block.whole = block.whole or not (cut or block.kind == CALL)
            yield Change("end", block)
