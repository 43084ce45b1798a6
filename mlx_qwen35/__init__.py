"""Qwen3.5 on MLX.

    from mlx_qwen35 import load, generate

    model, processor = load("nano")
    print(generate(model, processor, prompt="What is 34 + 58?"))

The way of the data: `load` finds the folder (hub), reads its headers (config, checkpoint) and builds the model. A
prompt goes through the processor to tokens, its images and clips (image, video, preprocess) to pixels; vision makes
embeddings of the pixels, positions says where each token stands; `model` embeds the tokens and runs its layers
(attention, delta_net, with the heavy step in kernels), each with its part of the conversation's cache; sampling makes a
token of the logits, and the processor text of the tokens. `generate` is the loop around it.
"""

__version__ = "0.1.0"  # pyproject.toml takes it from here

from mlx_qwen35.commands import interrupt  # before all else, for Ctrl-C while the rest is imported

with interrupt.tell_errors():
    from mlx_qwen35 import backend  # noqa: F401 (next, for a machine on which MLX cannot be loaded)

from mlx_qwen35.cache.cache import Cache, Snapshot
from mlx_qwen35.engine.conversation import Conversation
from mlx_qwen35.engine.generation import Result
from mlx_qwen35.engine.options import Options
from mlx_qwen35.engine.sampling import PRESETS, Sampling
from mlx_qwen35.errors import InputError
from mlx_qwen35.generate import batch_generate, generate, stream_generate
from mlx_qwen35.load import load
from mlx_qwen35.media.image import read_image
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.processor import Piece, Processor
from mlx_qwen35.prompt.prompt import Prompt

__all__ = [
    "PRESETS", "Cache", "Conversation", "InputError", "Media", "Model", "Options", "Piece", "Processor", "Prompt",
    "Result", "Sampling", "Snapshot", "VisionOptions", "__version__", "batch_generate", "generate", "load",
    "read_image", "stream_generate",
]  # fmt: skip
