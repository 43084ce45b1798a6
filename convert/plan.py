"""What a conversion will write, from the source's headers alone: a plan is a list of jobs, one for each tensor."""

import json
import math
import struct
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.checkpoint.checkpoint import FP32_ORIGINAL
from mlx_qwen35.checkpoint.dtypes import STORED
from mlx_qwen35.checkpoint.folder import INDEX
from mlx_qwen35.checkpoint.names import TEXT, VISION
from mlx_qwen35.checkpoint.shapes import keep_fp32
from mlx_qwen35.checkpoint.tensors import DTYPE_BYTES
from mlx_qwen35.convert.files import beside_weights, generation_config, new_config
from mlx_qwen35.convert.fusion import NO_ADAPTER, AdapterOptions
from mlx_qwen35.convert.recipes import NO_OPTIONS, ROUNDINGS, Recipe, StorageOptions, choose_recipe
from mlx_qwen35.convert.source import Source, SourceFile, Tensor, open_source
from mlx_qwen35.errors import InputError
from mlx_qwen35.quantization import Quantization
from mlx_qwen35.values import choice, shown

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Output:
    """One tensor of the folder to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Job:
    """One tensor of the source and the tensors written for it: itself in `dtype`, or the parts of its quantization.

    rounding: "search" or "nearest", of what is quantized here. Parts of a tensor that is quantized the same way already
    are copied, with scales and biases in `dtype`.
    """

    source: Tensor
    dtype: str
    quantization: Quantization | None
    outputs: tuple[Output, ...]
    rounding: str = "nearest"

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def copies_parts(self) -> bool:
        same = self.quantization is not None and self.quantization == self.source.quantization
        return same and not self.source.is_fused

    @property
    def is_original(self) -> bool:
        """Whether what is written is the float32 original of a tensor that another job writes in 16 bits."""
        return self.outputs[0].name.startswith(FP32_ORIGINAL)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, its first bytes, and where each tensor starts."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that a conversion writes.

    generation: the values of generation_config.json where it is not copied. copied: files of the source. sources: the
    files that are read, as they were when the plan was made. statistics: Hugging Face name of a weight -> (columns,)
    float32, the importance of an error in each input column; weights without an entry count all columns alike.
    shard_bytes: the most that a file of weights takes. adapter: what is told of the adapter that is fused, see
    `fusion.facts`.
    """

    jobs: tuple[Job, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    copied: tuple[Path, ...]
    sources: tuple[SourceFile, ...] = ()
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)
    shard_bytes: int = SHARD_BYTES
    adapter: Mapping[str, Any] | None = None

    @cached_property
    def index(self) -> dict[str, Any]:
        weight_map = {name: shard.file for shard in self.shards for name in shard.offsets}
        parameters = sum(math.prod(job.source.shape) for job in self.jobs if not job.is_original)
        metadata = {"total_size": sum(job.nbytes for job in self.jobs), "total_parameters": parameters}
        return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}

    @property
    def nbytes(self) -> int:
        """Bytes of the folder, without config.json and the index."""
        return sum(shard.nbytes for shard in self.shards) + sum(file.stat().st_size for file in self.copied)

    def write_headers(self, folder: Path) -> Path:
        """Write the result's config.json and headers into a folder, which is returned; the rest of each file is a hole.

        Code that reads no weights works as with the result.
        """
        for shard in self.shards:
            with (folder / shard.file).open("wb") as stream:
                stream.write(shard.header)
                stream.truncate(shard.nbytes)
        for name, values in {INDEX: self.index, "config.json": self.config}.items():
            (folder / name).write_text(json.dumps(values), encoding="utf-8")
        return folder

    def without_float16(self, names: Collection[str]) -> "ConversionPlan":
        """The same plan with tensors of these Hugging Face names, which do not fit float16, in another dtype.

        Quantized ones have scales in bfloat16. Others stay as the source has them, and need no float32 original.
        """
        jobs = []
        for job in self.jobs:
            if job.source.name not in names:
                jobs.append(job)
            elif not job.is_original:
                dtype = "BF16" if job.quantization else job.source.dtype
                jobs.append(_job(job.source, job.outputs[0].name, dtype, job.quantization, job.rounding))
        return replace(self, jobs=tuple(jobs), shards=_shards(jobs, self.shard_bytes))


