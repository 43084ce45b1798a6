"""What is to be read: tokens, and the images and clips behind their placeholders."""

from dataclasses import dataclass

from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.prompt.positions import Run


@dataclass(frozen=True)
class Placed:
    """An image or a clip and where its tokens are: one run for an image, one for each pair of frames of a clip."""

    media: Media
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Prompt:
    """Tokens to be read, placeholders expanded; whether generation starts inside a thinking block; what they show."""

    tokens: tuple[int, ...]
    thinking: bool
    media: tuple[Placed, ...] = ()

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(run for placed in self.media for run in placed.runs)

    def identity(self, length: int | None = None) -> tuple:
        """Equal for prompts whose first `length` tokens are the same and show the same pixels."""
        length = len(self.tokens) if length is None else length
        shown = (placed for placed in self.media if placed.runs[0].start < length)
        return self.tokens[:length], tuple((placed.media.digest, placed.runs) for placed in shown)

    def after(self, length: int) -> "Prompt":
        """The prompt without its first tokens; the cut must not go through an image."""
        media = [placed for placed in self.media if placed.runs[-1].stop > length]
        assert all(placed.runs[0].start >= length for placed in media), "a prompt must not be cut inside an image"
        moved = (Placed(p.media, tuple(run._replace(start=run.start - length) for run in p.runs)) for p in media)
        return Prompt(self.tokens[length:], self.thinking, tuple(moved))
