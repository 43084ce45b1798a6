"""What the models of an evaluation are called beside each other: no two alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_qwen35.console.report import last

OF_WEIGHTS = ("weights", "adapter", "adapter_fingerprint")  # which a name tells otherwise, or no reader knows


def labels(models: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The names of one model or two, each by what was given and how it was loaded; see `Subject.loaded`.

    Two of one name are told apart by their adapters ("nano + house"), by the folders that theirs are in ("a/4bit"), and
    by how they were loaded ("nano, kv_bits 8"); where nothing tells them apart the second is "nano again".
    """
    adapted = [f" + {own['adapter']}" if "adapter" in own else "" for _, own in models]
    found = [last(source) + more for (source, _), more in zip(models, adapted, strict=True)]
    if len({*found}) == len(found):
        return found
    tails = _tails([Path(source).expanduser() for source, _ in models])
    if len({*tails}) == len(tails):
        return [tail + more for tail, more in zip(tails, adapted, strict=True)]
    first, second = (own for _, own in models)
    names = [name for name in {**first, **second} if name not in OF_WEIGHTS and first.get(name) != second.get(name)]
    if not names:
        return [found[0], f"{found[1]} again"]
    return [
        ", ".join([name, *(f"{setting} {own[setting]}" for setting in names if setting in own)])
        for name, (_, own) in zip(found, models, strict=True)
    ]


def _tails(folders: Sequence[Path]) -> list[str]:
    """The last parts of folders, as many as tell them apart; the names as they are of what is no folder."""
    if not all(folder.exists() for folder in folders):
        return [str(folder) for folder in folders]
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        tails = ["/".join(own[-count:]) for own in parts]
        if len({*tails}) == len(tails):
            break
    return tails


def names(summary: Mapping[str, Any]) -> tuple[str, str]:
    """The names of a summary's model and of the one that it is compared with, "" for none."""
    loaded = summary["loaded"]
    return loaded["model"]["name"], loaded["against"]["name"] if loaded["against"] else ""
