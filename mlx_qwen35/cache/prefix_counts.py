"""What a library of prefixes has done, in numbers."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """What a library has done, in tokens (reused, read) and snapshots. skipped: why some were not stored."""

    reused: int = 0
    read: int = 0
    stored: int = 0
    evicted: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        skipped = "".join(f", {count} skipped: {why}" for why, count in self.skipped.items())
        total = self.reused + self.read
        share = f" ({100 * self.reused / total:.0f} %)" if total else ""
        return f"{self.reused} of {total} tokens reused{share}; {self.stored} stored, {self.evicted} evicted{skipped}"
