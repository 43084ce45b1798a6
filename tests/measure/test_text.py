"""A text as windows of tokens."""

import pytest

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.measure.text import windows
from mlx_qwen35.prompt.processor import Processor


@pytest.mark.parametrize("text", ["assistant " * 900, "What is 34 + 58? " * 300])
def test_the_windows_of_a_long_text_are_those_of_all_its_tokens(text):
    checkpoint = open_checkpoint(resolve("nano"))
    tokens = Processor.from_folder(checkpoint.folder, checkpoint.config, False).tokenizer.encode(text)
    for length, most in ((64, 512), (7, 20), (512, 10**6)):
        cut = windows(checkpoint, text, length, most)
        assert [token for window in cut for token in window] == tokens[:most] and {*map(len, cut[:-1])} <= {length}
