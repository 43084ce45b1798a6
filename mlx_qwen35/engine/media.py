"""The images and videos of waiting sequences, encoded when a sequence's turn comes."""

from collections.abc import Sequence as Many
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.engine.prefill import PromptRow
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.model import Model
from mlx_qwen35.model.vision import VisionEncoder
from mlx_qwen35.prompt.prompt import Placed, Prompt


class Shown(NamedTuple):
    """What an embedding is of: pixels by their digest, and the adapter of the vision encoder, "" for none."""

    digest: str
    adapter: str


class MediaEncoder:
    """Encodes what prompts show. Equal pixels of sequences that wait together are encoded once, and once more for each
    adapter that changes the vision encoder.

    The vision encoder stays loaded while a sequence waits whose images it must encode.
    """

    def __init__(self, model: Model):
        self.model = model
        self._expected: list[Sequence] = []
        self._encoded: dict[Shown, mx.array] = {}  # for expected sequences

    def expect(self, sequence: Sequence) -> None:
        """A sequence waits. InputError if it shows an image and the model has no vision encoder."""
        if not sequence.prompt.media:
            return
        if self.model.vision is None:
            raise InputError("vision_missing", "this model has no vision encoder: its prompts must be text")
        self.model.vision.acquire(sequence)
        self._expected.append(sequence)

    def forget(self, sequence: Sequence) -> None:
        """A sequence does not wait any more."""
        if sequence not in self._expected:
            return
        assert self.model.vision is not None
        self._expected.remove(sequence)
        wanted = {self._shown(other, placed) for other in self._expected for placed in other.prompt.media}
        self._encoded = {shown: array for shown, array in self._encoded.items() if shown in wanted}
        self.model.vision.release(sequence)
        self.model.vision.unload()

    def encode(self, sequence: Sequence) -> bool:
        """Encode one image or video of what is unread of its prompt; False: all are encoded."""
        media, adapters = sequence.rest.media, self.model.adapters
        for done, placed in enumerate(media):
            shown = self._shown(sequence, placed)
            if shown not in self._encoded:
                sequence.media_progress(done, len(media))
                active = adapters.active([shown.adapter])
                self._encoded[shown] = _encoder(self.model).encode(placed.media, active)
                return True
        return False

    def row(self, sequence: Sequence) -> PromptRow:
        """What is unread of its prompt with the embeddings of what that shows, all encoded. It waits no more."""
        prompt = sequence.rest
        row = _row(prompt, [self._encoded[self._shown(sequence, placed)] for placed in prompt.media])
        self.forget(sequence)
        return row

    def _shown(self, sequence: Sequence, placed: Placed) -> Shown:
        return Shown(placed.media.digest, self.model.adapters.of_vision(sequence.adapter))


def _encoder(model: Model) -> VisionEncoder:
    if model.vision is None:
        raise InputError("vision_missing", "this model has no vision encoder: its prompts must be text")
    return model.vision.part


def _row(prompt: Prompt, embeddings: Many[mx.array]) -> PromptRow:
    """A prompt with the embeddings of what it shows, in order, evaluated."""
    if not embeddings:
        return PromptRow(prompt.tokens)
    joined = mx.concatenate(list(embeddings)) if len(embeddings) > 1 else embeddings[0]
    mx.eval(joined)
    return PromptRow(prompt.tokens, prompt.placeholders, joined)


def encode_media(model: Model, prompt: Prompt) -> PromptRow:
    """One prompt with the embeddings of its images and videos. The vision encoder is unloaded if nobody uses it."""
    try:
        media = {placed.media.digest: placed.media for placed in prompt.media}
        encoded = {digest: _encoder(model).encode(shown) for digest, shown in media.items()}
        return _row(prompt, [encoded[placed.media.digest] for placed in prompt.media])
    finally:
        if model.vision:
            model.vision.unload()
