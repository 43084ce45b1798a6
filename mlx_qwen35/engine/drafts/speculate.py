"""Drafts for the running rows: whether and how deep to draft, the drafted tokens, and the statistics."""

import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import mlx.core as mx

from mlx_qwen35.budget.plan import most_depth
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.engine.drafts.depth import Costs, DepthControl
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.sampling import Sampler, peek
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.lazy import LazyPart
from mlx_qwen35.model.model import Model
from mlx_qwen35.model.mtp import MultiTokenPrediction
from mlx_qwen35.options import spelled

MODES = ("auto", "on", "off")
MOST_DEPTH = 3
ON_DEPTH = 2  # the model card's advice
MOST_SHOWN = 6  # changes of depth
PAUSE = 0.1  # share of a step that the caller took from which on its time says little of the machine
LEAST_TOKENS = 32  # of an answer for which auto drafts
MOST_PENDING = 256  # collected pairs of a row: 5 KB each for the 4B


@dataclass
class HeadRecord:
    """What this process has found out about a loaded model's draft head. Generations share it."""

    costs: dict[int, Costs] = field(default_factory=lambda: defaultdict(Costs))  # of passes, by their rows
    fault: str | None = None  # why it cannot be used


_RECORDS: WeakKeyDictionary[LazyPart[MultiTokenPrediction], HeadRecord] = WeakKeyDictionary()


def head_record(mtp_head: LazyPart[MultiTokenPrediction]) -> HeadRecord:
    return _RECORDS.setdefault(mtp_head, HeadRecord(fault=mtp_head.fault))


@dataclass(frozen=True)
class DraftPolicy:
    """Whether to draft, and how deep."""

    depth: int  # the most tokens drafted in a step; 0: none
    fixed: bool = False  # always this depth
    reason: str = ""  # why none are drafted
    head_bytes: int = 0  # that the draft head will take, if it is not loaded
    short: bool = False  # whether memory has no room for more


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
    fault = head_record(mtp_head).fault if mtp_head else None
    if mtp_head is None or fault:
        reason = fault or "the checkpoint has no draft head (tensors mtp.*)"
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
    if head_record(mtp_head).costs[rows].never_pays(depth):
        return DraftPolicy(0, reason="disabled: on this machine drafts would not pay even if all were accepted")
    return _fitting(model, mtp_head, depth, rows)


def _always(model: Model, mtp_head: LazyPart[MultiTokenPrediction], depth: int, rows: int) -> DraftPolicy:
    policy = _fitting(model, mtp_head, depth, rows)
    if policy.depth < depth:
        room = f"only for {policy.depth}: lower {spelled('mtp_depth')}, or" if policy.depth else "not even for one:"
        raise InputError(
            "memory_exceeded",
            f"memory has no room for drafts of {depth} tokens at a time, {room} choose {spelled('mtp', 'auto')} or "
            f"off, or raise {spelled('memory_limit')}",
        )
    return replace(policy, fixed=True)


def _fitting(model: Model, mtp_head: LazyPart[MultiTokenPrediction], depth: int, rows: int) -> DraftPolicy:
    head_bytes = 0 if mtp_head.loaded else mtp_head.nbytes
    fitting = most_depth(model.held, model.dtype, model.memory_limit, head_bytes, rows, depth)
    if not fitting:
        return DraftPolicy(0, reason="memory has no room for the draft head", short=True)
    return DraftPolicy(fitting, head_bytes=head_bytes, short=fitting < depth)


def attach(model: Model, cache: Cache, policy: DraftPolicy, user: object) -> DraftPolicy:
    """Load the draft head and make it follow the cache, or unload it, and return the policy that holds from now on.

    A damaged head costs a warning, since the text needs none. With a fixed depth it raises InputError. A policy with
    drafts has acquired the head for `user`: `detach` releases it.
    """
    if policy.depth:
        assert model.mtp is not None
        try:
            model.mtp.part  # noqa: B018 (loads it)
        except InputError as error:
            fault = head_record(model.mtp).fault = f"its draft head cannot be used: {error}"
            if policy.fixed:
                raise InputError(
                    "draft_head_unusable",
                    f"{error}; without the draft head the model works: choose {spelled('mtp', 'off')}",
                ) from error
            warnings.warn(f"no tokens are drafted, for {fault}", RuntimeWarning, stacklevel=2)
            policy = DraftPolicy(0, reason=fault)
    follower = cache.follower
    if not policy.depth:
        cache.follower = None
        if model.mtp:
            model.mtp.unload()
        return policy
    if not (isinstance(follower, DraftFollower) and list(follower.followed) == cache.row_lengths):
        cache.follower = DraftFollower(model, cache.row_lengths, cache.adapters)
    assert model.mtp is not None
    model.mtp.acquire(user)
    return policy


def detach(model: Model, user: object) -> None:
    """This user needs the draft head no more."""
    if model.mtp:
        model.mtp.release(user)


