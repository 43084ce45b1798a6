"""What a conversion will write, from the source's headers alone: a plan is a list of jobs, one for each tensor."""

import json
import math
import struct
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.checkpoint.checkpoint import FP32_ORIGINAL
from mlx_qwen35.checkpoint.dtypes import STORED
from mlx_qwen35.checkpoint.names import TEXT, VISION
from mlx_qwen35.checkpoint.shapes import keep_fp32
from mlx_qwen35.checkpoint.tensors import DTYPE_BYTES
from mlx_qwen35.convert.files import beside_weights, generation_config, new_config
from mlx_qwen35.convert.packing import Packing, read_options
from mlx_qwen35.convert.source import Found, Source, Tensor, open_source
from mlx_qwen35.errors import InputError
from mlx_qwen35.quantization import Quantization
from mlx_qwen35.values import shown

ROUNDINGS = ("search", "nearest")
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
    """One tensor of the source and what stands for it: itself in `dtype`, or its parts packed from that dtype.

    rounding: "search" or "nearest", of what is packed here. Parts that are already packed as asked are copied, with
    scales and biases in `dtype`.
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
        return self.quantization is not None and self.quantization == self.source.how


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, its first bytes, and where each tensor starts."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Everything that will be written.

    copied: files of the source, generation_config.json perhaps among them. sources: the files read, as they were when
    the plan was made. statistics: Hugging Face name of a weight -> (columns,) float32, what an error in each input
    column counts. shard_bytes: of a file, at most.
    """

    jobs: tuple[Job, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    copied: tuple[Path, ...]
    sources: tuple[Found, ...] = ()
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)
    shard_bytes: int = SHARD_BYTES

    @cached_property
    def index(self) -> dict[str, Any]:
        weight_map = {name: shard.file for shard in self.shards for name in shard.offsets}
        weights = [job.source for job in self.jobs if not job.outputs[0].name.startswith(FP32_ORIGINAL)]
        parameters = sum(math.prod(weight.shape) for weight in weights)
        metadata = {"total_size": sum(job.nbytes for job in self.jobs), "total_parameters": parameters}
        return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}

    @property
    def nbytes(self) -> int:
        """Bytes that the folder takes, but for the few of config.json and index."""
        return sum(shard.nbytes for shard in self.shards) + sum(file.stat().st_size for file in self.copied)

    def keeping(self, names: Collection[str]) -> "Plan":
        """The same plan with the tensors of these Hugging Face names in a dtype that holds what float16 does not.

        Packed ones have scales in bfloat16; others stay as the source has them, and need no exact copy beside.
        """
        jobs = []
        for job in self.jobs:
            name = job.outputs[0].name
            if job.source.name not in names:
                jobs.append(job)
            elif not name.startswith(FP32_ORIGINAL):
                dtype = "BF16" if job.quantization else job.source.dtype
                jobs.append(_job(job.source, name, dtype, job.quantization, job.rounding))
        return replace(self, jobs=tuple(jobs), shards=_shards(tuple(jobs), self.shard_bytes))


def make_plan(
    folder: Path,
    *,
    recipe: str | None = None,
    quantize: bool = False,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    vision_bits: int | None = None,
    dtype: str | None = None,
    rounding: str = "search",
    statistics: Mapping[str, np.ndarray] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Plan the conversion of a folder; reads headers and configuration, no weights.

    Options are those of `convert`; with neither recipe nor quantize, what is packed stays packed as it is. statistics:
    see Plan; weights that it does not name count all columns alike. Raises InputError when the folder or the options
    break a rule. Warns when packed weights are packed in another way.
    """
    options = read_options(recipe, quantize, bits, group_size, mode, vision_bits, dtype)
    if rounding not in ROUNDINGS:
        raise InputError("option_invalid", f"--rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    source = open_source(folder)
    if vision_bits is not None and not source.checkpoint.has(VISION):
        raise InputError(
            "option_no_effect",
            f"--q-vision-bits {vision_bits} has no effect on a checkpoint without a vision tower; {folder} has none. "
            "Leave it out",
        )
    stored = _output_dtype(source, options.dtype)
    keep = options.recipe is None and options.packing is None
    jobs = tuple(_jobs(source, options.packing, keep, stored, options.dtype is not None, rounding))
    _warn_of_packing_anew(folder, jobs)
    packed = {job.source.name: job.quantization for job in jobs if job.quantization}
    copied = beside_weights(folder)
    generation = generation_config(folder, source.checkpoint.config)
    if generation is not None:
        copied = tuple(file for file in copied if file.name != "generation_config.json")
    return Plan(
        jobs=jobs,
        shards=_shards(jobs, shard_bytes),
        config=new_config(source.config, options.packing, keep, packed, stored),
        generation=generation,
        copied=copied,
        sources=source.files + tuple(Found.at(file) for file in (folder / "config.json", *copied)),
        statistics=statistics or {},
        shard_bytes=shard_bytes,
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


def _jobs(source: Source, packing: Packing | None, keep: bool, dtype: str, asked: bool, rounding: str) -> Iterator[Job]:
    """The jobs in the order of the data: text, vision, draft head, by the names of Hugging Face's own classes.

    keep: what is packed stays so. asked: the dtype was, so that scales which are copied get it too.
    """
    for name, tensor in source.tensors.items():
        stored_name = name if source.nested or not name.startswith(TEXT) else f"model.{name.removeprefix(TEXT)}"
        how = tensor.how if keep else packing and packing.of(name, tensor.shape)
        if how:
            scales = tensor.parts[1].dtype if how == tensor.how and not asked and how.mode == "affine" else dtype
            yield _job(tensor, stored_name, scales, how, rounding)
            continue
        own = "F32" if keep_fp32(name) else dtype
        yield _job(tensor, stored_name, own, None)
        is_text = name.startswith((TEXT, "lm_head."))
        if is_text and len(tensor.shape) == 1 and tensor.dtype == "F32" and own != "F32":
            yield _job(tensor, FP32_ORIGINAL + name, "F32", None)


def _job(source: Tensor, name: str, dtype: str, how: Quantization | None, rounding: str = "nearest") -> Job:
    if how is None:
        return Job(source, dtype, None, (Output(name, dtype, source.shape),))
    columns = source.shape[1]
    if columns % how.group_size:
        raise InputError(
            "quantization_unfit",
            f"the width of every matrix must be a multiple of the group size; {name} is {columns} wide and the group "
            f"size is {how.group_size}. Choose another --q-group-size",
        )
    scales = dtype if how.mode == "affine" else "U8"
    outputs = tuple(
        Output(name.removesuffix("weight") + suffix, "U32" if suffix == "weight" else scales, shape)
        for suffix, shape in how.parts(source.shape).items()
    )
    return Job(source, dtype, how, outputs, "nearest" if how == source.how else rounding)


def _warn_of_packing_anew(folder: Path, jobs: tuple[Job, ...]) -> None:
    anew = [job for job in jobs if job.quantization and job.source.how and not job.copies_parts]
    if not anew:
        return
    kinds = sorted({(job.source.how.bits, job.source.how.mode) for job in anew})
    warnings.warn(
        f"{folder} is already quantized ({', '.join(f'{bits}-bit {mode}' for bits, mode in kinds)}) and "
        f"{len(anew)} of its matrices are packed anew: the new errors add to those that it has, and the errors "
        "measured are against it. Convert the original where you can",
        UserWarning,
        stacklevel=3,
    )


# --- output ----------------------------------------------------------------------------------------------------------


def _shards(jobs: tuple[Job, ...], most: int) -> tuple[Shard, ...]:
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
