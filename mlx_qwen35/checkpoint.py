"""A checkpoint folder as it lies on disk: which tensors there must be, under which names, in which layout.

Everything here works from the safetensors headers; no tensor is read before it is asked for.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from mlx_qwen35 import sidecar
from mlx_qwen35.config import FULL, Config, TextConfig, VisionConfig, read_config
from mlx_qwen35.errors import InputError
from mlx_qwen35.fields import read_json, shown
from mlx_qwen35.names import MTP, TEXT, VISION, head_name, hugging_face_name, is_zero_centred

INDEX = "model.safetensors.index.json"
# Our converter rounds a float32 tensor in place, where other programs read it, and keeps the exact one under this
# prefix, which they pass over (everything named mtp.* is dropped by transformers, mlx-lm and mlx-vlm alike).
EXACT = "mtp.float32."
BLOCK_SCALES = "_scale_inv"  # after the name of an FP8 weight: one factor for each block of it

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

# Bits and group sizes that MLX offers for each quantization mode, and the dtypes of the packed parts.
MODES = {
    "affine": {"bits": (2, 3, 4, 5, 6, 8), "group_size": (32, 64, 128)},
    "mxfp4": {"bits": (4,), "group_size": (32,)},
    "mxfp8": {"bits": (8,), "group_size": (32,)},
    "nvfp4": {"bits": (4,), "group_size": (16,)},
}


# --- which tensors there are ----------------------------------------------------------------------------------------


def _decoder_layer(config: TextConfig, kind: str) -> dict[str, tuple[int, ...]]:
    c, hidden, inner = config, config.hidden_size, config.intermediate_size
    query, key_value = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if kind == FULL:
        return shapes | {
            "self_attn.q_proj.weight": (2 * query, hidden),
            "self_attn.k_proj.weight": (key_value, hidden),
            "self_attn.v_proj.weight": (key_value, hidden),
            "self_attn.o_proj.weight": (hidden, query),
            "self_attn.q_norm.weight": (c.head_dim,),
            "self_attn.k_norm.weight": (c.head_dim,),
        }
    heads = c.linear_num_value_heads
    return shapes | {
        "linear_attn.in_proj_qkv.weight": (c.conv_dim, hidden),
        "linear_attn.in_proj_z.weight": (c.value_dim, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.in_proj_a.weight": (heads, hidden),
        "linear_attn.conv1d.weight": (c.conv_dim, 1, c.linear_conv_kernel_dim),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (c.linear_value_head_dim,),
        "linear_attn.out_proj.weight": (hidden, c.value_dim),
    }


def text_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every text tensor, in the order of the data."""
    shapes = {f"{TEXT}embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for i, kind in enumerate(config.layer_types):
        shapes |= {f"{TEXT}layers.{i}.{name}": shape for name, shape in _decoder_layer(config, kind).items()}
    shapes[f"{TEXT}norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def vision_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor of the vision tower."""
    c, hidden, inner = config, config.hidden_size, config.intermediate_size
    merged = hidden * c.spatial_merge_size**2
    weights = {"patch_embed.proj": (hidden, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)}
    for i in range(c.depth):
        block = f"blocks.{i}."
        weights |= {
            f"{block}norm1": (hidden,),
            f"{block}norm2": (hidden,),
            f"{block}attn.qkv": (3 * hidden, hidden),
            f"{block}attn.proj": (hidden, hidden),
            f"{block}mlp.linear_fc1": (inner, hidden),
            f"{block}mlp.linear_fc2": (hidden, inner),
        }
    weights |= {
        "merger.norm": (hidden,),
        "merger.linear_fc1": (merged, merged),
        "merger.linear_fc2": (c.out_hidden_size, merged),
    }
    shapes = {f"{VISION}pos_embed.weight": (c.num_position_embeddings, hidden)}
    for name, shape in weights.items():
        shapes |= {f"{VISION}{name}.weight": shape, f"{VISION}{name}.bias": shape[:1]}
    return shapes


def mtp_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor of the multi-token-prediction head."""
    hidden = config.hidden_size
    shapes = {"mtp.fc.weight": (hidden, 2 * hidden)}
    shapes |= {f"mtp.{name}.weight": (hidden,) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    for i in range(config.mtp_num_hidden_layers):
        shapes |= {f"mtp.layers.{i}.{name}": shape for name, shape in _decoder_layer(config, FULL).items()}
    return shapes


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer or an embedding over tokens: what quantization may pack."""
    return len(shape) == 2 and not name.endswith("pos_embed.weight")


def is_exact(name: str) -> bool:
    """Whether a tensor stays in float32 whatever the model's dtype is: the decay rates, as checkpoints store them."""
    return name.endswith("A_log")


# --- safetensors files -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: the file, the byte range in it, and what the header says of it."""

    file: Path
    stored_name: str
    dtype: str  # safetensors' name: BF16, F32, U32 ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    nbytes: int


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file by stored name. InputError when the file is truncated or not safetensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0] if size >= 8 else 0
        if not 0 < length <= size - 8:
            raise InputError(
                "safetensors_truncated",
                f"{file} is truncated or not a safetensors file ({size} bytes); download it again",
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                "safetensors_invalid", f"the header of {file} is corrupted ({error}); download it again"
            ) from error
    end = max((entry.start + entry.nbytes for entry in entries.values()), default=8 + length)
    if end != size:
        raise InputError(
            "safetensors_truncated",
            f"{file} must have {end} bytes by its header, it has {size}: truncated; download it again",
        )
    return entries


def _entry(file: Path, name: str, value: Mapping, data: int) -> Entry:
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if end - begin != math.prod(shape) * DTYPE_BYTES[value["dtype"]]:
        raise ValueError(f"{name}: {end - begin} bytes for {value['dtype']} {list(shape)}")
    return Entry(file, name, value["dtype"], shape, data + begin, end - begin)


def safetensors_files(folder: Path) -> list[Path]:
    """The trunk's files: those that the folder's index names, else every *.safetensors but those of a head beside it.

    InputError when one is absent.
    """
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError("index_invalid", f"{folder / INDEX} must hold a 'weight_map' of tensor names to files")
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError("index_invalid", f"{folder / INDEX}: 'weight_map' must name files")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        if absent := [file.name for file in files if not file.is_file()]:
            raise InputError(
                "weights_missing",
                f"{folder / INDEX} names files that are absent: {', '.join(absent)}; download them again",
            )
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError("weights_missing", f"{folder} holds no *.safetensors file; only safetensors weights are read")
    beside = sidecar.places(folder)
    return [file for file in files if file.name not in beside] or files


# --- one folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantization:
    """How one matrix is packed."""

    group_size: int
    bits: int
    mode: str

    def __post_init__(self) -> None:
        offered = MODES.get(self.mode) if isinstance(self.mode, str) else None
        if offered is None:
            raise InputError(
                "quantization_invalid", f"quantization mode must be one of {', '.join(MODES)}, got {shown(self.mode)}"
            )
        for name in ("bits", "group_size"):
            value = getattr(self, name)
            if type(value) is not int or value not in offered[name]:
                raise InputError(
                    "quantization_invalid", f"mode {self.mode!r} offers {name} {offered[name]}, got {shown(value)}"
                )

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        return ("BF16", "F16", "F32") if self.mode == "affine" else ("U8",)

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of the tensors that stand for a weight of (rows, columns)."""
        rows, columns = shape
        groups = (rows, columns // self.group_size)
        packed = {"weight": (rows, columns * self.bits // 32), "scales": groups}
        return packed | {"biases": groups} if self.mode == "affine" else packed


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose headers were read and found whole: every tensor there, of the right shape, in a known layout.

    `entries` is keyed by Hugging Face names; `exact` holds the float32 originals of some of them, `block_scales` the
    factors of FP8 weights. `raw` says that conv1d is [C, 1, K] and norm weights are gamma - 1, as Hugging Face stores
    them; otherwise an MLX program moved the axis and added the one. `head` is what config.json says of the draft head;
    `head_fault` is why the one that lies beside the trunk is left out, a sentence.
    """

    folder: Path
    config: Config
    entries: Mapping[str, Entry]
    exact: Mapping[str, Entry]
    raw: bool
    block_scales: Mapping[str, Entry] = field(default_factory=dict)
    head: sidecar.Declared = field(default_factory=sidecar.Declared)
    head_fault: str | None = None

    @cached_property
    def _quantization(self) -> dict[str, Quantization]:
        values = self.config.quantization
        overrides = {hugging_face_name(f"{k}."): sidecar.form(v) for k, v in values.items() if isinstance(v, dict)}
        found = {}
        for module in (name.removesuffix("scales") for name in self.entries if name.endswith(".scales")):
            default = sidecar.form(values) | (self.head.packing if module.startswith(MTP) else {})
            if how := default | overrides.get(module, {}) | self.head.overrides.get(module, {}):
                found[module] = Quantization(**{"group_size": None, "bits": None, "mode": "affine"} | how)
        return found

    def quantization(self, weight: str) -> Quantization | None:
        """How the weight of this name is packed, None when it is not."""
        return self._quantization.get(weight.removesuffix("weight"))

    @cached_property
    def _head_is_raw(self) -> bool:
        told = {name: entry for name, entry in self.entries.items() if sidecar.tells(name)}
        norms = {name: mx.load(str(entry.file))[entry.stored_name] for name, entry in told.items()}
        return sidecar.norms_are_raw(norms, self.head.raw)

    def is_folded(self, name: str) -> bool:
        """Whether the tensor of this name is a norm to which the one was added; for the head's, some are looked at."""
        if self.raw or not is_zero_centred(name):
            return False
        return not (name.startswith(MTP) and self._head_is_raw)

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.entries)

    def part(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and stored shape of everything that stands for the given tensors in this folder's layout."""
        for name, shape in shapes.items():
            packed = self.quantization(name) if is_matrix(name, shape) else None
            if packed:
                for suffix, size in packed.parts(shape).items():
                    yield name.removesuffix("weight") + suffix, size
            elif not self.raw and name.endswith("conv1d.weight"):
                yield name, (shape[0], shape[2], shape[1])
            elif not self.raw and name.endswith("patch_embed.proj.weight"):
                yield name, (shape[0], *shape[2:], shape[1])
            else:
                yield name, shape

    def nbytes(self, prefixes: tuple[str, ...] = (TEXT, "lm_head.")) -> int:
        """Bytes on disk of the tensors whose names start with one of the prefixes; by default the text model's."""
        return sum(entry.nbytes for name, entry in self.entries.items() if name.startswith(prefixes))


def open_checkpoint(folder: Path, *, fp8: bool = False) -> Checkpoint:
    """Read config and headers of a checkpoint folder and check them against each other; no weights are read.

    fp8: accept FP8 weights with block scales, which can only be converted. Raises InputError that lists what is
    missing, unexpected or misshapen, or says which rule the folder breaks; a draft head beside the trunk is optional.
    """
    if not folder.is_dir():
        raise InputError(
            "model_not_found",
            f"a checkpoint must be a folder, a Hugging Face id or 'nano'; there is no folder {folder}",
        )
    config = read_config(folder)
    entries: dict[str, Entry] = {}
    for file in safetensors_files(folder):
        for stored, entry in read_header(file).items():
            name = hugging_face_name(stored)
            if name in entries:
                raise InputError(
                    "tensor_duplicate",
                    f"{folder}: {name} is there twice, in {entries[name].file.name} and in {file.name}",
                )
            entries[name] = entry
    if config.text.tie_word_embeddings:  # the head is the embedding; some writers store it a second time
        entries = {name: entry for name, entry in entries.items() if not name.startswith("lm_head.")}
    exact = {name.removeprefix(EXACT): entries.pop(name) for name in list(entries) if name.startswith(EXACT)}
    if stray := [name for name, entry in exact.items() if name not in entries or entries[name].shape != entry.shape]:
        raise InputError(
            "tensors_mismatch",
            f"{folder}: {EXACT}* must repeat tensors of the folder in float32; not so: {_shorten(stray)}",
        )
    scales = {name: entries.pop(name) for name in list(entries) if name.endswith(BLOCK_SCALES)}
    if scales and not fp8:
        raise InputError(
            "fp8_not_runnable",
            f"{folder} holds FP8 weights with block scales, which MLX does not compute with. Convert it first: "
            f"mlx_qwen35.convert --hf-path {folder} --mlx-path OUT",
        )
    scales = {name.removesuffix(BLOCK_SCALES): entry for name, entry in scales.items()}
    has_head = any(name.startswith(MTP) for name in entries)
    head = sidecar.declared(folder) if has_head else sidecar.Declared()
    checkpoint = Checkpoint(folder, config, entries, exact, _is_raw(folder, config, entries), scales, head)
    _check_tensors(checkpoint)
    return checkpoint if has_head or not config.text.mtp_num_hidden_layers else _with_head(checkpoint)


def _with_head(trunk: Checkpoint) -> Checkpoint:
    """The folder with the draft head beside its trunk, or without it and with the reason why it cannot be used."""
    file = None
    try:
        head = sidecar.declared(trunk.folder)
        if (file := sidecar.find(trunk.folder, head.file)) is None:
            return trunk
        own = {head_name(stored): entry for stored, entry in read_header(file).items() if not sidecar.is_shared(stored)}
        whole = replace(trunk, entries={**trunk.entries, **own}, head=head)
        if misfits := _misfits(own, dict(whole.part(mtp_shapes(trunk.config.text))), most=2):
            raise InputError("tensors_mismatch", "; ".join(misfits))
        return whole
    except (InputError, OSError) as error:
        where = f"in {file.relative_to(trunk.folder)}" if file else "beside the trunk"
        return replace(trunk, head_fault=f"the draft head {where} cannot be used: {error}")


def _is_raw(folder: Path, config: Config, entries: Mapping[str, Entry]) -> bool:
    """Raw or converted, decided by the layout of conv1d; means of norm weights are no evidence."""
    kernel = config.text.linear_conv_kernel_dim
    layouts = {
        entry.shape[1:] == (1, kernel)
        for name, entry in entries.items()
        if name.startswith(TEXT) and name.endswith("conv1d.weight") and len(entry.shape) == 3
    }
    if len(layouts) == 2:
        raise InputError(
            "layout_mixed", f"{folder} mixes conv1d weights of both layouts, [C, 1, {kernel}] and [C, {kernel}, 1]"
        )
    raw = layouts.pop() if layouts else True
    tag = config.format_tag
    if tag is not None:
        if tag != {**tag, "format": 1, "norms": "zero-centred"}:
            raise InputError(
                "layout_tag_unsupported",
                f"{folder}: its mlx_qwen35 tag must say format 1 and norms 'zero-centred', got {tag}. A newer "
                "version of this program may have written it: update",
            )
        if not raw:
            raise InputError(
                "layout_tag_contradicted",
                f"{folder}: its mlx_qwen35 tag says that norms are zero-centred and conv1d is [C, 1, {kernel}], but "
                f"conv1d is [C, {kernel}, 1]: the folder was rewritten by another program. Convert the original again",
            )
    return raw


def _check_tensors(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    expected = dict(checkpoint.part(text_shapes(config.text)))
    if checkpoint.has(VISION) and config.vision:
        expected |= checkpoint.part(vision_shapes(config.vision))
    if checkpoint.has(MTP):
        expected |= checkpoint.part(mtp_shapes(config.text))
    if misfits := _misfits(checkpoint.entries, expected):
        raise InputError(
            "tensors_mismatch",
            "\n  ".join([f"the tensors of {checkpoint.folder} do not fit its config.json:", *misfits]),
        )


def _misfits(entries: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]], most: int = 8) -> list[str]:
    problems = {
        "missing": [name for name in expected if name not in entries],
        "unexpected": [name for name in entries if name not in expected],
        "misshapen": [
            f"{name} {list(entries[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in entries and entries[name].shape != shape
        ],
    }
    return [f"{len(names)} {kind}: {_shorten(names, most)}" for kind, names in problems.items() if names]


def _shorten(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
