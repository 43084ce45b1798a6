"""A checkpoint's folder or id -> the model and its processor."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qwen35.backend import backend
from mlx_qwen35.budget.plan import check_model_fits, check_vision_encoder_fits, loaded_bytes
from mlx_qwen35.cache.kv_format import FORMS, UNQUANTIZED, KVFormat, check_kv_bits
from mlx_qwen35.checkpoint.adapter_choice import Chosen, check_adapter, choose, look_at
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.checkpoint.dtypes import COMPUTED, DTYPES, check_dtype
from mlx_qwen35.checkpoint.fingerprint import fingerprint, vision_fingerprint
from mlx_qwen35.checkpoint.hub import CHOICES, resolve
from mlx_qwen35.checkpoint.names import MTP, TEXT, VISION
from mlx_qwen35.checkpoint.rope_fields import check_rope_scaling
from mlx_qwen35.checkpoint.shapes import mtp_shapes, text_shapes, vision_shapes
from mlx_qwen35.checkpoint.share import Share
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.packed_attention import GROUP
from mlx_qwen35.kernels.products import warn_shortened_products
from mlx_qwen35.machine.chip import this_chip
from mlx_qwen35.machine.memory import MOST_GIGABYTES, limit_of, set_limits, usable_bytes
from mlx_qwen35.machine.process import check_folder, refuse_fork, show_in_use
from mlx_qwen35.model.enabled import enabled_kernels, warn_unfit_layers
from mlx_qwen35.model.lazy import LazyPart
from mlx_qwen35.model.lora import AdapterSet
from mlx_qwen35.model.model import Model
from mlx_qwen35.model.mtp import MultiTokenPrediction
from mlx_qwen35.model.rotary import is_exact
from mlx_qwen35.model.vision import VisionEncoder
from mlx_qwen35.model.weights import Progress, Weights, read_weights
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
        help="memory that the model may take on this machine, in GB (10^9 bytes; default: by this machine); a model "
        "that does not fit is refused before it is downloaded or read", least=0, above=True, most=MOST_GIGABYTES,
        metavar="GB",
    )  # fmt: skip
    keep_vision: bool = option(
        False, help="keep the vision encoder in memory after the first image; otherwise each prompt releases it"
    )
    kv_bits: str | int | None = option(
        help="store keys and values in 8 bit, keys in 8 and values in 4 (8/4), or both in 4 (for reading, not for long "
        "thinking); default: in the dtype", choices=FORMS, check=check_kv_bits,
    )  # fmt: skip
    kv_rotate: bool = option(
        False, help="rotate keys and values by a Hadamard transform before they are quantized, with --kv-bits 8/4 or 4"
    )
    adapter: str | Path | Mapping[str, str | Path] | None = option(
        help="an adapter (LoRA) that is loaded beside the weights: a folder of PEFT, mlx-lm or mlx-vlm", metavar="PATH",
        each=True, check=check_adapter,
    )  # fmt: skip
    adapter_scale: float = option(
        1.0, help="a factor of the adapter's own scale (default: 1)", least=-1000, most=1000, metavar="X"
    )
    rope_scaling: str | None = option(
        help="read beyond the context of training: yarn, or yarn:FACTOR as yarn:2 (default factor: 4); none takes the "
        "folder's scaling away (default: the folder's)", metavar="TYPE", check=check_rope_scaling,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)
        if self.adapter is None and self.adapter_scale != 1.0:
            raise InputError(
                "option_no_effect",
                f"{spelled('adapter_scale')} must be given with {spelled('adapter')}: there is no adapter to scale",
            )
        if self.kv_rotate and self.kv_bits not in ("8/4", "4"):
            raise InputError(
                "option_no_effect",
                f"{spelled('kv_rotate')} must be given with {spelled('kv_bits')} 8/4 or 4: it makes up for what 4 bits "
                "lose. Choose one of them, or leave it out",
            )

    def kv_format(self, head_dim: int) -> KVFormat:
        """The format of keys and values of heads of `head_dim`. InputError where they do not fit into it."""
        kv = KVFormat.of(None if self.kv_bits is None else str(self.kv_bits), self.kv_rotate)
        if not kv.fits(head_dim):
            name, rule = ("kv_bits", "a multiple of 64") if head_dim % GROUP else ("kv_rotate", "a power of two")
            raise InputError(
                "option_invalid", f"with {spelled(name)} a head must have {rule} elements; this model's have {head_dim}"
            )
        return kv


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    keep_vision: bool = False,
    memory_limit: float | None = None,
    kv_bits: str | int | None = None,
    kv_rotate: bool = False,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    adapter_scale: float = 1.0,
    rope_scaling: str | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Model, Processor]:
    """Load a checkpoint. Return the model, and the processor between messages, tokens and text.

    Args:
        model: a local folder, a Hugging Face id, or "nano", the small model that comes with the package.
        revision: branch, tag or commit of a Hugging Face id.
        dtype: of the activations and the unquantized weights: float32, float16 or bfloat16, by name or as mx.float32.
            None is the checkpoint's dtype on a GPU, with float16 for bfloat16 on M1 and M2, which have no bfloat16
            arithmetic; on the CPU it is float32, since MLX's 16-bit types are 10 to 40 times slower there. On M5 and
            NVIDIA MLX rounds the operands of float32 products, unless the environment holds MLX_ENABLE_TF32=0 when the
            program starts. Float32 then costs a warning.
        keep_vision: whether the vision encoder stays in memory. Otherwise it is loaded for each prompt with images and
            unloaded after they are encoded.
        memory_limit: GB (10^9 bytes) that this model may take; None is what suits the machine. What other models of the
            process hold counts too. A larger model is refused before it is downloaded or read. A lower limit makes
            images and prefill chunks smaller.
        kv_bits: of the keys and values of its caches: 8, "8/4" (keys in 8, values in 4) or 4; None is the dtype. Heads
            must have a multiple of 64 elements.
        kv_rotate: whether a Hadamard transform spreads each key and value over its elements before it is quantized;
            with 8/4 and 4 alone. Heads must have a power of two elements.
        adapter: the folder of an adapter of PEFT, mlx-lm or mlx-vlm. It stands beside the weights: requests get it, but
            for those that say adapter="base". A mapping {name: folder} loads several. Then a request says which, and
            gets none where it says nothing. `model.adapters.names` lists them. Whole tensors of an adapter, as norms,
            take the place of the checkpoint's; it must be loaded alone.
        adapter_scale: a factor of the adapters' own scales.
        rope_scaling: "yarn" or "yarn:FACTOR" reads beyond the context of training, by default 4 times as far; "none"
            takes the folder's scaling away; None is the folder's.
        progress: called as progress(bytes_read, all_bytes) while the weights are read; for float16 they are read twice.

    Raises InputError when the checkpoint or an adapter is not found, is broken, does not fit the other, or does not fit
    into this machine's memory: before weights are read.
    """
    refuse_fork()
    check_folder()
    if not callable(progress):
        raise InputError("option_invalid", f"progress must be a function of two counts, got {shown(progress)}")
    given = LoadOptions(
        model, revision, dtype, memory_limit, keep_vision, kv_bits, kv_rotate, adapter, adapter_scale, rope_scaling
    )
    return load_given(given, progress)


class Loads(Protocol):
    """Makes a model of a checkpoint, as `load_model` does."""

    def __call__(
        self, checkpoint: Checkpoint, dtype: mx.Dtype, name: str, progress: Progress, memory_limit: int, kv: KVFormat,
        adapters: Chosen,
    ) -> Model: ...  # fmt: skip


def load_given(given: LoadOptions, progress: Progress, loads: Loads | None = None) -> tuple[Model, Processor]:
    """`load`, of checked options. loads: makes the model where it is not all on this machine, and says whether it fits;
    None: `load_model`.
    """
    limit, name = limit_of(given.memory_limit), str(given.model)

    def checked(folder: Path) -> Checkpoint:
        checkpoint = open_checkpoint(folder, rope_scaling=given.rope_scaling)
        if given.keep_vision and not has_vision(checkpoint):
            raise InputError(
                "vision_missing", f"{spelled('keep_vision')} must not be given: {name} has no vision encoder to keep"
            )
        given.kv_format(checkpoint.config.text.head_dim)
        if loads is None:
            check_model_fits(checkpoint, choose_dtype(checkpoint, given.dtype), limit, name)
        return checkpoint

    judge = partial(look_at, given.adapter, given.adapter_scale)
    folder = resolve(given.model, given.revision, lambda headers: judge(checked(headers)))
    checkpoint = checked(folder)
    adapters = choose(given.adapter, given.adapter_scale, checkpoint)
    processor = Processor.from_folder(folder, checkpoint.config, has_vision(checkpoint), limit)
    kv = given.kv_format(checkpoint.config.text.head_dim)
    dtype = choose_dtype(checkpoint, given.dtype)
    loaded = (loads or load_model)(checkpoint, dtype, name, progress, limit, kv, adapters)
    if loaded.vision:
        loaded.vision.keep = given.keep_vision
    return loaded, processor


def has_vision(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.vision is not None and checkpoint.has(VISION)


def choose_dtype(checkpoint: Checkpoint, dtype: str | mx.Dtype | None) -> mx.Dtype:
    """The dtype of this name, or the default for this checkpoint on this machine."""
    if dtype is not None:
        return DTYPES[check_dtype(spelled("dtype"), dtype)]
    return default_dtype(stored_dtype(checkpoint))


def stored_dtype(checkpoint: Checkpoint) -> mx.Dtype:
    """The dtype that a checkpoint's activations are meant for: its embedding's, or that of the embedding's scales."""
    stored = checkpoint.entries[f"{TEXT}embed_tokens.weight"].dtype
    if stored == "U32":  # quantized; scales that are bytes have no such dtype, and the norm's is taken
        stored = checkpoint.entries[f"{TEXT}embed_tokens.scales"].dtype
        stored = checkpoint.entries[f"{TEXT}norm.weight"].dtype if stored == "U8" else stored
    return COMPUTED[stored]


