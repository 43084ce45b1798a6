"""How many tokens the draft head drafts before each round of decoding: as many as pay on this machine, or none.

A round at depth k reads k + 1 rows of each sequence in one pass and keeps 1 + accepted tokens; depth 0 is plain
decoding. With p_j the probability that draft j is accepted once those before it were, depth k is expected to be

    gain(k) = (1 + p_1 + p_1 p_2 + ... + p_1...p_k) x seconds(0) / seconds(k)

times as fast as plain decoding. The depth of the greatest gain is taken, where that is clearly greater than what the
present one gives. Seconds and probabilities are measured: at the start every depth whose cost is not known is tried,
and later there are looks, of a few rounds each, at other depths. Where drafting does not pay, the rows of looks that
come to nothing may cost no more than SHARE of the tokens generated so far would cost in plain rounds.
"""

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from statistics import median_low
from weakref import WeakKeyDictionary

from mlx_qwen35.model.mtp import DraftHead

CLEAR = 1.05  # a gain that is worth a change to drafting, or to another depth of it
PARK = 1.02  # and one that is worth a change to plain decoding
STAY = 16  # rounds that a depth is kept before another is taken, unless a look says so
PLAIN = 3  # plain rounds before anything is tried
TRY = 2  # rounds at each depth at the start; the first one after a change of depth is not timed
LOOK = 4  # rounds of a look
FIRST, CAP = 32, 256  # rounds between two looks: doubled by each that changes nothing, halved by one that does
SHARE = 0.03  # of the tokens: the most rows in vain where drafting does not pay
DEAR = 1.5  # by which the price of rows in vain is raised, as it may have been taken for too low
SOON = 512  # tokens of a sequence that the share is of while there are fewer
WINDOW = 9  # timed rounds of a depth that are remembered
FRESH = 64  # rounds after which a time is looked at again before it is believed
OLD = 1024  # rounds after which a time is looked at again for its own sake
DECAY = 0.95  # of a count at each round that adds to it
PRIOR, WEIGHT = 0.7, 1  # p_1 before any draft, and as how many drafts that counts
FALL = 0.9  # p_(j+1) / p_j before any draft j + 1
BRIEF = 2  # drafts as which all that is known of a probability counts when a look begins
ENOUGH = 3  # times of a depth that make its cost known
RETRY_EVERY = 10  # of that many questions whether it is hopeless, one is answered no