def make_plan(
    folder: Path,
    options: StorageOptions = NO_OPTIONS,
    adapter: AdapterOptions = NO_ADAPTER,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> ConversionPlan:
    """Plan the conversion of a folder; reads headers and configuration, and the adapter, no weights.

    With neither a recipe nor quantize, what is quantized stays as it is. Raises InputError when the folder or the
    options break a rule. Warns where quantized weights are quantized anew.
    """
    recipe = choose_recipe(options)
    rounding = choice("--rounding", options.rounding, ROUNDINGS)
    source = open_source(folder, options.rope_scaling, adapter)
    if recipe is None:
        _refuse_packed(folder, source)
    if options.q_vision_bits is not None and not source.checkpoint.has(VISION):
        raise InputError("option_no_effect", f"{folder} has no vision encoder: leave --q-vision-bits out")
    asked = recipe.dtype if recipe else options.dtype
    stored = _output_dtype(source, asked)
    jobs = tuple(_jobs(source, recipe, stored, asked is not None, rounding))
    _warn_of_quantizing_anew(folder, jobs)
    quantized = {job.source.name: job.quantization for job in jobs if job.quantization}
    copied = beside_weights(folder)
    generation = generation_config(folder, source.checkpoint.config)
    if generation is not None:
        copied = tuple(file for file in copied if file.name != "generation_config.json")
    return ConversionPlan(
        jobs=jobs,
        shards=_shards(jobs, shard_bytes),
        config=new_config(source.config, recipe, quantized, stored),
        generation=generation,
        copied=copied,
        sources=source.files + tuple(SourceFile.at(file) for file in (folder / "config.json", *copied)),
        shard_bytes=shard_bytes,
        adapter=source.adapter,
    )


# --- jobs ------------------------------------------------------------------------------------------------------------


def _output_dtype(source: Source, asked: str | None) -> str:
    """The option, else what config.json names, else what the embedding is stored in; as safetensors calls it."""
    values, text = source.config, source.config.get("text_config", {})
    named = asked or values.get("torch_dtype") or values.get("dtype") or text.get("torch_dtype") or text.get("dtype")
    if named is None:
        tensors = (source.tensors[TEXT + name] for name in ("embed_tokens.weight", "norm.weight"))
        parts = (part.dtype for tensor in tensors if not tensor.block for part in tensor.parts)
        return next((part for part in parts if part in STORED.values()), "BF16")
    named = "float32" if named == "float64" else named  # the widest that is written
    if not isinstance(named, str) or named not in STORED:
        raise InputError(
            "config_field_unsupported",
            f"config.json names the dtype {shown(named)}; choose one of {', '.join(STORED)} with --dtype",
        )
    return STORED[named]


def _jobs(source: Source, recipe: Recipe | None, dtype: str, asked: bool, rounding: str) -> Iterator[Job]:
    """The jobs in the order of the data: text, vision, MTP head, by the names of Hugging Face's own classes.

    asked: whether an option names the dtype, so that scales which are copied get it too.
    """
    for name, tensor in source.tensors.items():
        stored_name = name if source.nested or not name.startswith(TEXT) else f"model.{name.removeprefix(TEXT)}"
        quantization = recipe.quantization(name, tensor.shape) if recipe else tensor.quantization
        if quantization:
            same = quantization == tensor.quantization and not asked and quantization.mode == "affine"
            same = same and not tensor.is_fused
            yield _job(tensor, stored_name, tensor.parts[1].dtype if same else dtype, quantization, rounding)
            continue
        own = "F32" if keep_fp32(name) else dtype
        yield _job(tensor, stored_name, own)
        is_text = name.startswith((TEXT, "lm_head."))
        if is_text and len(tensor.shape) == 1 and tensor.dtype == "F32" and own != "F32":
            yield _job(tensor, FP32_ORIGINAL + name, "F32")


def _job(
    source: Tensor, name: str, dtype: str, quantization: Quantization | None = None, rounding: str = "nearest"
) -> Job:
    if quantization is None:
        return Job(source, dtype, None, (Output(name, dtype, source.shape),))
    columns, group_size = source.shape[1], quantization.group_size
    if columns % group_size:
        raise InputError(
            "quantization_unfit",
            f"the width of every matrix must be a multiple of the group size; {name} is {columns} wide and the group "
            f"size is {group_size}. Choose another --q-group-size",
        )
    scales = dtype if quantization.mode == "affine" else "U8"
    outputs = tuple(
        Output(name.removesuffix("weight") + suffix, "U32" if suffix == "weight" else scales, shape)
        for suffix, shape in quantization.parts(source.shape).items()
    )
    job = Job(source, dtype, quantization, outputs, rounding)
    return replace(job, rounding="nearest") if job.copies_parts else job


def _refuse_packed(folder: Path, source: Source) -> None:
    """InputError where an adapter changes matrices that are packed, and would be packed again as they are."""
    packed = [name for name, tensor in source.tensors.items() if tensor.is_fused and tensor.quantization]
    if packed:
        raise InputError(
            "source_quantized",
            f"an adapter is fused into unquantized weights, and {folder} has {len(packed)} of those that it changes "
            f"quantized ({packed[0]} in {source.tensors[packed[0]].quantization}): packed again they would lose a part "
            "of it. Load the adapter beside this folder (--adapter of the other commands), convert the original with "
            "it, or choose what is written, as --recipe bf16",
        )


def _warn_of_quantizing_anew(folder: Path, jobs: Sequence[Job]) -> None:
    anew = [q for job in jobs if job.quantization and not job.copies_parts and (q := job.source.quantization)]
    if anew:
        before = ", ".join(sorted({f"{q.bits}-bit {q.mode}" for q in anew}))
        advice = "Convert the original where you can"
        if any(job.source.is_fused for job in jobs):
            advice += ": a part of the adapter is rounded away. Loaded beside this folder it stays whole"
        warnings.warn(
            f"{folder} is already quantized ({before}) and {len(anew)} of its matrices are quantized anew: the new "
            f"errors add to the old ones, which are not measured. {advice}",
            UserWarning,
            stacklevel=3,
        )


# --- output ----------------------------------------------------------------------------------------------------------


def _shards(jobs: Sequence[Job], most: int) -> tuple[Shard, ...]:
    """Jobs in order, files filled up to `most` bytes; what stands for one source tensor stays in one file."""
    groups: list[list[Output]] = [[]]
    used = 0
    for job in jobs:
        if groups[-1] and used + job.nbytes > most:
            groups.append([])
            used = 0
        groups[-1] += job.outputs
        used += job.nbytes
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return tuple(map(_shard, names, groups))


def _shard(file: str, outputs: list[Output]) -> Shard:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for output in sorted(outputs, key=lambda output: -DTYPE_BYTES[output.dtype]):  # wide first: all lie aligned
        header[output.name] = {
            "dtype": output.dtype,
            "shape": output.shape,
            "data_offsets": (position, position + output.nbytes),
        }
        position += output.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    offsets = {output.name: first + header[output.name]["data_offsets"][0] for output in outputs}
    return Shard(file, struct.pack("<Q", len(text)) + text, offsets, first + position)
