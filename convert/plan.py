"""What a conversion will write, from the source's headers alone: a plan is a list of jobs, one for each tensor."""

import copy
import fnmatch
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint import (
    DTYPE_BYTES,
    EXACT,
    TEXT,
    VISION,
    Checkpoint,
    Entry,
    Quantization,
    hugging_face_name,
    is_exact,
    mtp_shapes,
    open_checkpoint,
    text_shapes,
    vision_shapes,
)
from mlx_qwen35.config import Config, read_json
from mlx_qwen35.convert.packing import Packing, brief, config_entry, read_options
from mlx_qwen35.errors import InputError

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # option -> safetensors' name
SHARD_BYTES = 5_000_000_000
TAG = {"format": 1, "norms": "zero-centred"}
# Tokenizer, template, preprocessors, licence: all that belongs to a checkpoint beside weights and config.json.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("config.json", "*.index.json", ".*")
_END_OF_TURN = "<|im_end|>"


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
    """One tensor of the source and what stands for it: itself in `dtype`, or its parts packed from that dtype."""

    source: Entry
    dtype: str
    quantization: Quantization | None
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, its first bytes, and where each tensor starts."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Everything that will be written. `copied` are files of the source, generation_config.json perhaps among them."""

    jobs: tuple[Job, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    copied: tuple[Path, ...]

    @cached_property
    def index(self) -> dict[str, Any]:
        weight_map = {name: shard.file for shard in self.shards for name in shard.offsets}
        parameters = sum(math.prod(job.source.shape) for job in self.jobs if not job.outputs[0].name.startswith(EXACT))
        metadata = {"total_size": sum(job.nbytes for job in self.jobs), "total_parameters": parameters}
        return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}

    @property
    def nbytes(self) -> int:
        """Bytes that the folder takes, but for the few of config.json and index."""
        return sum(shard.nbytes for shard in self.shards) + sum(file.stat().st_size for file in self.copied)


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
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Plan the conversion of a raw Hugging Face folder; reads headers and configuration, no weights.

    Options are those of `convert`. Raises InputError when the folder or the options break a rule.
    """
    options = read_options(recipe, quantize, bits, group_size, mode, vision_bits, dtype)
    packing, dtype = options.packing, options.dtype
    checkpoint = _open_raw(folder)
    if vision_bits is not None and not checkpoint.has(VISION):
        raise InputError(
            f"--q-vision-bits {vision_bits} has no effect on a checkpoint without a vision tower; {folder} has none. "
            "Leave it out"
        )
    values = read_json(folder / "config.json")
    stored = _output_dtype(values, checkpoint, dtype)
    jobs = tuple(_jobs(checkpoint, packing, stored))
    copied = tuple(file for file in sorted(folder.iterdir()) if file.is_file() and _is_copied(file.name))
    has_generation = any(file.name == "generation_config.json" for file in copied)
    return Plan(
        jobs=jobs,
        shards=_shards(jobs, shard_bytes),
        config=_new_config(values, packing, jobs, stored),
        generation=None if has_generation else _generation(folder, checkpoint.config),
        copied=copied,
    )


# --- source ----------------------------------------------------------------------------------------------------------


def _open_raw(folder: Path) -> Checkpoint:
    advice = "This version converts raw Hugging Face folders: give the original checkpoint"
    if (folder / "config.json").is_file():
        values = read_json(folder / "config.json")
        for part in (values, values.get("text_config") or {}):
            if found := part.get("quantization") or part.get("quantization_config"):
                raise InputError(f"the source must not be quantized; {folder} is ({brief(found)}). {advice}")
    checkpoint, known = open_checkpoint(folder), DTYPES.values()
    if not checkpoint.raw:
        raise InputError(f"the source must be raw; an MLX program already converted {folder} (conv1d layout). {advice}")
    if other := [(name, entry.dtype) for name, entry in checkpoint.entries.items() if entry.dtype not in known]:
        name, found = other[0]
        raise InputError(f"weights must be float32, float16 or bfloat16; {name} is {found}. {advice}")
    return checkpoint


def _output_dtype(values: Mapping[str, Any], checkpoint: Checkpoint, asked: str | None) -> str:
    """The option, else what config.json names, else what the embedding is stored in; as safetensors calls it."""
    if asked is not None and asked not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {asked!r}")
    text = values.get("text_config", {})
    named = asked or values.get("torch_dtype") or values.get("dtype") or text.get("torch_dtype") or text.get("dtype")
    if named is None:
        return checkpoint.entries[f"{TEXT}embed_tokens.weight"].dtype
    if named not in DTYPES:
        raise InputError(f"config.json names the dtype {named!r}; choose one of {', '.join(DTYPES)} with --dtype")
    return DTYPES[named]


def _jobs(checkpoint: Checkpoint, packing: Packing | None, dtype: str) -> list[Job]:
    """The jobs in the order of the data: text, vision, draft head."""
    config = checkpoint.config
    text = text_shapes(config.text)
    vision = vision_shapes(config.vision) if config.vision else {}
    jobs = []
    for name, shape in (text | vision | mtp_shapes(config.text)).items():
        if name not in checkpoint.entries:  # vision tower and draft head may be absent, as a whole
            continue
        stored_name = checkpoint.entries[name].stored_name
        source = checkpoint.exact.get(name, checkpoint.entries[name])
        if how := packing and packing.of(name, shape):
            jobs.append(_packing_job(source, stored_name, dtype, how))
            continue
        own = "F32" if is_exact(name) else dtype
        jobs.append(Job(source, own, None, (Output(stored_name, own, shape),)))
        if name in text and len(shape) == 1 and source.dtype == "F32" and own != "F32":
            jobs.append(Job(source, "F32", None, (Output(EXACT + name, "F32", shape),)))
    return jobs


def _packing_job(source: Entry, name: str, dtype: str, quantization: Quantization) -> Job:
    columns = source.shape[1]
    if columns % quantization.group_size:
        raise InputError(
            f"the width of every matrix must be a multiple of the group size; {name} is {columns} wide and the group "
            f"size is {quantization.group_size}. Choose another --q-group-size"
        )
    scales = dtype if quantization.mode == "affine" else "U8"
    outputs = tuple(
        Output(name.removesuffix("weight") + suffix, "U32" if suffix == "weight" else scales, shape)
        for suffix, shape in quantization.parts(source.shape).items()
    )
    return Job(source, dtype, quantization, outputs)


def _is_copied(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _COPIED) and not any(
        fnmatch.fnmatchcase(name, pattern) for pattern in _NOT_COPIED
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


def _new_config(
    values: Mapping[str, Any], packing: Packing | None, jobs: tuple[Job, ...], dtype: str
) -> dict[str, Any]:
    """The source's config.json with its dtype fields renewed, the quantization as MLX programs read it, and our tag."""
    config = copy.deepcopy(dict(values))
    name = next(option for option, stored in DTYPES.items() if stored == dtype)
    parts = [part for part in (config, config.get("text_config"), config.get("vision_config")) if part]
    fields = [(part, field) for part in parts for field in ("dtype", "torch_dtype") if field in part]
    for part, field in fields or [(config.get("text_config", config), "dtype")]:
        part[field] = name
    if packing:
        packed = {hugging_face_name(job.outputs[0].name): job.quantization for job in jobs if job.quantization}
        entry = config_entry(packing, packed)
        config |= {"quantization": entry, "quantization_config": entry}
    return config | {"mlx_qwen35": TAG}


def _generation(folder: Path, config: Config) -> dict[str, Any] | None:
    """A generation_config.json with the end-of-turn token and those that config.json names; None when there is none."""
    turn = _end_of_turn(folder)
    ends = list(dict.fromkeys(([] if turn is None else [turn]) + list(config.eos_token_ids)))
    return {"eos_token_id": ends} if ends else None


def _end_of_turn(folder: Path) -> int | None:
    if (folder / "tokenizer_config.json").is_file():
        for number, token in (read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
            if token.get("content") == _END_OF_TURN:
                return int(number)
    if (folder / "tokenizer.json").is_file():
        for token in read_json(folder / "tokenizer.json").get("added_tokens") or []:
            if token.get("content") == _END_OF_TURN:
                return token["id"]
    return None
