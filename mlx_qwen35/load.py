"""A checkpoint's name -> the model and its processor."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qwen35.backend import backend
from mlx_qwen35.budget.plan import check_model_fits, check_vision_encoder_fits, loaded_bytes
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.dtypes import COMPUTED, DTYPES, check_dtype
from mlx_qwen35.checkpoint.hub import CHOICES, resolve
from mlx_qwen35.checkpoint.names import MTP, TEXT, VISION
from mlx_qwen35.checkpoint.shapes import mtp_shapes, text_shapes, vision_shapes
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.products import warn_shortened_products
from mlx_qwen35.machine.chip import this_chip
from mlx_qwen35.machine.memory import MOST_GIGABYTES, limit_memory, set_limits
from mlx_qwen35.machine.process import check_folder, refuse_fork
from mlx_qwen35.model.enabled import enabled_kernels, warn_unfit_layers
from mlx_qwen35.model.model import Model
from mlx_qwen35.model.mtp import DraftHead, MultiTokenPrediction
from mlx_qwen35.model.vision import LazyVisionEncoder, VisionEncoder
from mlx_qwen35.model.weights import Progress, read_weights
from mlx_qwen35.options import check_fields, option, spelled
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.values import shown


@dataclass(frozen=True)
class LoadOptions:
    """Which model, and how it is held."""

    model: str | Path | None = option(help=CHOICES, metavar="MODEL")
    revision: str | None = option(help="branch, tag or commit of a Hugging Face id", metavar="NAME")
    dtype: str | mx.Dtype | None = option(
        help="dtype of activations and unquantized weights (default: the checkpoint's on a GPU, but float16 for "
        "bfloat16 on M1 and M2; float32 on a CPU)", choices=tuple(DTYPES), check=check_dtype,
    )  # fmt: skip
    memory_limit: float | None = option(
        help="memory that models may take, in GB (10^9 bytes; default: by this machine); a model that does not fit is "
        "refused before it is downloaded or read", least=0, above=True, most=MOST_GIGABYTES, metavar="GB",
    )  # fmt: skip
    keep_vision: bool = option(
        False, help="keep the vision encoder in memory after the first image; otherwise each prompt releases it"
    )

    def __post_init__(self) -> None:
        check_fields(self)


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    keep_vision: bool = False,
    memory_limit: float | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Model, Processor]:
    """Load a checkpoint and return the model and the processor that turns messages to tokens and tokens to text.

    Args:
        model: a local folder, a Hugging Face id, or "nano", the small model that comes with the package.
        revision: branch, tag or commit of a Hugging Face id.
        dtype: of the activations and the unquantized weights: float32, float16 or bfloat16, by name or as mx.float32.
            None follows the checkpoint on a GPU, but takes float16 for bfloat16 on M1 and M2, which have no arithmetic
            for it; and is float32 on the CPU, where MLX's half types are 10 to 40 times slower. On M5 and NVIDIA MLX
            shortens float32 products unless MLX_ENABLE_TF32=0 is in the environment when the program starts; where it
            does, float32 is warned of.
        keep_vision: the vision encoder is loaded with the first image and released once a prompt's images are encoded;
            True keeps it in memory from then on.
        memory_limit: GB (10^9 bytes) that models may take in this process; None is what suits the machine. What does
            not fit is refused before it is downloaded or read, and a model reads its prompts in smaller chunks.
        progress: called as progress(bytes_read, bytes_in_all) while the weights are read; for float16 they are read
            twice.

    Raises InputError when the checkpoint cannot be found, is broken, or does not fit into this machine's memory.
    """
    refuse_fork()
    check_folder()
    if not callable(progress):
        raise InputError("option_invalid", f"progress must be a function of two counts, got {shown(progress)}")
    given = LoadOptions(model, revision, dtype, memory_limit, keep_vision)
    limit_memory(given.memory_limit)

    def judged(folder: Path) -> Checkpoint:
        checkpoint = open_checkpoint(folder)
        if given.keep_vision and not has_vision(checkpoint):
            raise InputError(
                "vision_missing", f"{spelled('keep_vision')} must not be given: {model} has no vision encoder to keep"
            )
        check_model_fits(checkpoint, choose_dtype(checkpoint, given.dtype), str(model))
        return checkpoint

    folder = resolve(model, revision, judged)
    checkpoint = judged(folder)
    processor = Processor.from_folder(folder, checkpoint.config, has_vision(checkpoint))
    loaded = load_model(checkpoint, choose_dtype(checkpoint, given.dtype), str(model), progress)
    if loaded.vision:
        loaded.vision.keep = given.keep_vision
    return loaded, processor


def has_vision(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.vision is not None and checkpoint.has(VISION)


def choose_dtype(checkpoint: Checkpoint, dtype: str | mx.Dtype | None) -> mx.Dtype:
    """The dtype of this name, or what suits this checkpoint on this machine."""
    if dtype is not None:
        return DTYPES[check_dtype(spelled("dtype"), dtype)]
    return default_dtype(stored_dtype(checkpoint))


def stored_dtype(checkpoint: Checkpoint) -> mx.Dtype:
    """What a checkpoint's activations are meant to be in: the dtype of its embedding, or of the scales of that."""
    stored = checkpoint.entries[f"{TEXT}embed_tokens.weight"].dtype
    if stored == "U32":  # packed: the scales tell, and where those are bytes, the first unpacked vector does
        stored = checkpoint.entries[f"{TEXT}embed_tokens.scales"].dtype
        stored = checkpoint.entries[f"{TEXT}norm.weight"].dtype if stored == "U8" else stored
    return COMPUTED[stored]