def default_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The dtype for this machine: float32 on a CPU, and float16 instead of bfloat16 on M1 and M2."""
    if backend().slow_half:
        return mx.float32
    chip = this_chip()
    return mx.float16 if stored == mx.bfloat16 and chip and not chip.native_bfloat16 else stored


def load_model(
    checkpoint: Checkpoint,
    dtype: mx.Dtype,
    name: str,
    progress: Progress = lambda done, total: None,
    memory_limit: int | None = None,
    kv: KVFormat = UNQUANTIZED,
    adapters: Chosen | None = None,
    share: Share | None = None,
    make: Callable[[TextConfig, Weights, int, KVFormat], Model] = Model,
) -> Model:
    """Load the text model. Vision encoder and draft head are loaded at their first use.

    memory_limit: bytes; None is what suits the machine. kv: the format of keys and values in its caches. adapters: read
    and checked; they hold their whole tensors no more when this returns. share: what of the text model is held here;
    None: all of it. make: the class of the model, of the configuration of what is held.
    """
    limit, adapters = usable_bytes(memory_limit), adapters or Chosen()
    whole = adapters.take_whole()
    altered, replaced = checkpoint.replacing(whole), [*whole]
    altered = share.of(altered) if share else altered
    config = altered.config.text
    names = [stored for stored, _ in altered.part(text_shapes(config))]
    beside = {own: share.of_adapter(one, checkpoint) if share else one for own, one in adapters.adapters.items()}
    held = share.planned(checkpoint.config.text) if share else config
    check_model_fits(altered, dtype, limit, name, list(beside.values()), held)
    set_limits(limit)
    if dtype == mx.float32:
        warn_shortened_products()
    weights = read_weights(altered, names, dtype, progress)
    model = make(config, weights, limit, kv)
    model.held = held
    opened = adapters.opening(VISION, MTP)
    del weights, altered, whole  # so that each layer frees the arrays as stored once it is evaluated
    done, total = 0, _nbytes(model)
    for part in (model.embed_tokens, *([] if config.tie_word_embeddings else [model.lm_head]), *model.layers):
        mx.eval(part.parameters())
        done += _nbytes(part)
        progress(done, total)
    mx.eval(model.parameters(), model.rotary.frequencies, model.rotary.axes)  # pending work belongs to this thread
    progress(total, total)
    for own, adapter in beside.items():
        model.adapters.add(own, adapter, replaced)
    model.adapters.default = adapters.default
    model.adapters.stack(model)
    mx.clear_cache()
    enabled_kernels(model)  # the self-checks run now, not in the middle of an answer
    is_exact(config.rope, mx.default_device().type)
    warn_unfit_layers(model)

    def later() -> Checkpoint:  # what is unloaded must not be held by it
        return checkpoint.replacing(opened())

    mtp_head = model.mtp = _draft_head(later, dtype, model.adapters)
    if has_vision(checkpoint):  # the lambda must not hold the model, which would then hold itself
        encoder, loaded = loaded_bytes(later(), vision_names(checkpoint), dtype), model.adapters
        model.vision = LazyPart(
            lambda: loaded.stack(load_vision_encoder(later(), dtype, mtp_head, limit)), encoder,
            fingerprint=functools.cache(lambda: vision_fingerprint(checkpoint)),
        )  # fmt: skip
    model.fingerprint = functools.cache(lambda: fingerprint(checkpoint))
    show_in_use(checkpoint.folder / "config.json", model)
    model.eval()
    return model


def _draft_head(
    later: Callable[[], Checkpoint], dtype: mx.Dtype, adapters: AdapterSet
) -> LazyPart[MultiTokenPrediction] | None:
    """The draft head, not loaded yet; None for a checkpoint without one. later: opens the checkpoint to read from."""
    checkpoint = later()
    config, fault = checkpoint.config.text, checkpoint.mtp_head_fault
    if not fault and not (config.mtp_num_hidden_layers and checkpoint.has(MTP)):
        return None
    names = [stored for stored, _ in checkpoint.part(mtp_shapes(config))]
    nbytes = 0 if fault else loaded_bytes(checkpoint, names, dtype)
    return LazyPart(lambda: adapters.stack(load_draft_head(later(), names, dtype)), nbytes, fault)


def load_draft_head(checkpoint: Checkpoint, names: list[str], dtype: mx.Dtype) -> MultiTokenPrediction:
    """The draft head, of the tensors of these names."""
    weights = read_weights(checkpoint, names, dtype)
    mtp_head = MultiTokenPrediction(checkpoint.config.text, weights.at("mtp"))
    weights.arrays.clear()
    mx.eval(mtp_head.parameters())
    mx.clear_cache()
    mtp_head.eval()
    return mtp_head


def vision_names(checkpoint: Checkpoint) -> list[str]:
    """The names of the vision encoder's tensors."""
    config = checkpoint.config.vision
    assert config is not None, "the checkpoint has a vision encoder"
    return [stored for stored, _ in checkpoint.part(vision_shapes(config))]


