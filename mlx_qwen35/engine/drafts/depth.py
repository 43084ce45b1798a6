"""The depth of drafting: how many tokens the draft head drafts in each round, as many as pay on this machine, or none.

A round at depth k feeds k + 1 tokens of each sequence in one pass and yields 1 + accepted tokens; depth 0 is plain
decoding. With p_j the probability that draft j is accepted if those before it are, the speed of depth k is expected to
be

    gain(k) = (1 + p_1 + p_1 p_2 + ... + p_1...p_k) x seconds(0) / seconds(k)

times that of plain decoding. The depth of the greatest gain is chosen if it is clearly better than the present one.
Seconds and probabilities are measured: in trials of every depth of unknown cost at the start, and later in probes of a
few rounds at another depth. Where drafting does not pay, the rejected rows of probes may cost no more than SHARE of
what the tokens so far cost in plain rounds. (A row is one token of one sequence in a pass.)
"""

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from statistics import median_low

SWITCH_GAIN = 1.05  # relative gain that is worth a change to drafting, or to another depth
DISABLE_GAIN = 1.02  # relative gain that is worth a change to plain decoding
STAY = 16  # rounds between two changes, unless a probe finds a better depth
PLAIN_ROUNDS, TRIAL_ROUNDS = 3, 2  # at the start, plain and at each depth; the first after a change is not timed
PROBE_ROUNDS = 4
MIN_INTERVAL, MAX_INTERVAL = 32, 256  # rounds between probes: doubled by one that fails, halved by one that does not
SHARE = 0.03  # of the tokens: the most rejected rows where drafting does not pay
COST_MARGIN = 1.5  # factor on the measured cost of rejected rows
SHARE_TOKENS = 512  # tokens of a sequence that SHARE is taken of while it has fewer
WINDOW = 9  # times kept for each depth
KNOWN = 3  # times that make the cost of a depth known
FRESH, OLD = 64, 1024  # rounds after which a time is measured again before it is used, or in any case
DECAY = 0.95  # of a count at each round that adds to it
PRIOR, PRIOR_WEIGHT = 0.7, 1  # p_1 before any draft, and how many drafts that counts for
PRIOR_RATIO = 0.9  # p_(j+1) / p_j before any draft j + 1
PROBE_WEIGHT = 2  # drafts that the older counts of a probability are worth when a probe begins
RETRY_EVERY = 10  # calls of never_pays, of which one returns False, in case earlier times were bad