def default_dtype(stored: mx.Dtype) -> mx.Dtype:
    """What suits this machine: float32 on a CPU, and float16 in the place of bfloat16 on M1 and M2."""
    if backend().slow_half:
        return mx.float32
    chip = this_chip()
    return mx.float16 if stored == mx.bfloat16 and chip and not chip.native_bfloat16 else stored


def load_model(
    checkpoint: Checkpoint, dtype: mx.Dtype, name: str, progress: Progress = lambda done, total: None
) -> Model:
    """Read the text tensors and build the model; vision tower and draft head stay on disk until they are wanted."""
    names = [stored for stored, _ in checkpoint.part(text_shapes(checkpoint.config.text))]
    check_model_fits(checkpoint, dtype, name)
    set_limits()
    if dtype == mx.float32:
        warn_shortened_products()
    config = checkpoint.config.text
    weights = read_weights(checkpoint, names, dtype, progress)
    model = Model(config, weights)
    weights.arrays.clear()  # each layer frees what it was cast from as soon as it is evaluated
    done, total = 0, _nbytes(model)
    for part in (model.embed_tokens, *([] if config.tie_word_embeddings else [model.lm_head]), *model.layers):
        mx.eval(part.parameters())
        done += _nbytes(part)
        progress(done, total)
    mx.eval(model.parameters(), model.rotary.frequencies, model.rotary.axes)  # what is pending belongs to this thread
    progress(total, total)
    mx.clear_cache()
    enabled_kernels(model)  # on a Mac, see now and not in the middle of an answer which kernels may be used
    warn_unfit_layers(model)
    head = model.mtp = _draft_head(checkpoint, dtype)
    if has_vision(checkpoint):
        # The draft head and not the model, which would hold itself.
        model.vision = LazyVisionEncoder(lambda: load_vision_encoder(checkpoint, dtype, head))
    return model.eval()


def _draft_head(checkpoint: Checkpoint, dtype: mx.Dtype) -> DraftHead | None:
    """The draft head, still on disk; None for a checkpoint without one."""
    config, fault = checkpoint.config.text, checkpoint.mtp_head_fault
    if not fault and not (config.mtp_num_hidden_layers and checkpoint.has(MTP)):
        return None
    names = [stored for stored, _ in checkpoint.part(mtp_shapes(config))]
    nbytes = 0 if fault else loaded_bytes(checkpoint, names, dtype)
    return DraftHead(lambda: load_draft_head(checkpoint, names, dtype), nbytes, fault)


def load_draft_head(checkpoint: Checkpoint, names: list[str], dtype: mx.Dtype) -> MultiTokenPrediction:
    """Read the tensors of the draft head, of these names, and build it."""
    weights = read_weights(checkpoint, names, dtype)
    head = MultiTokenPrediction(checkpoint.config.text, weights.at("mtp"))
    weights.arrays.clear()
    mx.eval(head.parameters())
    mx.clear_cache()
    return head.eval()


def load_vision_encoder(checkpoint: Checkpoint, dtype: mx.Dtype, head: DraftHead | None = None) -> VisionEncoder:
    """Read the vision tensors and build the tower. InputError when they do not fit beside what is in memory.

    head: is given back where the room that it takes is needed.
    """
    config = checkpoint.config.vision
    names = [stored for stored, _ in checkpoint.part(vision_shapes(config))]
    nbytes = loaded_bytes(checkpoint, names, dtype)
    try:
        check_vision_encoder_fits(checkpoint.config.text, dtype, nbytes)
    except InputError:
        if head is None or not head.loaded:
            raise
        head.release()
        check_vision_encoder_fits(checkpoint.config.text, dtype, nbytes)
    weights = read_weights(checkpoint, names, dtype)
    tower = VisionEncoder(config, weights)
    weights.arrays.clear()
    for block in tower.blocks:
        mx.eval(block.parameters())
    mx.eval(tower.parameters())
    mx.clear_cache()
    return tower.eval()


def _nbytes(part: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(part.parameters()))
