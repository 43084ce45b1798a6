"""A text as windows of tokens."""

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.measure.text import windows
from mlx_qwen35.prompt.processor import Processor


def test_the_windows_of_a_long_text_are_those_of_all_its_tokens():
    checkpoint = open_checkpoint(resolve("nano"))
    text = "What is 34 + 58? " * 600 + " " * 3000 + "The moon is round.\n" * 300
    tokens = Processor.from_folder(checkpoint.folder, checkpoint.config, False).tokenizer.encode(text)
    for length, most in ((512, 1024), (7, 20), (512, 10**6)):
        cut = windows(checkpoint, text, length, most)
        assert [token for window in cut for token in window] == tokens[:most] and {*map(len, cut[:-1])} == {length}