class Costs:
    """Seconds of a round at each depth, in plain rounds, as measured on this machine for a model and a batch size.

    Generations share them.
    """

    def __init__(self) -> None:
        self.ratios: dict[int, deque[float]] = {}
        self.calls = 0

    def clear(self) -> None:
        """Forget every time."""
        self.ratios.clear()
        self.calls = 0

    def add(self, depth: int, ratio: float) -> None:
        self.ratios.setdefault(depth, deque(maxlen=WINDOW)).append(ratio)

    def samples(self, depth: int) -> int:
        """How often a depth was timed, at most WINDOW."""
        return len(self.ratios.get(depth, ()))

    def ratio(self, depth: int) -> float:
        """seconds(depth) / seconds(0): the median, or for a depth without times a line through its neighbours.

        Beyond the deepest the line begins at depth 0. Where nothing is known, rows cost in proportion.
        """
        if self.samples(depth):
            return median_low(self.ratios[depth])
        known = {0: 1.0} | {k: median_low(ratios) for k, ratios in list(self.ratios.items())}
        low, high = max(k for k in known if k < depth), min((k for k in known if k > depth), default=None)
        if high is None:
            return 1 + depth * ((known[low] - 1) / low if low else 1)
        return known[low] + (known[high] - known[low]) * (depth - low) / (high - low)

    def limit(self, most: int) -> float:
        """The gain of the best depth up to `most` if every draft were accepted."""
        return max((1 + depth) / self.ratio(depth) for depth in range(1, most + 1))

    def never_pays(self, most: int) -> bool:
        """Whether all depths to `most` are known and none could pay: then the draft head need not be loaded.

        Every RETRY_EVERY-th call retries, in case earlier times were bad: False, and one depth, in turn, is unknown
        again.
        """
        if any(self.samples(depth) < KNOWN for depth in range(1, most + 1)) or self.limit(most) >= SWITCH_GAIN:
            return False
        self.calls += 1
        if self.calls % RETRY_EVERY:
            return True
        retried = self.ratios[1 + self.calls // RETRY_EVERY % most]
        while len(retried) >= KNOWN:
            retried.popleft()
        return False


class DepthControl:
    """Chooses the depth of each round of one generation, for any number of sequences.

    most: 1 to 3, the deepest that memory and the user allow. fixed: always this depth.
    rounds, tokens: completed so far, tokens of all sequences. history: (rounds before it, depth) at each change of
    depth, probes included. switches: how often another depth was settled on.
    """

    def __init__(self, most: int, costs: Costs, fixed: int | None = None, before: "DepthControl | None" = None):
        """before: of the same sequences, or most of them, whose accepted drafts are told of."""
        assert 1 <= most <= 3 and (fixed is None or 0 <= fixed <= most), (most, fixed)
        self.most, self.costs, self.fixed = most, costs, fixed
        self.rounds = self.tokens = self.switches = 0
        self.history: list[tuple[int, int]] = []
        self.settled = fixed or 0
        self.decided = fixed is not None
        self.seconds = [deque[float](maxlen=WINDOW) for _ in range(most + 1)]
        self.timed = [0 if costs.samples(depth) else -OLD for depth in range(most + 1)]  # the round of the last time
        # Drafts j + 1 whose predecessors were accepted, and the accepted ones among them.
        self.tried, self.accepted = [0.0] * most, [0.0] * most
        if before:
            known = min(most, before.most)
            self.tried[:known], self.accepted[:known] = before.tried[:known], before.accepted[:known]
        self.rejected_rows = [0] * (most + 1)  # at each depth, in probes while settled on depth 0
        self.running = 1  # sequences in the last round
        self.interval, self.since, self.stayed = MIN_INTERVAL, 0, 0
        unknown = sorted((costs.samples(depth), depth) for depth in range(1, most + 1))
        trials = [depth for samples, depth in unknown if samples < KNOWN for _ in range(TRIAL_ROUNDS)]
        self.probes = deque([] if self.decided else [0] * PLAIN_ROUNDS + trials)  # the depths of the next rounds
        self.ahead: deque[bool] = deque()  # of each round from next() that record() has not seen: whether it is a probe

    def next(self) -> int:
        """The depth of the next round. May be called one round ahead of record()."""
        if self.fixed is not None:
            return self.fixed
        if self.decided and not self.probes and self.since >= self.interval:
            other = self._other()
            if self.settled or PROBE_ROUNDS * self.running * other * self._row_cost(other) <= self._allowance():
                self._probe(other)
        self.ahead.append(bool(self.probes))
        return self.probes.popleft() if self.probes else self.settled

    def record(
        self, depth: int, seconds: float, drafted: Sequence[int], accepted: Sequence[int], lasting: bool = True
    ) -> None:
        """Record a completed round, in order. drafted (at most depth), accepted: of each running sequence.

        lasting: whether later generations may use the time.
        """
        probe = bool(self.ahead) and self.ahead.popleft()
        changed = not self.history or self.history[-1][1] != depth
        if changed:
            self.history.append((self.rounds, depth))
        self.rounds += 1
        self._count(depth, drafted, accepted, probe and self.settled == 0)
        if drafted and not changed:
            self._time(depth, seconds, lasting)
        self.stayed += 1
        if self.fixed is None and probe:
            self._probed(depth)
        elif self.fixed is None:
            self.since += 1
            if self.settled and not self.probes and self.stayed >= STAY:
                self._decide()

    def reason(self) -> str:
        """Why this depth, in one line."""
        if self.fixed is not None:
            return f"fixed at depth {self.fixed}"
        if self.settled:
            return f"depth {self.settled} pays: {self.gain(self.settled):.2f} times plain decoding expected"
        if self.decided and self.seconds[0] and not self.probes:
            best = max(range(1, self.most + 1), key=self.gain)
            if self.gain(best) < SWITCH_GAIN:
                return f"disabled: drafting would give {self.gain(best):.2f} times plain decoding (best depth {best})"
        return "still measuring what drafting costs and gives"

    def gain(self, depth: int) -> float:
        """Expected speed at a depth, in that of plain decoding."""
        expected = 1 + sum(accumulate(self.probabilities()[:depth], mul))
        return expected * self._seconds(0) / self._seconds(depth)

    def probabilities(self) -> list[float]:
        """p_1, p_2, ...: accepted / tried of late, with a weak prior; that of p_(j+1) follows from p_j."""
        found, prior = [], PRIOR
        for tried, accepted in zip(self.tried, self.accepted, strict=True):
            found.append((PRIOR_WEIGHT * prior + accepted) / (PRIOR_WEIGHT + tried))
            prior = PRIOR_RATIO * found[-1]
        return found

    def _seconds(self, depth: int) -> float:
        """Median of the last times; while there are few, the cost from earlier generations counts as one more."""
        times = list(self.seconds[depth])
        if depth and len(times) < KNOWN and (self.costs.samples(depth) or not times):
            times.append(self.costs.ratio(depth) * self._seconds(0))
        return median_low(times)

    def _row_cost(self, depth: int) -> float:
        """The cost of a further row, in plain rows: 1 where rows cost in proportion, or it is not known."""
        if depth and self.costs.samples(depth) >= KNOWN:
            return min(1, COST_MARGIN * max(0, self.costs.ratio(depth) - 1) / depth)
        return 1

    def _allowance(self) -> float:
        """Plain rows that the rejected rows of probes from depth 0 may still cost."""
        spent = sum(rows * self._row_cost(depth) for depth, rows in enumerate(self.rejected_rows))
        return SHARE * max(SHARE_TOKENS * self.running, self.tokens) - spent

    def _count(self, depth: int, drafted: Sequence[int], accepted: Sequence[int], charged: bool) -> None:
        self.tokens += len(drafted) + sum(accepted)
        self.running = max(1, len(drafted))
        if charged:
            self.rejected_rows[depth] += len(drafted) * depth - sum(accepted)
        for j in range(max(drafted, default=0)):
            tried = [n > j for made, n in zip(drafted, accepted, strict=True) if made > j and n >= j]
            if tried:
                self.tried[j] = DECAY * self.tried[j] + len(tried)
                self.accepted[j] = DECAY * self.accepted[j] + sum(tried)

    def _time(self, depth: int, seconds: float, lasting: bool) -> None:
        """Add a time. Of old ones only the last two stay."""
        times = self.seconds[depth]
        while self.rounds - self.timed[depth] > FRESH and len(times) > 2:
            times.popleft()
        times.append(seconds)
        self.timed[depth] = self.rounds
        if depth and self.seconds[0] and lasting:
            self.costs.add(depth, seconds / self._seconds(0))

    def _probed(self, depth: int) -> None:
        """After a round of a probe: decide if it was the last one."""
        ruled_out = self.costs.samples(depth) and self.costs.limit(self.most) < SWITCH_GAIN
        if ruled_out and self.probes and depth != self.probes[0]:
            self.probes.clear()  # clear enough: later probes will come to the other depths
        if self.probes or any(self.ahead):
            return
        self.decided, self.since, before = True, 0, self.switches
        self._decide()
        failed = self.switches == before
        self.interval = min(MAX_INTERVAL, 2 * self.interval) if failed else max(MIN_INTERVAL, self.interval // 2)

    def _decide(self) -> None:
        """Settle on the best depth if it is clearly better, after a probe where its cost is old or not known."""
        if not self.seconds[0]:
            return
        best = max(range(self.most + 1), key=self.gain)
        if self.gain(best) < (SWITCH_GAIN if best else DISABLE_GAIN) * self.gain(self.settled):
            return
        if self.rounds - self.timed[best] > FRESH or (best and self.costs.samples(best) < KNOWN):
            self._probe(best)
            return
        self.settled, self.stayed = best, 0
        self.switches += 1

    def _other(self) -> int:
        """The depth to probe: the one timed longest ago; from depth 0 one not timed for OLD rounds, or depth 1."""
        others = [depth for depth in range(self.most + 1) if depth != self.settled]
        if self.settled:
            return min(others, key=lambda depth: self.timed[depth])
        return next((depth for depth in others if self.rounds - self.timed[depth] >= OLD), 1)

    def _probe(self, depth: int) -> None:
        """Plan a probe. Older counts of the probabilities that the settled depth does not measure lose weight."""
        for j in range(self.settled, self.most):
            weight = min(1, PROBE_WEIGHT / max(self.tried[j], 1e-9))
            self.tried[j], self.accepted[j] = weight * self.tried[j], weight * self.accepted[j]
        self.probes.extend([depth] * PROBE_ROUNDS)
        self.since = 0
