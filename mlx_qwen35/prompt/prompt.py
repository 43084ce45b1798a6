"""A prompt: its tokens, and the images and videos behind its placeholders."""

from dataclasses import dataclass, field

from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.prompt.marks import Mark
from mlx_qwen35.prompt.positions import Placeholder


@dataclass(frozen=True)
class Placed:
    """An image or a video in a prompt. An image has one placeholder, a video one for each pair of frames."""

    media: Media
    placeholders: tuple[Placeholder, ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt for the model.

    tokens: ids, with placeholders repeated. thinking: whether generation starts inside a thinking block. media: the
    images and videos, in the order of their placeholders. marks: where another prompt may go on otherwise, in order.
    """

    tokens: tuple[int, ...]
    thinking: bool
    media: tuple[Placed, ...] = ()
    marks: tuple[Mark, ...] = field(default=(), compare=False)

    @property
    def placeholders(self) -> tuple[Placeholder, ...]:
        return tuple(p for placed in self.media for p in placed.placeholders)

    def identity(self, length: int | None = None) -> tuple:
        """Equal for prompts whose first `length` tokens are the same and show the same pixels."""
        length = len(self.tokens) if length is None else length
        shown = (placed for placed in self.media if placed.placeholders[0].start < length)
        return self.tokens[:length], tuple((placed.media.digest, placed.placeholders) for placed in shown)

    def after(self, length: int) -> "Prompt":
        """The prompt without its first `length` tokens. They must not end inside an image or a video."""
        rest = []
        for placed in self.media:
            placeholders = placed.placeholders
            if placeholders[-1].stop > length:
                assert placeholders[0].start >= length, "a prompt must not be cut inside an image or a video"
                rest.append(Placed(placed.media, tuple(p._replace(start=p.start - length) for p in placeholders)))
        return Prompt(self.tokens[length:], self.thinking, tuple(rest))
