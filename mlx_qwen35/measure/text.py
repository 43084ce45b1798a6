"""A text as windows of a checkpoint's tokens."""

from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.errors import InputError
from mlx_qwen35.prompt.processor import Processor

WINDOW = 512  # tokens
BEHIND = 64  # tokens that a cut behind them cannot change
MOST = 4096  # tokens, unless more are asked for


def windows(checkpoint: Checkpoint, text: str, length: int = WINDOW, most: int = MOST) -> list[list[int]]:
    """The first `most` tokens of a text, by the checkpoint's tokenizer, in windows of `length` tokens.

    A last window of 1 token, which predicts nothing, is left out. InputError when the text is shorter than 2 tokens.
    """
    if length < 2 or most < 2:
        raise InputError("option_invalid", f"length and most must be at least 2 tokens, got {length} and {most}")
    processor = Processor.from_folder(checkpoint.folder, checkpoint.config, has_vision_encoder=False)
    tokens = _first(processor, text, most)
    cut = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    cut = [window for window in cut if len(window) > 1]
    if not cut:
        raise InputError("text_too_short", f"the text must be at least 2 tokens long, got {len(tokens)}")
    return cut


def _first(processor: Processor, text: str, most: int) -> list[int]:
    """The first tokens of a text, of which no more is tokenized than they need."""
    characters = 8 * most
    while True:
        tokens = list(processor.tokenizer.encode(text[:characters], add_special_tokens=False))
        if characters >= len(text) or len(tokens) >= most + BEHIND:  # where it was cut the last ones may be others
            return tokens[:most]
        characters *= 2