def load_vision_encoder(
    checkpoint: Checkpoint,
    dtype: mx.Dtype,
    mtp_head: LazyPart[MultiTokenPrediction] | None = None,
    memory_limit: int | None = None,
) -> VisionEncoder:
    """The vision encoder. Raises InputError when it does not fit beside what is in memory.

    mtp_head: unloaded if its memory is needed. memory_limit: bytes; None is what suits the machine.
    """
    limit = usable_bytes(memory_limit)
    config = checkpoint.config.vision
    assert config is not None, "the checkpoint has a vision encoder"
    names = vision_names(checkpoint)
    nbytes = loaded_bytes(checkpoint, names, dtype)
    try:
        check_vision_encoder_fits(checkpoint.config.text, dtype, limit, nbytes)
    except InputError:
        if mtp_head is None or not mtp_head.loaded:
            raise
        mtp_head.unload()
        check_vision_encoder_fits(checkpoint.config.text, dtype, limit, nbytes)
    weights = read_weights(checkpoint, names, dtype)
    encoder = VisionEncoder(config, weights, limit)
    weights.arrays.clear()
    for block in encoder.blocks:
        mx.eval(block.parameters())
    mx.eval(encoder.parameters())
    mx.clear_cache()
    encoder.eval()
    return encoder


def _nbytes(part: nn.Module) -> int:
    return sum(array.nbytes for array in dict(tree_flatten(part.parameters())).values())
