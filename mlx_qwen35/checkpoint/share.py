"""The part of a text model that one of several machines holds, cut from a checkpoint before a model is made of it."""

from dataclasses import dataclass

from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.config import TextConfig


@dataclass(frozen=True)
class Share:
    """What a machine holds of the text model: some of the layers, a part of each, some rows of the table of tokens.

    layers: of the model. part, parts: of the heads and the MLP's rows of each layer, this is number `part` of `parts`.
    rows: of the vocabulary, in the table and in the head.
    """

    layers: range
    rows: range
    part: int = 0
    parts: int = 1

    @classmethod
    def tensor(cls, config: TextConfig, rank: int, size: int) -> "Share":
        """Every layer, of each the heads and rows number `rank` of `size`, and as much of the vocabulary."""
        raise NotImplementedError

    @classmethod
    def pipeline(cls, config: TextConfig, layers: range) -> "Share":
        """These layers whole. With the first layer the whole vocabulary; with others no row of it."""
        raise NotImplementedError

    def of_config(self, config: TextConfig) -> TextConfig:
        """The configuration of what is held: its layers, heads, widths and rows, as of a smaller model."""
        raise NotImplementedError

    def of(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint as a smaller model's, whose tensors are cut as they are read. InputError for a cut that cannot
        be.
        """
        raise NotImplementedError

    def of_adapter(self, adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
        """The low-rank pairs beside what is held, cut alike. checkpoint: the whole one."""
        raise NotImplementedError
