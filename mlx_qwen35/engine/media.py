"""The images and videos of waiting sequences, encoded when a sequence's turn comes."""

from collections.abc import Mapping

import mlx.core as mx

from mlx_qwen35.engine.prefill import PromptRow
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.model import Model
from mlx_qwen35.model.vision import VisionEncoder
from mlx_qwen35.prompt.prompt import Prompt


class MediaEncoder:
    """Encodes what prompts show. Equal pixels of sequences that wait together are encoded once.

    The vision encoder stays loaded while a sequence waits whose images it must encode.
    """

    def __init__(self, model: Model):
        self.model = model
        self._expected: list[Sequence] = []
        self._encoded: dict[str, mx.array] = {}  # by digest, for expected sequences

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
        wanted = {placed.media.digest for other in self._expected for placed in other.prompt.media}
        self._encoded = {digest: array for digest, array in self._encoded.items() if digest in wanted}
        self.model.vision.release(sequence)
        self.model.vision.unload()

    def encode(self, sequence: Sequence) -> bool:
        """Encode one image or video of what is unread of its prompt; False: all are encoded."""
        media = [placed.media for placed in sequence.rest.media]
        for done, shown in enumerate(media):
            if shown.digest not in self._encoded:
                sequence.media_progress(done, len(media))
                self._encoded[shown.digest] = _encoder(self.model).encode(shown)
                return True
        return False

    def row(self, sequence: Sequence) -> PromptRow:
        """What is unread of its prompt with the embeddings of what that shows, all encoded. It waits no more."""
        row = _row(sequence.rest, self._encoded)
        self.forget(sequence)
        return row


def _encoder(model: Model) -> VisionEncoder:
    if model.vision is None:
        raise InputError("vision_missing", "this model has no vision encoder: its prompts must be text")
    return model.vision.part


def _row(prompt: Prompt, embeddings: Mapping[str, mx.array]) -> PromptRow:
    """A prompt with the embeddings of what it shows, evaluated. embeddings: by digest."""
    own = [embeddings[placed.media.digest] for placed in prompt.media]
    if not own:
        return PromptRow(prompt.tokens)
    joined = mx.concatenate(own) if len(own) > 1 else own[0]
    mx.eval(joined)
    return PromptRow(prompt.tokens, prompt.placeholders, joined)


def encode_media(model: Model, prompt: Prompt) -> PromptRow:
    """One prompt with the embeddings of its images and videos. The vision encoder is unloaded if nobody uses it."""
    try:
        media = {placed.media.digest: placed.media for placed in prompt.media}
        return _row(prompt, {digest: _encoder(model).encode(shown) for digest, shown in media.items()})
    finally:
        if model.vision:
            model.vision.unload()
