"""The one loop: draw, feed, draw; with drafts several tokens at a time. It knows ids, never text."""

import itertools
import operator
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.layer import Place
from mlx_qwen35.engine.drafts.speculate import Speculation
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.gated_delta import DeltaState
from mlx_qwen35.model.model import Model

CLEAR_EVERY = 256  # steps between returning MLX's unused buffers to the system


class Step(NamedTuple):
    """One pass of the model and the tokens drawn of it, of which nothing has been looked at yet."""

    drawn: mx.array  # (B, 1 + depth): what follows each token that was read
    finite: mx.array  # (B, 1 + depth) boolean: whether all logits of it are
    read: mx.array  # (B, 1 + depth): the last token that was drawn before, then guesses at what follows
    lengths: Sequence[int]  # how many of those each row has read
    hidden: mx.array  # (B, 1 + depth, D): what they gave
    place: Place  # where the cache was before
    memories: Sequence[DeltaState] = ()  # of DeltaNet layers, before; where there are guesses

    @property
    def depth(self) -> int:
        return self.drawn.shape[1] - 1


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
    """Draw tokens after `read` and yield them, one at most for each row at a time, None for rows that have none.

    A row ends with a stop id, which is yielded, at its limit, or when finished(row) says so after its token was
    yielded. The next step is under way while a token is looked at; with `speculation` a step may give several tokens,
    and starts when those of the one before are known. The cache has read every token that was yielded in the end, and
    so it has where the caller stops early; except those that were the last of max(limits).

    Raises InputError when logits are not finite, before a token of them is yielded; the cache is then of no use.
    """
    loop = _Loop(model, cache, sampler, _Rows(limits, stop_ids, finished), speculation)
    try:
        yield from loop.run(hidden)
    finally:
        loop.close()


class _Rows:
    """What was yielded of each row, and which of them go on."""

    def __init__(self, limits: Sequence[int], stop_ids: Collection[int], finished: Callable[[int], bool]):
        self.limits, self.stop_ids, self.finished = limits, stop_ids, finished
        self.running = [limit > 0 for limit in limits]
        self.counts = [0] * len(limits)  # tokens yielded
        self.taken = [0] * len(limits)  # of the last step
        self.lasts = [0] * len(limits)  # the last token of each
        self.unread = [False] * len(limits)  # by the model
        self.paused = 0.0  # seconds that the caller took over the last step

    def offer(self, tokens: Sequence[Sequence[int]]) -> Iterator[list[int | None]]:
        """Yield the first token of each row, then the second, until none has more or goes on."""
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
        """How many more tokens each row may have."""
        return [on * (limit - n) for limit, n, on in zip(self.limits, self.counts, self.running, strict=True)]


