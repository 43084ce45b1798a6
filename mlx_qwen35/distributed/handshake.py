"""What ranks must have in common, looked at before weights are read.

Equal must be: the versions of this package and of MLX, this package's code, what MLX computes on (the GPU's make or the
CPU), the text model's configuration with its rotary embedding, its quantization and weights, and the adapters. What
may differ: chips, memory, paths, and vision encoder and draft head, which rank 0 alone has. Rank 0 says the dtype, and
the form of keys and values.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from mlx_qwen35.backend import backend
from mlx_qwen35.checkpoint.adapter_choice import Chosen
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.fingerprint import fingerprint
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.memory import usable_bytes
from mlx_qwen35.machine.versions import code_fingerprint, versions
from mlx_qwen35.values import shown


@dataclass(frozen=True)
class Facts:
    """Of one rank. All values are such that JSON can hold them.

    versions: by package. code: the fingerprint of this package's. device: what MLX computes on, by the backend's name.
    config: of the text model, by field. quantization: as config.json has it. weights: the fingerprint. adapters: their
    fingerprints by name. memory: bytes that the model may take. folder: of the checkpoint.
    """

    versions: Mapping[str, str]
    device: str
    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    weights: str
    code: str = ""
    adapters: Mapping[str, str] = field(default_factory=dict)
    memory: int = 0
    folder: str = ""

    @classmethod
    def of(cls, checkpoint: Checkpoint, adapters: Chosen, limit: int | None = None) -> Self:
        """This rank's. checkpoint: the whole one. limit: bytes that the user allows; None: by this machine."""
        prints = {name: adapter.fingerprint for name, adapter in adapters.adapters.items()}
        return cls.from_json(
            {
                "versions": versions(), "device": backend().name, "config": asdict(checkpoint.config.text),
                "quantization": checkpoint.config.quantization, "weights": fingerprint(checkpoint),
                "code": code_fingerprint(), "adapters": prints, "memory": usable_bytes(limit),
                "folder": str(checkpoint.folder),
            }
        )  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Of what `as_json` made, in whatever version: fields that are not there count as empty, others are left."""
        values = json.loads(json.dumps(values))  # tuples are lists, as they are behind the channel
        empty = {"device": "", "weights": "", "code": "", "folder": "", "memory": 0}
        return cls(**{name: values.get(name, empty.get(name, {})) for name in (each.name for each in fields(cls))})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def agree(facts: Sequence[Facts], hosts: Sequence[str]) -> None:
    """Compare what ranks must have in common. Both in the order of ranks; hosts: names, for the message.

    InputError ranks_differ for the first rank that differs from rank 0, with what differs, both values and a remedy.
    """
    first = facts[0]
    for rank, other in enumerate(facts):
        for compared in ("versions", "code", "device", "config", "quantization", "weights", "adapters"):
            if getattr(first, compared) != getattr(other, compared):
                what, own, its = _difference(compared, getattr(first, compared), getattr(other, compared))
                raise InputError(
                    "ranks_differ",
                    f"all ranks must have the same {what}: rank 0 ({hosts[0]}) has {own}, rank {rank} ({hosts[rank]}) "
                    f"has {its}",
                    _remedy(compared, what, first, other, hosts[rank]),
                )


def _difference(name: str, own: Any, its: Any) -> tuple[str, str, str]:
    """The innermost thing that differs, and both values."""
    if isinstance(own, dict) and isinstance(its, dict):
        key = next(key for key in (own | its) if own.get(key, _ABSENT) != its.get(key, _ABSENT))
        return _difference(f"{name} {key}", own.get(key, _ABSENT), its.get(key, _ABSENT))
    if name.startswith(("weights", "code", "adapters")):  # fingerprints: their beginnings tell them apart
        own, its = (value if value is _ABSENT else value[:12] for value in (own, its))
    return name, _shown(own), _shown(its)


_ABSENT = object()


def _shown(value: Any) -> str:
    return "none" if value is _ABSENT else shown(value)


def _remedy(compared: str, what: str, first: Facts, other: Facts, host: str) -> str:
    if compared == "versions":
        package = what.removeprefix("versions ")
        own = first.versions.get(package, "")
        if package == "mlx-qwen35":
            return f"Install {own} on {host}, from where it was installed here"
        return f"On {host}: pip install {package}=={own}"
    if compared == "code":
        return f"Both say the same version, and are of different commits: install on {host} what is installed here"
    if compared == "device":
        return "MLX must be installed for the same kind of processor on all machines"
    if compared == "adapters":
        return f"Copy the adapter's folder from rank 0's machine to {host}"
    own, its = shlex.quote(f"{first.folder}/"), shlex.quote(f"{host}:{other.folder}/")
    return f"Name one revision of the model, or copy rank 0's folder: rsync -aL --delete {own} {its}"
