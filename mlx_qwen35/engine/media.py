"""The images and videos of waiting prompts, encoded when a prompt's turn comes."""

import mlx.core as mx

from mlx_qwen35.engine.prefill import PromptRow
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.prompt import Prompt


class MediaEncoder:
    """Encodes what prompts show. Equal pixels of prompts that wait together are encoded once.

    The vision encoder stays loaded while a prompt that it must encode waits.
    """

    def __init__(self, model: Model):
        self.model = model
        self._expected: list[Prompt] = []
        self._encoded: dict[str, mx.array] = {}  # by digest, for expected prompts

    def expect(self, prompt: Prompt) -> None:
        """A prompt waits to be encoded. InputError if the model has no vision encoder for its images."""
        if not prompt.media:
            return
        if self.model.vision is None:
            raise InputError("vision_missing", "this model has no vision encoder: its prompts must be text")
        self.model.vision.acquire()
        self._expected.append(prompt)

    def forget(self, prompt: Prompt) -> None:
        """A prompt does not wait any more."""
        if not any(expected is prompt for expected in self._expected):
            return
        assert self.model.vision is not None
        self._expected = [expected for expected in self._expected if expected is not prompt]
        wanted = {placed.media.digest for expected in self._expected for placed in expected.media}
        self._encoded = {digest: array for digest, array in self._encoded.items() if digest in wanted}
        self.model.vision.release()
        self.model.vision.unload()

    def encode(self, prompt: Prompt) -> PromptRow:
        """The prompt with the embeddings of what it shows, evaluated."""
        if not prompt.media:
            return PromptRow(prompt.tokens)
        assert self.model.vision is not None
        try:
            for placed in prompt.media:
                if placed.media.digest not in self._encoded:
                    self._encoded[placed.media.digest] = self.model.vision.part.encode(placed.media)
            own = [self._encoded[placed.media.digest] for placed in prompt.media]
            embeddings = mx.concatenate(own) if len(own) > 1 else own[0]
            mx.eval(embeddings)
        finally:
            self.forget(prompt)
        return PromptRow(prompt.tokens, prompt.placeholders, embeddings)


def encode_media(model: Model, prompt: Prompt) -> PromptRow:
    """One prompt with the embeddings of its images and videos."""
    encoder = MediaEncoder(model)
    encoder.expect(prompt)
    return encoder.encode(prompt)
