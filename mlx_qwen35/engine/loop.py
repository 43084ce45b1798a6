"""The decode loop: sample, run the model, sample again; with drafts several tokens a step. It knows token ids alone."""

import itertools
import operator
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.layer import CachePosition
from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.engine.drafts.speculate import Speculation
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.gated_delta import DeltaState
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import spelled

CLEAR_EVERY = 256  # steps between returning MLX's unused buffers to the system


class Step(NamedTuple):
    """One forward pass and the tokens sampled from its logits, all of it lazy."""

    sampled: mx.array  # (B, 1 + depth): the token after each input token
    finite: mx.array  # (B, 1 + depth) boolean: whether all logits of that token are finite
    inputs: mx.array  # (B, 1 + depth): the last sampled token, then the drafted ones
    lengths: Sequence[int]  # input tokens of each row; the rest is padding
    hidden: mx.array  # (B, 1 + depth, D): the hidden states of the inputs
    position: CachePosition  # of the cache before the pass
    states: Sequence[DeltaState] = ()  # of the DeltaNet layers before the pass, if tokens were drafted

    @property
    def depth(self) -> int:
        return self.sampled.shape[1] - 1


def decode(
    model: Model,
    cache: Cache,
    hidden: mx.array,
    sampler: Sampler,
    limits: Sequence[int],
    stop_ids: Collection[int],
    finished: Callable[[int], bool] = lambda row: False,
    speculation: Speculation | None = None,
) -> Iterator[list[int | None]]:
    """Sample tokens after `prefill` and yield them, at most one for each row at a time, None for a row without one.

    hidden: (B, D), of each row's last prompt token. A row ends with a stop id, which is yielded, at its limit, or when
    finished(row) is true after its token was yielded. The next step is computed while the caller has the token; with
    `speculation` a step may give several tokens, and the next one starts when these are known. When decoding ends, or
    the caller stops it, the cache holds every yielded token, except one that reached the longest limit.

    Raises InputError when logits are not finite, before a token of them is yielded; the cache is then of no use.
    """
    loop = _Loop(model, cache, sampler, _Rows(limits, stop_ids, finished), speculation)
    try:
        yield from loop.run(hidden)
    finally:
        loop.close()


class _Rows:
    """The yielded tokens of each row, and which rows are running."""

    def __init__(self, limits: Sequence[int], stop_ids: Collection[int], finished: Callable[[int], bool]):
        self.limits, self.stop_ids, self.finished = limits, stop_ids, finished
        self.running = [limit > 0 for limit in limits]
        self.counts = [0] * len(limits)  # tokens yielded
        self.taken = [0] * len(limits)  # tokens yielded of the last step
        self.lasts = [0] * len(limits)  # the last token
        self.pending = [False] * len(limits)  # whether the last token is not in the cache yet
        self.paused = 0.0  # seconds that the caller took over the last step

    def offer(self, tokens: Sequence[Sequence[int]]) -> Iterator[list[int | None]]:
        """Yield the first token of each row, then the second, until no running row has another."""
        self.taken, self.paused = [0] * len(tokens), 0.0
        for i in range(max(map(len, tokens))):
            offered = [own[i] if on and i < len(own) else None for own, on in zip(tokens, self.running, strict=True)]
            given = [(row, token) for row, token in enumerate(offered) if token is not None]
            if not given:
                return
            for row, token in given:
                self.taken[row], self.lasts[row] = i + 1, token
                self.counts[row] += 1
            given_at = time.perf_counter()
            yield offered
            self.paused += time.perf_counter() - given_at
            for row, token in given:
                limit = self.limits[row]
                self.running[row] = token not in self.stop_ids and self.counts[row] < limit and not self.finished(row)

    @property
    def left(self) -> list[int]:
        """How many more tokens each row may get."""
        return [on * (limit - n) for limit, n, on in zip(self.limits, self.counts, self.running, strict=True)]


