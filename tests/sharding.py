"""A checkpoint's weights in several files."""

import json
import shutil
import struct
from pathlib import Path

from mlx_qwen35.checkpoint.folder import INDEX, SINGLE


def split(source: Path, target: Path, count: int) -> Path:
    """A copy of a folder whose model.safetensors is cut into so many files, by the order of the data, with an index."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.name != SINGLE:
            shutil.copyfile(file, target / file.name)
    data = (source / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    most = sum(header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names) / count
    parts: list[list[str]] = [[]]
    taken = 0
    for name in names:
        start, stop = header[name]["data_offsets"]
        if parts[-1] and taken + stop - start > most and len(parts) < count:
            parts.append([])
            taken = 0
        parts[-1].append(name)
        taken += stop - start
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model.safetensors-{number:05d}-of-{len(parts):05d}.safetensors"
        own, pieces, position = {}, [], 0
        for name in part:
            start, stop = header[name]["data_offsets"]
            pieces.append(data[8 + length + start : 8 + length + stop])
            own[name] = header[name] | {"data_offsets": [position, position + stop - start]}
            position += stop - start
        text = json.dumps(own).encode()
        (target / file).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(pieces))
        weight_map |= dict.fromkeys(part, file)
    (target / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return target
