"""The memory plan of several rows: prompts and answers of different lengths, each of which comes and goes."""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_qwen35.budget.chunk import chunk_length
from mlx_qwen35.budget.plan import SAMPLING_ARRAYS, Machine, growth_bytes, kv_bytes, most_prefill_bytes, state_bytes
from mlx_qwen35.cache.prefix import RANKS
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.machine.memory import prefill_room


@dataclass(frozen=True)
class RowNeeds:
    """What a row is given room for."""

    prompt: int  # tokens
    answer: int  # tokens
    depth: int = 0  # tokens that are drafted at a time
    encoding: int = 0  # bytes of encoding what it shows, beside the vision encoder; 0: it shows nothing
    waits: bool = True  # until its prompt is read: then it encodes no more, and stores no more snapshots


@dataclass(frozen=True)
class RowsPlan:
    """The bytes of rows on one model, before any of them is read.

    weights: of the text model, and of the adapters beside it. head, encoder: of the draft head and of the vision
    encoder, where a row needs them.
    unpacks: whether prefill dequantizes matrices.
    """

    config: TextConfig
    machine: Machine
    weights: int
    head: int = 0
    encoder: int = 0
    unpacks: bool = False

    def nbytes(self, rows: Sequence[RowNeeds], apart: int = 0) -> int:
        """The peak of these rows. apart: bytes of snapshots in use that no row shares.

        Each row has its states twice while a step replaces them, with drafts behind each token of a step; one that is
        still read leaves a snapshot of each kind. One prompt is read at a time, one array of keys or values grows.
        """
        if not rows:
            return self.weights + self.machine.kept + apart
        longest = max(row.prompt + row.answer for row in rows)
        read = max(row.prompt for row in rows)
        size, form = self.machine.dtype.size, self.machine.kv
        encoding = max(row.encoding * row.waits for row in rows)
        working = most_prefill_bytes(self.config, self.machine, read, self.chunk(read), self.unpacks)
        working += sum(1 + row.depth for row in rows) * SAMPLING_ARRAYS * 4 * self.config.vocab_size
        working += growth_bytes(self.config, longest, size, form)
        return (
            self.weights + self.head * any(row.depth for row in rows) + (self.encoder + encoding) * bool(encoding)
            + sum(map(self._row, rows)) + apart + working + self.machine.kept
        )  # fmt: skip

    def _row(self, row: RowNeeds) -> int:
        size = self.machine.dtype.size
        drafting = self.config.mtp_num_hidden_layers if row.depth else 0
        states = 2 * (1 + row.depth) + len(RANKS) * row.waits
        held = kv_bytes(self.config, row.prompt + row.answer, size, drafting, self.machine.kv)
        return held + states * state_bytes(self.config, size)

    def fits(self, rows: Sequence[RowNeeds], apart: int = 0) -> bool:
        return self.nbytes(rows, apart) <= self.machine.limit

    def most(self, prompt: int, encoding: int = 0) -> int:
        """The most tokens of a prompt and its answer that fit alone. prompt: tokens of the prompt, if it fits."""
        lengths = range(1, self.config.max_position_embeddings + 1)

        def too_long(context: int) -> bool:
            return not self.fits([RowNeeds(min(prompt, context), max(0, context - prompt), encoding=encoding)])

        return bisect.bisect_left(lengths, True, key=too_long)

    def chunk(self, context: int) -> int:
        """Tokens of a chunk of a prompt of so many tokens."""
        return _chunk(self.config, self.machine, -(-context // 1024) * 1024)


@functools.lru_cache(1024)
def _chunk(config: TextConfig, machine: Machine, context: int) -> int:
    room, size = prefill_room(machine.limit), machine.dtype.size
    return chunk_length(config, context, room, size, machine.attention_impl, machine.chip, machine.buffers, machine.kv)
