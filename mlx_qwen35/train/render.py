"""A conversation or a text -> tokens as inference sees them, and which of them are learnt.

Each answer is learnt behind the very prompt that asks for it. A chat template writes a later prompt anew: as a rule it
takes the reasoning from earlier turns. Where it does not, as between the calls of one turn, the later prompt begins
with the earlier one and its answer. Then one row teaches both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.prompt.parts import kind_of
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Placed, Prompt
from mlx_qwen35.prompt.tokenizer import END_TOKENS
from mlx_qwen35.train.forms import Talk, Text


class Learnt(NamedTuple):
    """A run of targets. thinking: whether it begins inside the reasoning."""

    start: int
    stop: int
    thinking: bool


@dataclass(frozen=True)
class Rendered:
    """A row in its whole length, up to its last target.

    learnt: the answers that it teaches, or the text. answers: which of `Talk.answers` these are, first and last + 1; 0
    and 0 for a text.
    """

    tokens: tuple[int, ...]
    learnt: tuple[Learnt, ...]
    media: tuple[Placed, ...]
    answers: tuple[int, int] = (0, 0)


class Renderer:
    """Renders rows with a checkpoint's tokenizer, chat template and preprocessor. vision: how images are read."""

    def __init__(self, processor: Processor, vision: VisionOptions = VisionOptions()):  # noqa: B008 (frozen)
        self.processor, self.vision = processor, vision

    def rows(self, said: Talk | Text, answers: tuple[int, int] | None = None) -> Iterator[Rendered]:
        """The rows that a conversation or a text gives. answers: those of a conversation to render; None: all.

        Raises InputError for messages that the chat template refuses, and for images that cannot be read.
        """
        if isinstance(said, Text):
            yield self._text(said)
            return
        first, last = answers or (0, len(said.answers))
        messages = self._seen(said.messages[: said.answers[last - 1] + 1])
        template = {"tools": said.tools} if said.tools else {}
        row: Rendered | None = None
        for number in range(first, last):
            prompt, answer = self.processor.encode_answered(
                messages[: said.answers[number] + 1], self.vision, **template
            )
            if row and not _begins(row, prompt):
                yield row
                row = None
            row = _taught(row, number, prompt, answer)
        if row:
            yield row

    def _seen(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with their images and videos read, each once for all the prompts that show it."""
        return [
            {**message, "content": self.processor.read_parts(content, self.vision)}
            if isinstance(content := message.get("content"), list) and any(map(kind_of, content))
            else message
            for message in messages
        ]

    def _text(self, said: Text) -> Rendered:
        """A text up to its end token, which is added where it has none. Placeholders are no targets."""
        bare = said.text.rstrip()
        ended = bare.endswith(END_TOKENS)
        images, videos = (said.media.get(kind, ()) for kind in ("image", "video"))
        prompt = self.processor.encode_text(bare if ended else said.text, images, videos, self.vision)
        ends = self.processor.tokenizer.eos_token_ids or self.processor.stop_ids
        tokens = (*prompt.tokens, *([] if ended else sorted(ends)[:1]))
        return Rendered(tokens, (Learnt(1, len(tokens), False),), prompt.media)


def _begins(row: Rendered, prompt: Prompt) -> bool:
    """Whether a prompt begins with a row: then their answers can be learnt together."""
    return Prompt(row.tokens, False, row.media).identity() == prompt.identity(len(row.tokens))


def _taught(row: Rendered | None, number: int, prompt: Prompt, answer: Sequence[int]) -> Rendered:
    """A row with one more answer, behind the prompt that asks for it."""
    tokens = (*prompt.tokens, *answer)
    learnt = Learnt(len(prompt.tokens), len(tokens), prompt.thinking)
    first = row.answers[0] if row else number
    return Rendered(tokens, (*(row.learnt if row else ()), learnt), prompt.media, (first, number + 1))