class _Loop:
    """The steps: feed, receive, offer, settle, and again."""

    def __init__(self, model: Model, cache: Cache, sampler: Sampler, rows: _Rows, speculation: Speculation | None):
        self.model, self.cache, self.sampler, self.rows, self.speculation = model, cache, sampler, rows, speculation
        self.pass_start: CachePosition | None = None  # of the cache before a pass that is not settled

    def run(self, hidden: mx.array) -> Iterator[list[int | None]]:
        """hidden (B, D): of each row's last prompt token."""
        rows = self.rows
        none = [0] * len(rows.limits)
        step = self._sampled(mx.zeros((len(none), 1), mx.int32), none, hidden[:, None], self.cache.position)
        steps = itertools.count(1)
        while True:
            depth = self.speculation.depth() if self.speculation else 0
            following = None
            if step.depth == depth == 0 and max(rows.left) > 1:
                following = self._feed(step.sampled, 0)
            tokens: list[list[int]] = [[]] * len(none)
            rows.taken = none
            try:
                step, tokens = self._receive(step)
                yield from rows.offer(tokens)
            finally:
                self._settle(step, tokens, following is not None)
            if not any(rows.running):
                return
            del step  # and its states, before the next ones are made
            step = following or self._feed(mx.array(rows.lasts)[:, None], min(depth, max(rows.left) - 1))
            if next(steps) % CLEAR_EVERY == 0:
                mx.clear_cache()

    def _feed(self, tokens: mx.array, depth: int) -> Step:
        """One pass over (B, 1) tokens and `depth` drafted ones; rows that have ended have padding."""
        rows = self.rows
        lengths = [min(1 + depth, left) or int(pending) for left, pending in zip(rows.left, rows.pending, strict=True)]
        if self.speculation and depth:
            tokens = self.speculation.propose(tokens, [min(1, n) for n in lengths], depth, self.sampler)
        return self._pass(tokens, lengths)

    def _pass(self, tokens: mx.array, lengths: Sequence[int]) -> Step:
        """One pass over the first lengths[i] of row i's tokens (B, 1 + depth)."""
        depth, position = tokens.shape[1] - 1, self.cache.position
        states = self.cache.states() if depth else []
        uneven = None if min(lengths) == 1 + depth else lengths
        self.pass_start = position
        hidden = self.model.hidden(tokens, self.cache, uneven, stepwise=depth > 0)
        if self.speculation and not depth:
            self.speculation.follow(tokens, hidden, lengths)
        self.rows.pending = [False] * len(lengths)
        if not depth:
            self.pass_start = None
        return self._sampled(tokens, lengths, hidden, position, states)

    def _sampled(
        self,
        tokens: mx.array,
        lengths: Sequence[int],
        hidden: mx.array,
        position: CachePosition,
        states: Sequence[DeltaState] = (),
    ) -> Step:
        """The step of a pass over tokens (B, n) with hidden states (B, n, D)."""
        logits = self.model.logits(hidden)
        drafted = tokens[:, 1:] if tokens.shape[1] > 1 else None
        sampled, finite = self.sampler.peek(logits, drafted), (mx.abs(logits) < mx.inf).all(-1)
        step = Step(sampled, finite, tokens, lengths, hidden, position, states)
        if not step.depth:
            self.sampler.commit(step.sampled)
        mx.async_eval(step.sampled, step.finite)
        return step

    def _receive(self, step: Step) -> tuple[Step, list[list[int]]]:
        """Wait for a step. The tokens of each running row are its accepted drafts and one more."""
        tokens, bad = self._accepted(step)
        if bad and step.depth:  # a drafted token may overflow, and infinity passes through attention weights of 0
            self.cache.rewind(step.position, step.states)
            step = self._pass(step.inputs[:, :1], [min(1, n) for n in step.lengths])
            tokens, bad = self._accepted(step)
        if bad:
            _raise_not_finite(self.cache, bad[0], self.model)
        if self.speculation:
            self.speculation.record(step.lengths, tokens, self.rows.paused)
        return step, tokens

    def _accepted(self, step: Step) -> tuple[list[list[int]], list[int]]:
        """The tokens of each row, and the rows with a logit that is not finite."""
        sampled, finite, inputs = (np.array(array).tolist() for array in (step.sampled, step.finite, step.inputs))
        tokens: list[list[int]] = []
        for row, running in enumerate(self.rows.running):
            drafted = inputs[row][1 : step.lengths[row]]
            accepted = sum(itertools.takewhile(bool, map(operator.eq, drafted, sampled[row])))
            tokens.append(sampled[row][: accepted + 1] if running else [])
        return tokens, [row for row, own in enumerate(tokens) if not all(finite[row][: len(own)])]

    def _settle(self, step: Step, tokens: Sequence[Sequence[int]], cached: bool) -> None:
        """Bring cache and sampler to the yielded tokens. The last token of a row may be missing in the cache.

        cached: whether the next step has put it there.
        """
        rows = self.rows
        if self.speculation and step.depth and self._unsettled:
            accepted = [max(0, len(own) - 1) for own in tokens]
            kept = [n and 1 + min(m, k) for n, m, k in zip(step.lengths, rows.taken, accepted, strict=True)]
            self.pass_start = None
            self.cache.rollback(step.position, kept)
            self.sampler.commit(step.sampled, rows.taken)
            self.speculation.follow(step.inputs, step.hidden, kept)
        if not cached:
            rows.pending = [0 < n == len(own) for n, own in zip(rows.taken, tokens, strict=True)]

    @property
    def _unsettled(self) -> CachePosition | None:
        """The start of a pass whose drafted tokens are in the cache, neither accepted nor rejected; None without."""
        return None if self.cache.position is self.pass_start else self.pass_start

    def close(self) -> None:
        """Put the last yielded tokens into the cache, unless they reached the longest limit."""
        rows = self.rows
        if start := self._unsettled:  # Ctrl-C: no drafted token may stay
            fed = [after - before for after, before in zip(self.cache.row_lengths, start.row_lengths, strict=True)]
            self.cache.rollback(start, [min(1, n) for n in fed])
            rows.pending = [False] * len(rows.pending)
        most = max(rows.limits)
        lengths = [int(pending and n < most) for pending, n in zip(rows.pending, rows.counts, strict=True)]
        if any(lengths):
            tokens = mx.array(rows.lasts)[:, None]
            hidden = self.model.hidden(tokens, self.cache, None if all(lengths) else lengths)
            if self.speculation:
                self.speculation.follow(tokens, hidden, lengths)
            self.cache.evaluate()
        if self.speculation:
            self.cache.detach()


def _raise_not_finite(cache: Cache, row: int, model: Model) -> None:
    """Name the first layer whose cache, which is computed from the layer's input, is not finite in this row."""
    layer = cache.first_not_finite(row)
    origin = "the last layer or the LM head made them so" if layer is None else f"they begin in or before layer {layer}"
    raise InputError(
        "logits_not_finite",
        f"logits must be finite, and are not; {origin}. Activations left the range of {dtype_name(model.dtype)}, or "
        f"the checkpoint is damaged. Try {spelled('dtype', 'bfloat16')}, then float32, or convert it again. "
        "mlx_qwen35.doctor --model MODEL --probe shows the largest activation of each layer",
    )