@dataclass(frozen=True)
class DraftStatistics:
    """The drafts of one sequence.

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


@dataclass
class RowDrafts:
    """The drafts of one sequence: its policy, and what came of them."""

    policy: DraftPolicy
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    depths: list[tuple[int, int]] = field(default_factory=list)
    control: DepthControl | None = None  # of the passes that it is in, or was in last

    def count(self, depth: int, drafted: int, accepted: int) -> None:
        """A pass with so many drafts, in which this sequence had `drafted`."""
        if not self.depths or self.depths[-1][1] != depth:
            self.depths.append((self.steps, depth))
        self.steps, self.drafted, self.accepted = self.steps + 1, self.drafted + drafted, self.accepted + accepted

    def statistics(self) -> DraftStatistics:
        if self.control is None:
            return DraftStatistics(self.policy.reason or "nothing was decoded")
        return DraftStatistics(self.control.reason(), self.drafted, self.accepted, self.steps, tuple(self.depths))


class Speculation:
    """The draft head beside the running rows: drafts tokens, follows the model, and counts.

    Some rows may have no drafts. One depth holds for all that have; each keeps to its own most.
    """

    def __init__(self, model: Model):
        self.model = model
        self.rows: list[RowDrafts] = []
        self.follower: DraftFollower | None = None  # of the drafting rows
        self.control: DepthControl | None = None
        self._last = 0.0  # time at which the last pass was recorded, or the first begun

    def copy(self) -> "Speculation":
        """The same rows with a draft head's cache that goes on apart."""
        copied = copy(self)
        copied.follower = self.follower.copy() if self.follower else None
        return copied

    def arrays(self) -> list[mx.array]:
        return self.follower.arrays() if self.follower else []

    # --- rows ---

    @property
    def _drafting(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.policy.depth]

    def join(self, rows: Sequence[RowDrafts], followers: Sequence[DraftFollower]) -> None:
        """More rows, and the followers of those of them that draft, in order."""
        if followers:
            have = [self.follower] if self.follower else []
            self.follower = DraftFollower.joined(self.model, [*have, *followers])
        self.rows = [*self.rows, *rows]
        self._restart()

    def select(self, rows: Sequence[int]) -> "Speculation":
        """These rows alone."""
        drafting, selected = self._drafting, self.copy()
        stay = [drafting.index(row) for row in rows if row in drafting]
        if self.follower and len(stay) < len(drafting):
            selected.follower = self.follower.select(stay) if stay else None
        selected.rows = [self.rows[row] for row in rows]
        selected._restart()
        return selected

    def follower_of(self, row: int) -> DraftFollower | None:
        drafting = self._drafting
        if self.follower is None or row not in drafting:
            return None
        return self.follower if len(drafting) == 1 else self.follower.select([drafting.index(row)])

    def _restart(self) -> None:
        """Passes cost something else with other rows."""
        self._last = time.perf_counter()
        policies = [row.policy for row in self.rows if row.policy.depth]
        if not policies:
            self.control = None
            return
        assert self.model.mtp is not None
        fixed = max((policy.depth for policy in policies if policy.fixed), default=None)
        costs = head_record(self.model.mtp).costs[len(self.rows)]
        self.control = DepthControl(max(policy.depth for policy in policies), costs, fixed, self.control)

    # --- passes ---

    def depth(self) -> int:
        """How many tokens to draft in the next pass. May be called before the present one is recorded."""
        return self.control.next() if self.control else 0

    def most(self, row: int, depth: int) -> int:
        """How many of them in this row."""
        return min(depth, self.rows[row].policy.depth)

    def propose(self, tokens: mx.array, counts: Sequence[int], depth: int, samplers: Sequence[Sampler]) -> mx.array:
        """Tokens (B, 1) -> those and `depth` drafted ones, (B, 1 + depth), sampled with their positions' noise.

        counts: 1 for each row that has drafts now, else 0.
        """
        assert self.follower is not None
        own = self._drafting
        sampling = [samplers[row] for row in own]

        def sample(logits: mx.array, drafted: list[mx.array]) -> mx.array:
            return peek(sampling, logits, mx.concatenate(drafted, axis=1) if drafted else None, drafting=True)

        drafted = self.follower.propose(self.model, self._own(tokens), [counts[row] for row in own], depth, sample)
        mx.async_eval(drafted)  # a GPU starts while the graph of the pass that checks them is built
        if len(own) < len(self.rows):
            every = mx.zeros((len(self.rows), depth), drafted.dtype)
            every[mx.array(own)] = drafted
            drafted = every
        return mx.concatenate([tokens, drafted], axis=1)

    def follow(self, tokens: mx.array, hidden: mx.array, counts: Sequence[int]) -> None:
        """Tell the draft head of a pass: in row i the first counts[i] of tokens (B, n), and their hidden states."""
        if self.follower is None:
            return
        self.follower.follow(self._own(tokens), self._own(hidden), [counts[row] for row in self._drafting])
        if sum(pairs.tokens.shape[1] for pairs in self.follower.pending) >= MOST_PENDING:
            self.follower.flush(self.model)
            mx.async_eval(self.follower.arrays())

    def _own(self, array: mx.array) -> mx.array:
        """The drafting rows of an array (B, ...)."""
        own = self._drafting
        return array if len(own) == len(self.rows) else array[mx.array(own)]

    def record(self, lengths: Sequence[int], tokens: Sequence[Sequence[int]], paused: float) -> None:
        """Count a pass: row i was fed lengths[i] tokens and yields tokens[i].

        paused: seconds of it that the caller took over the tokens of the pass before.
        """
        now, seconds = time.perf_counter(), time.perf_counter() - self._last
        self._last = now
        if self.control is None:
            return
        depth = max(lengths) - 1
        rows = [row for row in self._drafting if tokens[row]]
        drafted, accepted = [lengths[row] - 1 for row in rows], [len(tokens[row]) - 1 for row in rows]
        self.control.record(depth, seconds, drafted, accepted, lasting=paused < PAUSE * seconds)
        for row, n, m in zip(rows, drafted, accepted, strict=True):
            self.rows[row].control = self.control
            self.rows[row].count(depth, n, m)