class _Loop:
    """feed, look, offer, settle, and again."""

    def __init__(self, model: Model, cache: Cache, sampler: Sampler, rows: _Rows, speculation: Speculation | None):
        self.model, self.cache, self.sampler, self.rows, self.speculation = model, cache, sampler, rows, speculation
        self.steps = 0
        self.under_way: Place | None = None  # where the cache was before a pass whose tokens are not settled

    def run(self, hidden: mx.array) -> Iterator[list[int | None]]:
        """hidden (B, D): of the last token that each row has read."""
        rows = self.rows
        none = [0] * len(rows.limits)
        step = self._drawn(mx.zeros((len(none), 1), mx.int32), none, hidden[:, None], self.cache.place)
        while True:
            depth = self.speculation.depth() if self.speculation else 0
            following = None
            if step.depth == depth == 0 and max(rows.left) > 1:
                following = self._feed(step.drawn, 0)
            tokens, rows.taken = [[]] * len(none), none
            try:
                step, tokens = self._look(step)
                yield from rows.offer(tokens)
            finally:
                self._settle(step, tokens, following is not None)
            if not any(rows.running):
                return
            del step  # and the memories that it holds, before the next ones are made
            step = following or self._feed(mx.array(rows.lasts)[:, None], min(depth, max(rows.left) - 1))
            self.steps += 1
            if self.steps % CLEAR_EVERY == 0:
                mx.clear_cache()

    def _feed(self, tokens: mx.array, depth: int) -> Step:
        """Read (B, 1) tokens, and guesses at the next `depth` ones; rows that have ended read nothing."""
        rows = self.rows
        lengths = [min(1 + depth, left) or int(unread) for left, unread in zip(rows.left, rows.unread, strict=True)]
        if depth:
            tokens = self.speculation.propose(tokens, [min(1, n) for n in lengths], depth, self.sampler)
        return self._pass(tokens, lengths)

    def _pass(self, tokens: mx.array, lengths: Sequence[int]) -> Step:
        """Read the first lengths[i] of row i's tokens (B, 1 + depth)."""
        depth, place = tokens.shape[1] - 1, self.cache.place
        memories = self.cache.memories() if depth else []
        self.under_way = place
        uneven = None if min(lengths) == 1 + depth else lengths
        hidden = self.model.hidden(tokens, self.cache, uneven, stepwise=depth > 0)
        if self.speculation and not depth:
            self.speculation.follow(tokens, hidden, lengths)
        self.rows.unread = [False] * len(lengths)
        if not depth:
            self.under_way = None
        return self._drawn(tokens, lengths, hidden, place, memories)

    def _drawn(
        self,
        tokens: mx.array,
        lengths: Sequence[int],
        hidden: mx.array,
        place: Place,
        memories: Sequence[DeltaState] = (),
    ) -> Step:
        """The step of a pass over (B, n) tokens that gave hidden (B, n, D)."""
        logits = self.model.logits(hidden)
        guesses = tokens[:, 1:] if tokens.shape[1] > 1 else None
        step = Step(self.sampler.look(logits, guesses), _finite(logits), tokens, lengths, hidden, place, memories)
        if not step.depth:
            self.sampler.take(step.drawn)
        mx.async_eval(step.drawn, step.finite)
        return step

    def _look(self, step: Step) -> tuple[Step, list[list[int]]]:
        """The tokens of each running row: what was drawn behind guesses that were right, and one more."""
        tokens, bad = self._found(step)
        if bad and step.depth:  # a guess may overflow, and attention lets infinity through where it sees nothing
            self.cache.go_back(step.place, step.memories)
            step = self._pass(step.read[:, :1], [min(1, n) for n in step.lengths])
            tokens, bad = self._found(step)
        if bad:
            _raise_not_finite(self.cache, bad[0], self.model)
        if self.speculation:
            self.speculation.record(step.lengths, tokens, self.rows.paused)
        return step, tokens

    def _found(self, step: Step) -> tuple[list[list[int]], list[int]]:
        """The tokens of each row, and the rows of which a logit is not finite."""
        drawn, finite = step.drawn.tolist(), step.finite.tolist()
        read = step.read.tolist() if step.depth else drawn
        tokens: list[list[int]] = []
        for row, running in enumerate(self.rows.running):
            guesses = read[row][1 : step.lengths[row]]
            right = sum(itertools.takewhile(bool, map(operator.eq, guesses, drawn[row])))
            tokens.append(drawn[row][: right + 1] if running else [])
        return tokens, [row for row, own in enumerate(tokens) if not all(finite[row][: len(own)])]

    def _settle(self, step: Step, tokens: Sequence[Sequence[int]], read: bool) -> None:
        """Bring cache and sampler to where the tokens that were yielded have been read, the last ones perhaps not.

        read: whether the next step has read those.
        """
        rows = self.rows
        if step.depth and self._unsettled:
            right = [max(0, len(own) - 1) for own in tokens]
            kept = [n and 1 + min(m, k) for n, m, k in zip(step.lengths, rows.taken, right, strict=True)]
            self.under_way = None
            self.cache.keep(step.place, kept)
            self.sampler.take(step.drawn, rows.taken)
            self.speculation.follow(step.read, step.hidden, kept)
        if not read:
            rows.unread = [0 < n == len(own) for n, own in zip(rows.taken, tokens, strict=True)]

    @property
    def _unsettled(self) -> bool:
        """Whether the cache has read guesses of which it is not known how many stay."""
        return self.under_way is not None and self.cache.place is not self.under_way

    def close(self) -> None:
        """Read what was yielded last, unless all rows have reached their limits with it."""
        rows = self.rows
        if self._unsettled:  # Ctrl-C: no guess may stay
            lengths = zip(self.cache.place.row_lengths, self.under_way.row_lengths, strict=True)
            self.cache.keep(self.under_way, [min(1, after - before) for after, before in lengths])
            rows.unread = [False] * len(rows.unread)
        most = max(rows.limits)
        lengths = [int(unread and n < most) for unread, n in zip(rows.unread, rows.counts, strict=True)]
        if any(lengths):
            tokens = mx.array(rows.lasts)[:, None]
            hidden = self.model.hidden(tokens, self.cache, None if all(lengths) else lengths)
            if self.speculation:
                self.speculation.follow(tokens, hidden, lengths)
            self.cache.evaluate()
        if self.speculation:
            self.cache.detach()


def _finite(logits: mx.array) -> mx.array:
    """(..., V) -> (...) boolean: whether all logits are."""
    return (mx.abs(logits) < mx.inf).all(-1)


def _raise_not_finite(cache: Cache, row: int, model: Model) -> None:
    """A logit of a row is not finite: say where such a value was remembered first."""
    layer = cache.first_not_finite(row)
    if layer is None:
        origin = "the last layer or the head made them so, for no layer has read such a value"
    else:  # what a layer remembers is made from its input
        origin = f"layer {layer} is the first that has read such a value, or made one of what it read"
    raise InputError(
        "logits_not_finite",
        f"logits must be finite, and are not; {origin}. Activations left the range of {_name(model.dtype)}, or the "
        "checkpoint is damaged. Try --dtype bfloat16, then float32, or convert it again; the largest activation of "
        "each layer is shown by mlx_qwen35.doctor --model MODEL --probe",
    )


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
