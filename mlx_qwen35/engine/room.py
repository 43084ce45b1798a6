"""What several answers of a loaded model take together: its plan of rows, and what a prompt's images need."""

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_qwen35.budget.encoding import at_once, working_bytes
from mlx_qwen35.budget.plan import Machine, this_machine
from mlx_qwen35.budget.rows import RowsPlan
from mlx_qwen35.checkpoint.config import VisionConfig
from mlx_qwen35.kernels.attention import attention_impl
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.prompt import Prompt


def rows_plan(model: Model) -> RowsPlan:
    """The memory plan of rows on this model, with its adapters, draft head and vision encoder."""
    weights = dict(tree_flatten(model.parameters())).values()
    machine = this_machine(model.held, model.dtype, model.memory_limit, model.kv)
    return RowsPlan(
        model.held, machine,
        weights=sum(array.nbytes for array in weights) + model.adapters.nbytes,
        head=model.mtp.nbytes if model.mtp else 0,
        encoder=model.vision.nbytes if model.vision else 0,
        unpacks=machine.on_cpu and any(array.dtype == mx.uint32 for array in weights),
    )  # fmt: skip


def encoding_bytes(prompt: Prompt, vision: VisionConfig | None, machine: Machine) -> int:
    """Bytes of encoding what a prompt shows, with the embeddings, which are joined from those of each image; 0 where
    it shows nothing.
    """
    if not prompt.media or vision is None:
        return 0
    impl = attention_impl(vision.hidden_size // vision.num_heads, machine.dtype)
    media = [placed.media for placed in prompt.media]
    working = max(working_bytes(vision, machine.dtype, at_once(own.grid), impl) for own in media)
    return working + 2 * sum(own.tokens for own in media) * vision.out_hidden_size * machine.dtype.size