class Costs:
    """Times of a round at each depth, in plain rounds, as measured on this machine: what one generation leaves to the
    next. One for each model and batch size.
    """

    def __init__(self) -> None:
        self.ratios: dict[int, deque[float]] = {}
        self.asked = 0

    def clear(self) -> None:
        """Forget every time."""
        self.ratios.clear()
        self.asked = 0

    def add(self, depth: int, ratio: float) -> None:
        self.ratios.setdefault(depth, deque(maxlen=WINDOW)).append(ratio)

    def samples(self, depth: int) -> int:
        """How often a depth was timed, at most WINDOW."""
        return len(self.ratios.get(depth, ()))

    def ratio(self, depth: int) -> float:
        """seconds(depth) / seconds(0): the median, or for a depth without any a line through its neighbours.

        Past the deepest one the line comes from depth 0; where nothing is known, rows cost in proportion.
        """
        if self.samples(depth):
            return median_low(self.ratios[depth])
        known = {0: 1.0} | {k: median_low(ratios) for k, ratios in list(self.ratios.items())}
        low, high = max(k for k in known if k < depth), min((k for k in known if k > depth), default=None)
        if high is None:
            return 1 + depth * ((known[low] - 1) / low if low else 1)
        return known[low] + (known[high] - known[low]) * (depth - low) / (high - low)

    def limit(self, most: int) -> float:
        """The greatest gain there could be: if every draft were accepted."""
        return max((1 + depth) / self.ratio(depth) for depth in range(1, most + 1))

    def never_pays(self, most: int) -> bool:
        """Whether all depths to `most` are known and none could pay: then the head need not be loaded.

        A time may have been a bad one: every RETRY_EVERY-th yes becomes a no, and one depth, in turn, is tried again.
        """
        if any(self.samples(depth) < ENOUGH for depth in range(1, most + 1)) or self.limit(most) >= CLEAR:
            return False
        self.asked += 1
        if self.asked % RETRY_EVERY:
            return True
        again = self.ratios[1 + self.asked // RETRY_EVERY % most]
        while len(again) >= ENOUGH:
            again.popleft()
        return False


_MEASURED: WeakKeyDictionary[DraftHead, dict[int, Costs]] = WeakKeyDictionary()  # of each loaded draft head


def measured_costs(head: DraftHead, rows: int) -> Costs:
    """What decoding `rows` sequences with this head was measured to cost so far; shared by all generations with it."""
    return _MEASURED.setdefault(head, {}).setdefault(rows, Costs())


class DepthControl:
    """The depth of each round of one generation, of any number of sequences.

    most: 1 to 3, what memory and the user allow. fixed: always this depth.
    rounds, drafted, accepted, tokens, rows: totals over all sequences, rows as read by the model, depth + 1 a round.
    history: (rounds completed before it, depth) at each change of depth, looks included. switches: how often another
    depth was settled on.
    """

    def __init__(self, most: int, costs: Costs, fixed: int | None = None):
        assert 1 <= most <= 3 and (fixed is None or 0 <= fixed <= most), (most, fixed)
        self.most, self.costs, self.fixed = most, costs, fixed
        self.rounds = self.drafted = self.accepted = self.tokens = self.rows = self.switches = 0
        self.history: list[tuple[int, int]] = []
        self.settled = fixed or 0
        self.decided = fixed is not None
        self.seconds = [deque[float](maxlen=WINDOW) for _ in range(most + 1)]
        self.timed = [0 if costs.samples(depth) else -OLD for depth in range(most + 1)]  # rounds when it last was
        self.tried, self.right = [0.0] * most, [0.0] * most  # drafts j + 1 that those before allowed, and accepted ones
        self.vain = [0] * (most + 1)  # rows in vain of looks from depth 0, at each depth
        self.running = 1  # sequences in the last round
        self.interval, self.since, self.stayed = FIRST, 0, 0
        unknown = sorted((costs.samples(depth), depth) for depth in range(1, most + 1))
        tries = [depth for samples, depth in unknown if samples < ENOUGH for _ in range(TRY)]
        self.plan = deque([] if self.decided else [0] * PLAIN + tries)  # depths of the looks to come
        self.ahead: deque[bool] = deque()  # of each round that next() gave and record() has not seen: is it a look

    def next(self) -> int:
        """The depth of the next round. May be called one round ahead of record()."""
        if self.fixed is not None:
            return self.fixed
        if self.decided and not self.plan and self.since >= self.interval:
            other = self._other()
            if self.settled or LOOK * self.running * other * self._price(other) <= self._room():
                self._look(other)
        self.ahead.append(bool(self.plan))
        return self.plan.popleft() if self.plan else self.settled

    def record(
        self, depth: int, seconds: float, drafted: Sequence[int], accepted: Sequence[int], lasting: bool = True
    ) -> None:
        """One completed round, in order. drafted (at most depth), accepted: of each sequence that runs.

        lasting: the time tells of the machine, so that later generations may go by it.
        """
        look = bool(self.ahead) and self.ahead.popleft()
        changed = not self.history or self.history[-1][1] != depth
        if changed:
            self.history.append((self.rounds, depth))
        self.rounds += 1
        self._count(depth, drafted, accepted, look and self.settled == 0)
        if drafted and not changed:
            self._time(depth, seconds, lasting)
        self.stayed += 1
        if self.fixed is None and look:
            self._looked(depth)
        elif self.fixed is None:
            self.since += 1
            if self.settled and not self.plan and self.stayed >= STAY:
                self._decide()

    def reason(self) -> str:
        """One line for users."""
        if self.fixed is not None:
            return f"fixed at depth {self.fixed}"
        if not self.decided or not self.seconds[0]:
            return "still measuring what drafting costs and gives"
        if self.settled:
            return f"depth {self.settled} pays: {self.gain(self.settled):.2f} times plain decoding expected"
        best = max(range(1, self.most + 1), key=self.gain)
        if self.plan or self.gain(best) >= CLEAR:
            return "still measuring what drafting costs and gives"
        return f"disabled: drafting would give {self.gain(best):.2f} times plain decoding (best depth {best})"

    def gain(self, depth: int) -> float:
        """Expected speed at a depth, in that of plain decoding."""
        expected = 1 + sum(accumulate(self.probabilities()[:depth], mul))
        return expected * self._seconds(0) / self._seconds(depth)

    def probabilities(self) -> list[float]:
        """p_1, p_2, ...: accepted / tried of late, with a weak prior, which for p_(j+1) follows from p_j."""
        found, prior = [], PRIOR
        for tried, right in zip(self.tried, self.right, strict=True):
            found.append((WEIGHT * prior + right) / (WEIGHT + tried))
            prior = FALL * found[-1]
        return found

    def _seconds(self, depth: int) -> float:
        """Median of the last times, with what former generations found as one more while there are few."""
        times = list(self.seconds[depth])
        if depth and len(times) < ENOUGH and (self.costs.samples(depth) or not times):
            times.append(self.costs.ratio(depth) * self._seconds(0))
        return median_low(times)

    def _price(self, depth: int) -> float:
        """What a further row costs, in plain rows: 1 where rows cost in proportion, and as long as it is not known."""
        if depth and self.costs.samples(depth) >= ENOUGH:
            return min(1, DEAR * max(0, self.costs.ratio(depth) - 1) / depth)
        return 1

    def _room(self) -> float:
        """Plain rows' worth of rows in vain that looks from depth 0 may still cost."""
        spent = sum(rows * self._price(depth) for depth, rows in enumerate(self.vain))
        return SHARE * max(SOON * self.running, self.tokens) - spent

    def _count(self, depth: int, drafted: Sequence[int], accepted: Sequence[int], charged: bool) -> None:
        self.drafted += sum(drafted)
        self.accepted += sum(accepted)
        self.tokens += len(drafted) + sum(accepted)
        self.rows += len(drafted) * (depth + 1)
        self.running = max(1, len(drafted))
        if charged:
            self.vain[depth] += len(drafted) * depth - sum(accepted)
        for j in range(max(drafted, default=0)):
            asked = [kept > j for made, kept in zip(drafted, accepted, strict=True) if made > j and kept >= j]
            if asked:
                self.tried[j] = DECAY * self.tried[j] + len(asked)
                self.right[j] = DECAY * self.right[j] + sum(asked)

    def _time(self, depth: int, seconds: float, lasting: bool) -> None:
        """Remember a time; of old ones only the last two stay beside it."""
        times = self.seconds[depth]
        while self.rounds - self.timed[depth] > FRESH and len(times) > 2:
            times.popleft()
        times.append(seconds)
        self.timed[depth] = self.rounds
        if depth and self.seconds[0] and lasting:
            self.costs.add(depth, seconds / self._seconds(0))

    def _looked(self, depth: int) -> None:
        """After a round of a look: decide when it was the last one."""
        if self.plan and depth != self.plan[0] and self.costs.samples(depth) and self.costs.limit(self.most) < CLEAR:
            self.plan.clear()  # what was tried is clear enough: later looks will come to the others
        if self.plan or any(self.ahead):
            return
        self.decided, self.since, before = True, 0, self.switches
        self._decide()
        failed = self.switches == before
        self.interval = min(CAP, 2 * self.interval) if failed else max(FIRST, self.interval // 2)

    def _decide(self) -> None:
        """Settle on the best depth if it is clearly better, after a look where its cost is an old one or a guess."""
        if not self.seconds[0]:
            return
        best = max(range(self.most + 1), key=self.gain)
        if self.gain(best) < (CLEAR if best else PARK) * self.gain(self.settled):
            return
        if self.rounds - self.timed[best] > FRESH or (best and self.costs.samples(best) < ENOUGH):
            self._look(best)
            return
        self.settled, self.stayed = best, 0
        self.switches += 1

    def _other(self) -> int:
        """The depth to look at: from depth 0 the cheapest, or one not timed for long; else what was not longest."""
        others = [depth for depth in range(self.most + 1) if depth != self.settled]
        if self.settled:
            return min(others, key=lambda depth: self.timed[depth])
        return next((depth for depth in others if self.rounds - self.timed[depth] >= OLD), 1)

    def _look(self, depth: int) -> None:
        """Plan a look. What is known of probabilities that the settled depth does not measure may be old."""
        for j in range(self.settled, self.most):
            weight = min(1, BRIEF / max(self.tried[j], 1e-9))
            self.tried[j], self.right[j] = weight * self.tried[j], weight * self.right[j]
        self.plan.extend([depth] * LOOK)
        self.since = 0
