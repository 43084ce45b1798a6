"""Which adapters are loaded with a model, under which names, and which of them a request gets that names none."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter import Adapter, adapter_folder, read_adapter, whole_arrays
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import spelled
from mlx_qwen35.values import shown

BASE = "base"  # the name that asks for no adapter
NONE = ""  # stands for no adapter in the rows of a cache

Given = str | Path | Mapping[str, str | Path] | list[str]  # as `load` or a command line gives adapters


def check_adapter(name: str, value: Any) -> Given:
    """The value of the option `adapter`, its names checked; the folders are not looked at."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):  # of a command line, one at a time
        _pairs(name, value)
        return value
    if isinstance(value, Mapping) and value:
        for own in value:
            check_name(own)
        if all(isinstance(path, str | Path) for path in value.values()):
            return dict(value)
    if isinstance(value, str | Path) and str(value):
        return value
    raise InputError(
        "option_invalid", f"{name} must be an adapter's folder, or {{name: folder}} of several; got {shown(value)}"
    )


def check_name(name: Any) -> None:
    """InputError for a name that an adapter cannot have."""
    if not isinstance(name, str) or name in (BASE, NONE) or not name.isprintable() or name != name.strip():
        raise InputError(
            "option_invalid",
            f"the name of an adapter must be printable text, and not {BASE!r}, which asks for none; got {shown(name)}. "
            "Give it one: {name: folder} in Python, NAME=PATH on the command line",
        )


def _named(given: Given) -> Mapping[str, str | Path]:
    """Name -> folder. A folder without a name has its own."""
    if isinstance(given, Mapping):
        return given
    if isinstance(given, list):
        return _pairs(spelled("adapter"), given)
    check_name(name := folder_name(given))
    return {name: given}


def _pairs(option: str, items: list[str]) -> dict[str, str | Path]:
    """The names and folders of NAME=PATH and PATH."""
    found: dict[str, str | Path] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or os.path.exists(item):
            name, path = folder_name(item), item
        check_name(name)
        if not path or name in found:
            why = f"two are called {name}" if path else f"{item} has no path"
            raise InputError("option_invalid", f"{option} must be NAME=PATH or PATH, each name once; {why}")
        found[name] = path
    return found


def folder_name(path: str | Path) -> str:
    return os.path.basename(os.path.realpath(adapter_folder(path)))


def check_beside(name: str, adapter: Adapter, alone: bool) -> None:
    """InputError adapter_unsupported for an adapter that cannot be loaded beside the weights, and must be fused.

    alone: whether it is the only adapter, and that of all requests.
    """
    if adapter.magnitudes:
        raise not_beside(name, adapter.path, "magnitudes (DoRA), which scale the rows of the weights themselves")
    if adapter.replaced and not alone:
        raise not_beside(
            name, adapter.path,
            f"whole tensors ({len(adapter.replaced)}), which every request would see: it can only be loaded alone, by "
            f"{spelled('adapter')} with its folder",
        )  # fmt: skip


def not_beside(name: str, path: Path, why: str) -> InputError:
    """The error of an adapter that must be fused."""
    return InputError(
        "adapter_unsupported",
        f"the adapter {name} has {why}",
        f"Or fuse it into a model of its own: mlx_qwen35.convert --hf-path MODEL --adapter {path} --mlx-path OUT",
    )


@dataclass
class Chosen:
    """Adapters that were read and checked, by name. default: the one of requests that name none."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    default: str = NONE

    @property
    def listed(self) -> list[Adapter]:
        return list(self.adapters.values())

    @property
    def whole(self) -> Mapping[str, mx.array]:
        """The tensors that stand in the place of the checkpoint's."""
        return self.adapters[self.default].replaced if self.default else {}

    def take_whole(self) -> dict[str, mx.array]:
        """The same, not held here any more, so that whoever reads them can let them go one by one."""
        whole = dict(self.whole)
        if whole:
            self.adapters[self.default] = replace(self.adapters[self.default], replaced={})
        return whole

    def opening(self, *prefixes: str) -> Callable[[], dict[str, mx.array]]:
        """Opens the whole tensors whose names begin so, anew each time: what was read of them before is not held."""
        own = self.adapters.get(self.default)
        stored = {name: entry for name, entry in own.stored.items() if name.startswith(prefixes)} if own else {}
        return partial(whole_arrays, stored, own is not None and own.format != "peft")


def look_at(given: Given | None, scale: float, headers: Checkpoint) -> None:
    """Refuse adapters that can never be loaded with a checkpoint of which only headers are there.

    A table of tokens that an adapter repeats is then like none, so what depends on such a table is not refused.
    """
    try:
        choose(given, scale, headers, numbers=False)
    except InputError as error:
        if error.code != "option_no_effect":
            raise


def choose(given: Given | None, scale: float, checkpoint: Checkpoint, numbers: bool = True) -> Chosen:
    """Read the adapters of the option `adapter`. scale: a factor of their own scales.

    A folder alone is the default of all requests, as is the only one of a command line. Of a mapping none is.
    numbers: whether those of the checkpoint are there, beside its headers.

    Raises InputError as `read_adapter` does, and adapter_unsupported for what must be fused.
    """
    if given is None:
        return Chosen()
    named = _named(given)
    chosen = Chosen({name: read_adapter(path, checkpoint, scale) for name, path in named.items()})
    if len(named) == 1 and not isinstance(given, Mapping):
        (chosen.default,) = named
    for name, adapter in chosen.adapters.items():
        check_beside(name, adapter, alone=bool(chosen.default) or not numbers)
    return chosen
