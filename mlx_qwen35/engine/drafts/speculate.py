"""Drafts for the decode loop: how many, of what, and what became of them."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_qwen35.budget.plan import most_depth
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.engine.drafts.depth import DepthControl, measured_costs
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import spelled

MODES = ("auto", "on", "off")
MOST_DEPTH = 3
ON_DEPTH = 2  # the model card's advice
MOST_SHOWN = 6  # changes of depth
PAUSE = 0.1  # of a step, from which on its time says more of the caller than of the machine
MOST_UNREAD = 256  # pairs of a row that wait for the draft head: 5 KB each for the 4B
LEAST_TOKENS = 32  # of an answer for which auto thinks of drafts


@dataclass(frozen=True)
class DraftPolicy:
    """Whether to draft, and how many tokens at most; 0: none, and why."""

    depth: int
    fixed: bool = False
    reason: str = ""
    head_bytes: int = 0  # what the draft head will take, where it is not read yet


def choose_drafts(model: Model, mode: str, depth: int | None, rows: int, tokens: int) -> DraftPolicy:
    """What `mode` and `depth` of the options mean for so many answers of up to so many tokens.

    Raises InputError when mode "on" cannot be had.
    """
    if mode == "off":
        if depth is not None:
            raise InputError(
                "option_no_effect",
                f"{spelled('mtp_depth')} must not be given with {spelled('mtp', 'off')}: it would have no effect",
            )
        return DraftPolicy(0, reason="off")
    if model.mtp is None or model.mtp.fault:
        why = "the checkpoint has no draft head (tensors mtp.*)" if model.mtp is None else model.mtp.fault
        if mode == "on" or depth is not None:
            raise InputError(
                "draft_head_unusable" if model.mtp else "draft_head_missing",
                f"{spelled('mtp')} must be off or auto for this model, and {spelled('mtp_depth')} not be given: {why}. "
                "Many converted folders lack a draft head; mlx_qwen35.convert keeps it",
            )
        return DraftPolicy(0, reason=why)
    if mode == "on":
        return _always(model, depth or ON_DEPTH, rows)
    return _where_it_pays(model, depth or MOST_DEPTH, rows, tokens)


def _always(model: Model, depth: int, rows: int) -> DraftPolicy:
    choice = _fitting(model, depth, rows)
    if choice.depth < depth:
        room = f"only for {choice.depth}: lower {spelled('mtp_depth')}, or" if choice.depth else "not even for one:"
        raise InputError(
            "memory_exceeded",
            f"memory has no room for drafts of {depth} tokens at a time, {room} choose {spelled('mtp', 'auto')} or "
            f"off, or raise {spelled('memory_limit')}",
        )
    return replace(choice, fixed=True)


def _where_it_pays(model: Model, depth: int, rows: int, tokens: int) -> DraftPolicy:
    if tokens < LEAST_TOKENS:
        return DraftPolicy(0, reason=f"not for answers of fewer than {LEAST_TOKENS} tokens")
    if measured_costs(model.mtp, rows).never_pays(depth):
        return DraftPolicy(0, reason="disabled: on this machine drafts would not pay even if every one were right")
    return _fitting(model, depth, rows)


def _fitting(model: Model, depth: int, rows: int) -> DraftPolicy:
    head = 0 if model.mtp.loaded else model.mtp.nbytes
    fitting = most_depth(model.config, model.dtype, head, rows, depth)
    if not fitting:
        return DraftPolicy(0, reason="memory has no room for the draft head")
    return DraftPolicy(fitting, head_bytes=head)


def attach(model: Model, cache: Cache, choice: DraftPolicy) -> DraftPolicy:
    """Have the draft head follow this cache from now on, or not, and return what came of it.

    The head is read if it is not there yet, and given back where it is not wanted. One that is damaged is told of; the
    text needs none, so only a choice that says "always" raises its InputError.
    """
    follower = cache.follower
    if choice.depth and not (isinstance(follower, DraftFollower) and list(follower.followed) == cache.row_lengths):
        cache.follower = DraftFollower(model, cache.row_lengths)
    try:
        if choice.depth:
            model.mtp.weights  # noqa: B018
    except InputError as error:
        model.mtp.fault = f"its draft head cannot be used: {error}"
        if choice.fixed:
            raise InputError(
                "draft_head_unusable", f"{error}; without the draft head the model works: choose mtp 'off'"
            ) from error
        warnings.warn(f"no tokens are drafted, for {model.mtp.fault}", RuntimeWarning, stacklevel=2)
        choice = DraftPolicy(0, reason=model.mtp.fault)
    if not choice.depth:
        cache.follower = None
        if model.mtp:
            model.mtp.release()
    return choice


@dataclass(frozen=True)
class DraftStatistics:
    """What drafts did for a generation.

    drafted and accepted count tokens of one row, steps the passes of the model that gave it tokens: 1 each, and those
    accepted, of which the last may lie behind its end. depths: tokens drafted a step, as pairs: after how many steps
    that changed, and to what.
    """

    reason: str
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    depths: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        if not self.drafted:
            return f"none; {self.reason}"
        share = f"{self.accepted} of {self.drafted} tokens accepted ({100 * self.accepted / self.drafted:.0f} %)"
        rate = f"{self.steps} steps of {1 + self.accepted / self.steps:.2f} tokens"
        shown = [f"{depth} from step {step}" for step, depth in self.depths[-MOST_SHOWN:]]
        shown = ["...", *shown] if len(self.depths) > MOST_SHOWN else shown
        return f"{share}, {rate}; depth {', '.join(shown)}; {self.reason}"


class Speculation:
    """The draft head beside the loop: proposes tokens, follows what the model reads, and keeps the account."""

    def __init__(self, model: Model, cache: Cache, choice: DraftPolicy):
        assert isinstance(cache.follower, DraftFollower)
        batch = cache.batch
        costs = measured_costs(model.mtp, batch)
        self.model, self.follower = model, cache.follower
        self.depths = DepthControl(choice.depth, costs, choice.depth if choice.fixed else None)
        self.drafted, self.accepted = [0] * batch, [0] * batch
        self.steps = [0] * batch
        self._last: float | None = None  # when the last step was looked at

    def depth(self) -> int:
        """How many tokens to draft for the next step; may be asked before the one under way is recorded."""
        return self.depths.next()

    def propose(self, tokens: mx.array, counts: Sequence[int], depth: int, sampler: Sampler) -> mx.array:
        """Tokens (B, 1) -> those and `depth` guesses, (B, 1 + depth), drawn like the tokens with the same noise."""

        def sample(logits: mx.array, drafted: list[mx.array]) -> mx.array:
            return sampler.peek(logits, mx.concatenate(drafted, axis=1) if drafted else None)

        guesses = self.follower.propose(self.model, tokens, counts, depth, sample)
        mx.async_eval(guesses)  # a GPU begins while the pass that checks them is put together
        return mx.concatenate([tokens, guesses], axis=1)

    def follow(self, tokens: mx.array, hidden: mx.array, counts: Sequence[int]) -> None:
        """Tell the head what the model has read: of row i the first counts[i] of tokens (B, n), and what they gave."""
        self.follower.follow(tokens, hidden, counts)
        if sum(pairs.tokens.shape[1] for pairs in self.follower.unread) >= MOST_UNREAD:
            self.follower.flush(self.model)
            mx.async_eval(self.follower.arrays())

    def record(self, lengths: Sequence[int], tokens: Sequence[Sequence[int]], paused: float) -> None:
        """A step is known: of row i lengths[i] tokens were read, and so the tokens[i] found.

        paused: seconds of it that the caller took over the tokens of the step before.
        """
        now = time.perf_counter()
        if any(lengths):
            rows = [row for row, found in enumerate(tokens) if found]
            drafted, accepted = [lengths[row] - 1 for row in rows], [len(tokens[row]) - 1 for row in rows]
            for row, n, m in zip(rows, drafted, accepted, strict=True):
                self.drafted[row] += n
                self.accepted[row] += m
                self.steps[row] += 1
            seconds = now - self._last
            self.depths.record(max(lengths) - 1, seconds, drafted, accepted, lasting=paused < PAUSE * seconds)
        self._last = now

    def statistics(self, row: int) -> DraftStatistics:
        counts = self.drafted[row], self.accepted[row], self.steps[row]
        return DraftStatistics(self.depths.reason(), *counts, tuple(self.depths.history))
