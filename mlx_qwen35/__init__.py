"""Qwen3.5 on MLX.

    from mlx_qwen35 import load, generate

    model, processor = load("nano")
    print(generate(model, processor, prompt="What is 34 + 58?"))

`load` finds the folder, reads its headers (checkpoint/), checks that the model fits (budget/) and builds it (model/).
The processor turns messages into tokens (prompt/), images and videos into patches (media/). The engine encodes the
patches, prefills the tokens in chunks and decodes (engine/): each step runs the layers (model/, with kernels/ for the
operations and cache/ for the states) and samples a token from the logits. The processor turns tokens into text.
"""

__version__ = "0.1.0"  # pyproject.toml takes it from here

from mlx_qwen35 import gate  # noqa: F401 (first, for a Python that cannot read the rest)
from mlx_qwen35.console import interrupt  # second, for Ctrl-C during the other imports

if not interrupt.IS_UMBRELLA:  # the help of the command mlx_qwen35 comes at once: what it runs imports the rest
    with interrupt.tell_errors():
        from mlx_qwen35 import backend  # noqa: F401 (third, for a machine on which MLX cannot be loaded)

    from mlx_qwen35.cache.cache import Cache, Snapshot
    from mlx_qwen35.distributed.loading import load_distributed
    from mlx_qwen35.engine.conversation import Conversation
    from mlx_qwen35.engine.logprobs import TokenLogprob, TopLogprob
    from mlx_qwen35.engine.options import Options
    from mlx_qwen35.engine.presets import PRESETS, Sampling
    from mlx_qwen35.engine.result import Result
    from mlx_qwen35.engine.session import Session
    from mlx_qwen35.errors import InputError
    from mlx_qwen35.generate import batch_generate, generate, stream_generate
    from mlx_qwen35.load import load
    from mlx_qwen35.measure.score import Score, score
    from mlx_qwen35.media.image import read_image
    from mlx_qwen35.media.options import VisionOptions
    from mlx_qwen35.media.pdf import Document, open_pdf
    from mlx_qwen35.media.preprocess import Media
    from mlx_qwen35.model.model import Model
    from mlx_qwen35.prompt.answer import Answer, parse_answer
    from mlx_qwen35.prompt.piece import Piece
    from mlx_qwen35.prompt.processor import Processor
    from mlx_qwen35.prompt.prompt import Prompt
    from mlx_qwen35.prompt.tool_calls import Cut, ToolCall

__all__ = [
    "PRESETS", "Answer", "Cache", "Conversation", "Cut", "Document", "InputError", "Media", "Model", "Options",
    "Piece", "Processor", "Prompt", "Result", "Sampling", "Score", "Session", "Snapshot", "TokenLogprob", "ToolCall",
    "TopLogprob", "VisionOptions", "__version__", "batch_generate", "generate", "load", "load_distributed", "open_pdf",
    "parse_answer", "read_image", "score", "stream_generate",
]  # fmt: skip
