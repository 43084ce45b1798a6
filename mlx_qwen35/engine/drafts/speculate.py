"""Drafts for the decode loop: whether and how deep to draft, the drafted tokens, and the statistics."""

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
from mlx_qwen35.model.mtp import DraftHead
from mlx_qwen35.options import spelled

MODES = ("auto", "on", "off")
MOST_DEPTH = 3
ON_DEPTH = 2  # the model card's advice
MOST_SHOWN = 6  # changes of depth
PAUSE = 0.1  # share of a step that the caller took from which on its time says little of the machine
LEAST_TOKENS = 32  # of an answer for which auto drafts
MOST_PENDING = 256  # collected pairs of a row: 5 KB each for the 4B


@dataclass(frozen=True)
class DraftPolicy:
    """Whether to draft, and how deep."""

    depth: int  # the most tokens drafted in a step; 0: none
    fixed: bool = False  # always this depth
    reason: str = ""  # why none are drafted
    head_bytes: int = 0  # that the draft head will take, if it is not loaded


def choose_drafts(model: Model, mode: str, depth: int | None, rows: int, tokens: int) -> DraftPolicy:
    """The policy for `mode` and `depth` of the options, with `rows` answers of up to `tokens` tokens.

    Raises InputError if mode "on" is impossible.
    """
    if mode == "off":
        if depth is not None:
            raise InputError(
                "option_no_effect",
                f"{spelled('mtp_depth')} must not be given with {spelled('mtp', 'off')}: it would have no effect",
            )
        return DraftPolicy(0, reason="off")
    mtp_head = model.mtp
    if mtp_head is None or mtp_head.fault:
        reason = (mtp_head and mtp_head.fault) or "the checkpoint has no draft head (tensors mtp.*)"
        if mode == "on" or depth is not None:
            raise InputError(
                "draft_head_unusable" if mtp_head else "draft_head_missing",
                f"{spelled('mtp')} must be off or auto for this model, and {spelled('mtp_depth')} not be given: "
                f"{reason}. Many converted folders lack a draft head; mlx_qwen35.convert keeps it",
            )
        return DraftPolicy(0, reason=reason)
    if mode == "on":
        return _always(model, mtp_head, depth or ON_DEPTH, rows)
    depth = depth or MOST_DEPTH
    if tokens < LEAST_TOKENS:
        return DraftPolicy(0, reason=f"not for answers of fewer than {LEAST_TOKENS} tokens")
    if measured_costs(mtp_head, rows).never_pays(depth):
        return DraftPolicy(0, reason="disabled: on this machine drafts would not pay even if all were accepted")
    return _fitting(model, mtp_head, depth, rows)


def _always(model: Model, mtp_head: DraftHead, depth: int, rows: int) -> DraftPolicy:
    policy = _fitting(model, mtp_head, depth, rows)
    if policy.depth < depth:
        room = f"only for {policy.depth}: lower {spelled('mtp_depth')}, or" if policy.depth else "not even for one:"
        raise InputError(
            "memory_exceeded",
            f"memory has no room for drafts of {depth} tokens at a time, {room} choose {spelled('mtp', 'auto')} or "
            f"off, or raise {spelled('memory_limit')}",
        )
    return replace(policy, fixed=True)


def _fitting(model: Model, mtp_head: DraftHead, depth: int, rows: int) -> DraftPolicy:
    head_bytes = 0 if mtp_head.loaded else mtp_head.nbytes
    fitting = most_depth(model.config, model.dtype, model.memory_limit, head_bytes, rows, depth)
    if not fitting:
        return DraftPolicy(0, reason="memory has no room for the draft head")
    return DraftPolicy(fitting, head_bytes=head_bytes)


def attach(model: Model, cache: Cache, policy: DraftPolicy) -> DraftPolicy:
    """Load the draft head and make it follow the cache, or unload it, and return the policy that holds from now on.

    A damaged head costs a warning, since the text needs none. With a fixed depth it raises InputError.
    """
    if policy.depth:
        assert model.mtp is not None
        try:
            model.mtp.weights  # noqa: B018 (loads it)
        except InputError as error:
            model.mtp.fault = f"its draft head cannot be used: {error}"
            if policy.fixed:
                raise InputError(
                    "draft_head_unusable", f"{error}; without the draft head the model works: choose mtp 'off'"
                ) from error
            warnings.warn(f"no tokens are drafted, for {model.mtp.fault}", RuntimeWarning, stacklevel=2)
            policy = DraftPolicy(0, reason=model.mtp.fault)
    follower = cache.follower
    if not policy.depth:
        cache.follower = None
        if model.mtp:
            model.mtp.release()
    elif not (isinstance(follower, DraftFollower) and list(follower.followed) == cache.row_lengths):
        cache.follower = DraftFollower(model, cache.row_lengths)
    return policy


@dataclass(frozen=True)
class DraftStatistics:
    """The drafts of one row of a generation.

    reason: why tokens were drafted so, or none. drafted, accepted: tokens; the last accepted ones may lie behind the
    end. steps: passes of the model, each of which gave one token besides. depths: (steps before it, tokens drafted in a
    step) at each change of depth.
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
    """The draft head beside the decode loop: drafts tokens, follows the model, and counts."""

    def __init__(self, model: Model, cache: Cache, policy: DraftPolicy):
        assert isinstance(cache.follower, DraftFollower) and model.mtp is not None
        costs = measured_costs(model.mtp, cache.batch)
        self.model, self.follower = model, cache.follower
        self.depths = DepthControl(policy.depth, costs, policy.depth if policy.fixed else None)
        self.drafted, self.accepted, self.steps = ([0] * cache.batch for _ in range(3))
        self._last = 0.0  # time at which the last step was recorded

    def depth(self) -> int:
        """How many tokens to draft in the next step. May be called before the present one is recorded."""
        return self.depths.next()

    def propose(self, tokens: mx.array, counts: Sequence[int], depth: int, sampler: Sampler) -> mx.array:
        """Tokens (B, 1) -> those and `depth` drafted ones, (B, 1 + depth), sampled with their positions' noise."""

        def sample(logits: mx.array, drafted: list[mx.array]) -> mx.array:
            return sampler.peek(logits, mx.concatenate(drafted, axis=1) if drafted else None)

        drafted = self.follower.propose(self.model, tokens, counts, depth, sample)
        mx.async_eval(drafted)  # a GPU starts while the graph of the pass that checks them is built
        return mx.concatenate([tokens, drafted], axis=1)

    def follow(self, tokens: mx.array, hidden: mx.array, counts: Sequence[int]) -> None:
        """Tell the draft head of a pass: in row i the first counts[i] of tokens (B, n), and their hidden states."""
        self.follower.follow(tokens, hidden, counts)
        if sum(pairs.tokens.shape[1] for pairs in self.follower.pending) >= MOST_PENDING:
            self.follower.flush(self.model)
            mx.async_eval(self.follower.arrays())

    def record(self, lengths: Sequence[int], tokens: Sequence[Sequence[int]], paused: float) -> None:
        """Count a step: row i was fed lengths[i] tokens and yields tokens[i].

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
