"""A checkpoint folder on disk: the tensors that must be there, their names, their layout.

Checks use the safetensors headers. Only an lm_head that may repeat the embedding is read.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.checkpoint import draft_head, foreign
from mlx_qwen35.checkpoint.config import Config, read_config
from mlx_qwen35.checkpoint.dtypes import STORED, dtype_name
from mlx_qwen35.checkpoint.folder import check_folder, safetensors_files, shorten
from mlx_qwen35.checkpoint.names import HEAD, MTP, TEXT, VISION, hugging_face_name, is_spare, is_zero_centred, mtp_name
from mlx_qwen35.checkpoint.shapes import Shapes, is_matrix, mtp_shapes, text_shapes, vision_shapes
from mlx_qwen35.checkpoint.tensors import FLOATS, Entry, open_arrays, read_header, same_numbers
from mlx_qwen35.errors import InputError
from mlx_qwen35.quantization import Quantization

# Our converter rounds a float32 tensor in place, where other programs read it, and stores the original under this
# prefix, which they ignore: transformers, mlx-lm and mlx-vlm drop everything named mtp.*.
FP32_ORIGINAL = "mtp.float32."
BLOCK_SCALES = "_scale_inv"  # after the name of an FP8 weight: one factor for each block of it
_HEAD, _EMBEDDING = "lm_head.", f"{TEXT}embed_tokens."


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose headers were read and checked: every tensor is there, of the right shape, in a known layout.

    entries: by Hugging Face name. fp32_original: the float32 originals of some of them. raw: conv1d is [C, 1, K] and
    norm weights are gamma - 1, as Hugging Face stores them; otherwise an MLX program moved the axis and added the one.
    block_scales: the factors of FP8 weights. mtp_head: the fields of config.json for the MTP head. mtp_head_fault: the
    reason why a head in a file of its own is left out. replaced: tensors of an adapter in the place of the folder's.
    """

    folder: Path
    config: Config
    entries: Mapping[str, Entry]
    fp32_original: Mapping[str, Entry]
    raw: bool
    block_scales: Mapping[str, Entry] = field(default_factory=dict)
    mtp_head: draft_head.Declared = field(default_factory=draft_head.Declared)
    mtp_head_fault: str | None = None
    replaced: Mapping[str, mx.array] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> Shapes:
        """Hugging Face name -> shape of every tensor of the model that is there: text, vision, MTP head."""
        config = self.config
        shapes = text_shapes(config.text) | (vision_shapes(config.vision) if config.vision else {})
        return {name: shape for name, shape in (shapes | mtp_shapes(config.text)).items() if name in self.entries}

    @cached_property
    def _quantization(self) -> dict[str, Quantization]:
        values = {} if "quant_method" in self.config.quantization else self.config.quantization
        modules = {name: value for name, value in values.items() if isinstance(value, dict)}
        overrides = {hugging_face_name(f"{name}."): draft_head.settings(value) for name, value in modules.items()}
        found = {}
        for module in (name.removesuffix("scales") for name in self.entries if name.endswith(".scales")):
            own = draft_head.settings(values) | dict(self.mtp_head.quantization if module.startswith(MTP) else {})
            own |= overrides.get(module, {}) | dict(self.mtp_head.overrides.get(module, {}))
            if own:
                found[module] = Quantization(**{"group_size": None, "bits": None, "mode": "affine"} | own)
        return found

    def quantization(self, weight: str) -> Quantization | None:
        """The quantization of the weight of this name; None for an unquantized one."""
        return self._quantization.get(weight.removesuffix("weight"))

    @cached_property
    def _mtp_head_is_raw(self) -> bool:
        own = {name: entry for name, entry in self.entries.items() if name not in self.replaced}
        norms = {name: entry for name, entry in own.items() if draft_head.tells(name)}
        return draft_head.norms_are_raw(open_arrays(norms), self.mtp_head.raw)

    def is_folded(self, name: str) -> bool:
        """Whether the tensor of this name is a norm to which the one was added. Reads some norms of the MTP head."""
        if self.raw or not is_zero_centred(name):
            return False
        return not (name.startswith(MTP) and self._mtp_head_is_raw)

    def replacing(self, tensors: Mapping[str, mx.array]) -> "Checkpoint":
        """This checkpoint with whole tensors in the place of its own, unquantized. A head of its own makes it untied.

        tensors: by Hugging Face name, in raw layout.
        """
        if not tensors:
            return self
        stale = {name.removesuffix("weight") + part for name in tensors for part in ("weight", "scales", "biases")}
        entries = {name: entry for name, entry in self.entries.items() if name not in stale}
        own = {name: entry for name, entry in self.fp32_original.items() if name not in tensors}
        tied = self.config.text.tie_word_embeddings and HEAD not in tensors
        for name, array in tensors.items():
            entries[name] = Entry(Path(), name, STORED[dtype_name(array.dtype)], array.shape, 0, array.nbytes)
        return replace(
            self, config=replace(self.config, text=replace(self.config.text, tie_word_embeddings=tied)),
            entries=entries, fp32_original=own, replaced=dict(tensors),
        )  # fmt: skip

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.entries)

    def part(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and stored shape of each tensor that holds the given tensors in this folder's layout."""
        for name, shape in shapes.items():
            quantization = self.quantization(name) if is_matrix(name, shape) else None
            if quantization:
                for suffix, size in quantization.parts(shape).items():
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


def open_checkpoint(folder: Path, *, fp8: bool = False, rope_scaling: str | None = None) -> Checkpoint:
    """Read config and headers of a checkpoint folder and check them against each other; no weights are read.

    fp8: accept FP8 weights with block scales, which can only be converted. rope_scaling: in place of the folder's, see
    `rope_fields.rescaled`. Raises InputError that lists what is missing, unexpected or misshapen, or says which rule
    the folder breaks. A draft head in a file of its own is optional. An lm_head stored beside a tied embedding is
    compared with it: one that differs makes the model untied.
    """
    check_folder(folder)
    config = read_config(folder, rope_scaling)
    config, entries = _settle_lm_head(config, _used(_named(folder), config))
    originals = _take(entries, lambda name: name.startswith(FP32_ORIGINAL))
    originals = {name.removeprefix(FP32_ORIGINAL): entry for name, entry in originals.items()}
    scales = _take(entries, lambda name: name.endswith(BLOCK_SCALES))
    scales = {name.removesuffix(BLOCK_SCALES): entry for name, entry in scales.items()}
    if stray := [
        name
        for name, entry in originals.items()
        if name not in entries or (entries[name].shape, "F32") != (entry.shape, entry.dtype)
    ]:
        raise InputError(
            "tensors_mismatch",
            f"{folder}: {FP32_ORIGINAL}* must repeat tensors of the folder in float32; not so: {shorten(stray)}",
        )
    if scales and not fp8:
        raise InputError(
            "fp8_not_runnable",
            f"{folder} holds FP8 weights with block scales, which MLX does not compute with",
            f"Convert it first: mlx_qwen35.convert --hf-path {folder} --mlx-path OUT",
        )
    has_head = any(name.startswith(MTP) for name in entries)
    head = draft_head.declared(folder) if has_head else draft_head.Declared()
    checkpoint = Checkpoint(folder, config, entries, originals, _is_raw(folder, config, entries), scales, head)
    _check_tensors(checkpoint)
    return checkpoint if has_head or not config.text.mtp_num_hidden_layers else _with_head(checkpoint)


def _take(entries: dict[str, Entry], chosen: Callable[[str], bool]) -> dict[str, Entry]:
    """Remove the chosen entries and return them."""
    return {name: entries.pop(name) for name in list(filter(chosen, entries))}


def _named(folder: Path) -> dict[str, Entry]:
    """All tensors of the base model's files by Hugging Face names."""
    entries: dict[str, Entry] = {}
    for file in safetensors_files(folder):
        for stored, entry in read_header(file).items():
            name = hugging_face_name(stored)
            if name in entries:
                files = f"{entries[name].file.name} and {file.name}"
                raise InputError("tensor_duplicate", f"{folder}: {name} is there twice, in {files}")
            entries[name] = entry
    return entries


def _used(entries: Mapping[str, Entry], config: Config) -> dict[str, Entry]:
    """The tensors without spare ones and without the parts that the configuration does not have."""
    absent = (VISION,) * (not config.vision) + (MTP,) * (not config.text.mtp_num_hidden_layers)
    return {
        name: entry
        for name, entry in entries.items()
        if name.startswith(FP32_ORIGINAL) or not (is_spare(name) or name.startswith(absent))
    }


def _settle_lm_head(config: Config, entries: dict[str, Entry]) -> tuple[Config, dict[str, Entry]]:
    """Configuration and tensors once it is known whether lm_head is the embedding.

    Where they are tied, one of the two stands for both, whichever is stored. Where both are and their numbers differ,
    both are used and the model is untied, whatever the configuration says, as in transformers.
    """
    head = {name.removeprefix(_HEAD): entry for name, entry in entries.items() if name.startswith(_HEAD)}
    if not head or not config.text.tie_word_embeddings:
        return config, entries
    embedding = {name.removeprefix(_EMBEDDING): e for name, e in entries.items() if name.startswith(_EMBEDDING)}
    rest = {name: entry for name, entry in entries.items() if not name.startswith(_HEAD)}
    if not embedding:
        return config, {_EMBEDDING + part: entry for part, entry in head.items()} | rest
    if set(head) == set(embedding) and all(same_numbers(entry, embedding[part]) for part, entry in head.items()):
        return config, rest
    return replace(config, text=replace(config.text, tie_word_embeddings=False)), entries


def repeats_embedding(folder: Path) -> bool:
    """Whether an lm_head is stored beside the embedding that config.json ties it to: its numbers decide, see above."""
    return read_config(folder).text.tie_word_embeddings and {f"{_HEAD}weight", f"{_EMBEDDING}weight"} <= set(
        _named(folder)
    )


def _with_head(base: Checkpoint) -> Checkpoint:
    """The base model with the draft head in a file of its own, or without it and with the reason."""
    file = None
    try:
        head = draft_head.declared(base.folder)
        if (file := draft_head.find(base.folder, head.file)) is None:
            return base
        own = {
            mtp_name(stored): entry
            for stored, entry in read_header(file).items()
            if not (draft_head.is_shared(stored) or is_spare(stored))
        }
        whole = replace(base, entries={**base.entries, **own}, mtp_head=head)
        if misfits := _misfits(own, dict(whole.part(mtp_shapes(base.config.text))), most=2):
            raise InputError("tensors_mismatch", "; ".join(misfits))
        _refuse_dtypes(whole, _wrong_dtypes(whole, own))
        return whole
    except (InputError, OSError) as error:
        where = f"in {file.relative_to(base.folder)}" if file else "in a file of its own"
        return replace(base, mtp_head_fault=f"the draft head {where} cannot be used: {error}")


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
    misfits, wrong = _misfits(checkpoint.entries, expected), _wrong_dtypes(checkpoint, checkpoint.entries)
    if (misfits or wrong) and not checkpoint.block_scales:
        unexpected = [name for name in checkpoint.entries if name not in expected]
        foreign.refuse(checkpoint.folder, unexpected, {checkpoint.entries[name].dtype for name in wrong})
    if misfits:
        raise InputError(
            "tensors_mismatch",
            "\n  ".join([f"the tensors of {checkpoint.folder} do not fit its config.json:", *misfits]),
        )
    _refuse_dtypes(checkpoint, wrong)


def _wrong_dtypes(checkpoint: Checkpoint, entries: Mapping[str, Entry]) -> dict[str, tuple[str, ...]]:
    """Name -> the dtypes offered, for each of these tensors that is stored in another one."""
    offered: dict[str, tuple[str, ...]] = {}
    for name in entries:
        stem, _, part = name.rpartition(".")
        quantization = checkpoint.quantization(f"{stem}.weight")
        if quantization and part in ("weight", "scales", "biases"):
            offered[name] = ("U32",) if part == "weight" else quantization.scale_dtypes
        elif name not in checkpoint.block_scales:
            offered[name] = FLOATS
    return {name: dtypes for name, dtypes in offered.items() if entries[name].dtype not in dtypes}


def _refuse_dtypes(checkpoint: Checkpoint, wrong: Mapping[str, tuple[str, ...]]) -> None:
    for name, dtypes in wrong.items():
        raise InputError(
            "dtype_unsupported",
            f"weights must be floating point numbers or quantized by an MLX program; {name} is "
            f"{checkpoint.entries[name].dtype} and should be {' or '.join(dtypes)}. Give the original checkpoint",
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
    return [f"{len(names)} {kind}: {shorten(names, most)}" for kind, names in problems.items() if names]
