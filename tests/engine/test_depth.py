"""The controller of the draft depth under a synthetic clock: seconds from a table and seeded noise, drafts from p_j."""

import random
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise, product
from operator import mul
from statistics import mean

import pytest

from mlx_qwen35.engine.drafts.depth import RETRY_EVERY, Costs, DepthControl

PROPORTIONAL = (1.0, 2.0, 3.0, 4.0)  # seconds at depth 0, 1, 2, 3
FLAT = (1.0, 1.05, 1.1, 1.15)
MIDDLE = (1.0, 1.2, 1.4, 1.6)
STEP = (1.0, 1.9, 2.0, 2.1)  # two rows as slow as one by one, four not
GOOD, NEVER = (0.85, 0.8, 0.75), (0.0, 0.0, 0.0)


def rate(seconds: Sequence[float], p: Sequence[float], depth: int) -> float:
    """Tokens a second in truth."""
    return (1 + sum(accumulate(p[:depth], mul))) / seconds[depth]


def best(seconds: Sequence[float], p: Sequence[float]) -> float:
    return max(rate(seconds, p, depth) for depth in range(4))


class World:
    """A machine with a model that answers in place of both: one generation, step by step."""

    def __init__(self, most: int = 3, costs: Costs | None = None, noise: float = 0.03, seed: int = 0, batch: int = 1):
        self.depths = DepthControl(most, costs or Costs())
        self.rng, self.noise, self.batch = random.Random(seed), noise, batch
        self.early: int | None = None  # what next() said one round ahead
        self.rounds = self.rows = 0

    def round(self, seconds: Sequence[float], p: Sequence[float], pause: float = 0) -> tuple[int, int]:
        """One round -> (depth, tokens); plain ones are pipelined. pause: the chance that it takes ten times as long."""
        depth = self.depths.next() if self.early is None else self.early
        self.early = self.depths.next() if depth == 0 else None
        accepted = []
        for _ in range(self.batch):
            draws = [self.rng.random() < p[j] for j in range(depth)]
            accepted.append((*draws, False).index(False))
        time = seconds[depth] * max(0.3, self.rng.gauss(1, self.noise)) * (10 if self.rng.random() < pause else 1)
        self.depths.record(depth, time, [depth] * self.batch, accepted)
        self.rounds += 1
        self.rows += self.batch * (depth + 1)
        return depth, self.batch + sum(accepted)

    def run(self, seconds: Sequence[float], p: Sequence[float], tokens: int, pause: float = 0) -> list[tuple[int, int]]:
        """Rounds until that many tokens more are there."""
        done, end = [], self.depths.tokens + tokens
        while self.depths.tokens < end:
            done.append(self.round(seconds, p, pause))
        return done

    def until(self, seconds: Sequence[float], p: Sequence[float], right: Callable[[int], bool], most: int) -> int:
        """Tokens before the first of 12 rounds in a row at a right depth."""
        tokens = row = before = 0
        while row < 12 and tokens < most:
            depth, new = self.round(seconds, p)
            tokens += new
            row, before = (row + 1, before) if right(depth) else (0, tokens)
        return before if row == 12 else most


def rejected(world: World) -> float:
    """Rows beyond plain decoding, a token."""
    return (world.rows - world.depths.tokens) / world.depths.tokens


# --- the choice ------------------------------------------------------------------------------------------------------

TABLES = [
    *(PROPORTIONAL, FLAT, MIDDLE, STEP, (1, 1.1, 1.2, 1.3), (1, 1.3, 1.5, 1.8), (1, 1.4, 1.8, 2.2)),
    *((1, 1.7, 2.4, 3.2), (1, 1.2, 2, 2.2)),
]
TEXTS = [NEVER, (0.3,) * 3, (0.5, 0.4, 0.3), (0.6,) * 3, (0.8,) * 3, (0.85, 0.75, 0.65)]
TEXTS += [(0.95, 0.9, 0.9), (0.9, 0.2, 0.2)]


@pytest.fixture(scope="module")
def grid() -> list[tuple[float, float]]:
    """Of 72 pairs of costs and probabilities: tokens at depths within 6 % of the best, and speed, in the best one's."""
    found = []
    for table, p in product(TABLES, TEXTS):
        world, top = World(), best(table, p)
        done = world.run(table, p, 2000)
        near = sum(new for depth, new in done if rate(table, p, depth) > 0.94 * top)
        seconds = sum(table[depth] for depth, _ in done)
        found.append((near / world.depths.tokens, world.depths.tokens / seconds / top))
    return found


@pytest.mark.full
def test_over_a_grid_of_costs_and_probabilities_most_tokens_come_at_a_depth_within_6_percent_of_the_best(grid):
    near = [share for share, _ in grid]
    assert len(near) == 72 and mean(near) > 0.94
    assert sum(share > 0.8 for share in near) >= 69  # the other three could gain 7 or 8 %, and are disabled for a while


@pytest.mark.full
def test_over_the_grid_what_measuring_costs_is_small(grid):
    speeds = [speed for _, speed in grid]
    assert min(speeds) > 0.9 and mean(speeds) > 0.97


def test_where_rows_are_nearly_free_depth_3_is_settled_on_soon():
    tokens = sorted(World(seed=seed).until(FLAT, (0.8,) * 3, lambda depth: depth == 3, 400) for seed in range(20))
    assert tokens[17] < 30 and tokens[-1] < 120


def test_depth_3_is_found_though_depth_1_costs_as_much_as_two_plain_rounds():
    tokens = [World(seed=seed).until(STEP, (0.9,) * 3, lambda depth: depth == 3, 2000) for seed in range(20)]
    assert max(tokens) < 1000


def test_the_most_is_a_bound():
    for most in (1, 2):
        done = World(most).run(FLAT, GOOD, 1000)
        assert max(depth for depth, _ in done) == most
        assert done[-1][0] == most


# --- where it does not pay -------------------------------------------------------------------------------------------


@pytest.mark.core(1)
@pytest.mark.parametrize(("p", "noise"), [(0.0, 0.03), (0.0, 0.15), (0.5, 0.03), (0.5, 0.1)])
def test_where_rows_cost_in_proportion_3_percent_are_rejected_at_most_at_512_tokens_and_after(p, noise):
    for seed in range(20):
        world = World(noise=noise, seed=seed)
        for tokens in (512, 488, 3000):
            world.run(PROPORTIONAL, (p,) * 3, tokens)
            assert rejected(world) <= 0.03


@pytest.mark.parametrize("batch", [2, 4])
def test_the_share_holds_in_batches(batch):
    world = World(batch=batch)
    for tokens in (512, 488, 1000):
        world.run(PROPORTIONAL, NEVER, tokens * batch)
        assert rejected(world) <= 0.03


def test_a_batch_whose_rows_agree_goes_as_one_sequence_does():
    alone, batch = World(noise=0), World(noise=0, batch=4)
    alone.run(PROPORTIONAL, NEVER, 800)
    batch.run(PROPORTIONAL, NEVER, 3200)
    assert len(alone.depths.history) > 5 and alone.depths.history == batch.depths.history


def test_where_the_tries_do_not_make_it_clear_the_share_holds_too():
    # If every draft were accepted it could pay, so all depths are tried: 12 rejected rows.
    world = World()
    world.run((1.0, 1.8, 2.6, 3.4), NEVER, 512)
    assert {depth for _, depth in world.depths.history} == {0, 1, 2, 3}
    assert rejected(world) <= 0.03


@pytest.mark.parametrize("p", [0.0, 0.5, 0.95, 1.0])
def test_where_rows_cost_in_proportion_it_is_disabled_whatever_is_accepted(p):
    world = World()
    done = world.run(PROPORTIONAL, (p,) * 3, 2000)
    assert world.depths.settled == world.depths.switches == 0
    assert sum(depth == 0 for depth, _ in done) > 0.97 * len(done)


def test_depths_that_cannot_pay_are_not_tried_once_that_is_clear():
    world = World()
    world.run(PROPORTIONAL, GOOD, 60)
    assert world.depths.history == [(0, 0), (3, 1), (5, 0)]


def test_probes_become_rarer_while_they_fail_and_never_end():
    world = World(most=1)
    world.run((1.0, 1.2), NEVER, 3000)
    starts = [rounds for rounds, depth in world.depths.history if depth == 1]
    gaps = [after - before for before, after in pairwise(starts)]
    assert gaps[0] < gaps[1] < gaps[-1] and max(gaps) < 300 and starts[-1] > 2700


# --- change ----------------------------------------------------------------------------------------------------------

# Seconds a round, and the most tokens until drafting is disabled.
COLLAPSE = [((1, 1.5, 1.9, 2.4), 50), (MIDDLE, 80), ((1, 1.1, 1.2, 1.3), 120)]


@pytest.mark.parametrize(("table", "most"), COLLAPSE)
def test_it_is_disabled_soon_after_drafts_are_no_longer_accepted(table, most):
    for seed in range(10):
        world = World(seed=seed)
        world.run(table, GOOD, 600)
        assert world.depths.settled
        assert world.until(table, NEVER, lambda depth: depth == 0, 1000) < most


@pytest.mark.parametrize("table", [table for table, _ in COLLAPSE])
def test_it_drafts_again_within_800_tokens_after_drafts_are_accepted_again(table):
    top = best(table, GOOD)
    for seed in range(10):
        world = World(seed=seed)
        world.run(table, GOOD, 600)
        world.run(table, NEVER, 1500)
        assert world.depths.settled == 0
        assert world.until(table, GOOD, lambda depth: rate(table, GOOD, depth) > 0.9 * top, 2000) < 800


def test_it_is_disabled_when_verifying_becomes_expensive_and_drafts_when_it_is_cheap_again():
    world = World()
    world.run(MIDDLE, GOOD, 600)
    assert world.until(PROPORTIONAL, GOOD, lambda depth: depth == 0, 1000) < 100
    world.run(PROPORTIONAL, GOOD, 600)
    assert world.until(MIDDLE, GOOD, lambda depth: depth > 1, 2000) < 1500


def test_rounds_that_all_become_slower_change_nothing():
    world = World()
    table = (1.0, 1.1, 1.2, 1.3)
    world.run(table, GOOD, 600)
    settled = world.depths.settled
    done = world.run([2 * seconds for seconds in table], GOOD, 1000)
    assert settled == world.depths.settled
    assert sum(depth == settled for depth, _ in done) > 0.85 * len(done)


def test_a_deeper_draft_that_becomes_accepted_is_found():
    world = World()
    world.run(FLAT, (0.8, 0.0, 0.0), 600)
    assert world.depths.settled == 1
    assert world.until(FLAT, (0.8,) * 3, lambda depth: depth == 3, 2500) < 2000


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "p"), [((1, 1.3, 1.56, 2.6), (0.8, 0.5, 0.2)), ((1, 1.5, 2.1, 3), (0.5, 0.4, 0.3))])
def test_between_two_equal_depths_15_percent_of_noise_changes_it_16_times_in_2000_rounds_at_most(table, p):
    for seed in range(6):
        world, done = World(noise=0.15, seed=seed), []
        while world.rounds < 2000:
            done.append(world.round(table, p))
        assert world.depths.switches <= 16
        assert len(world.depths.history) <= 50  # with probes
        speed = sum(new for _, new in done) / sum(table[depth] for depth, _ in done)
        assert speed > 0.93 * best(table, p)


def test_rounds_that_pause_do_not_disable_it_for_long():
    for seed in range(10):
        world = World(seed=seed)
        done = world.run(MIDDLE, GOOD, 2000, pause=0.03)
        assert sum(new for depth, new in done if depth >= 2) > 0.8 * world.depths.tokens


def test_the_first_round_after_a_change_is_not_timed():
    depths = DepthControl(1, Costs())
    depth = None
    for _ in range(60):
        before, depth = depth, depths.next()
        depths.record(depth, 50.0 if depth != before else (1.0, 1.2)[depth], [depth], [depth])
    assert depths.settled == 1
    assert depths.gain(1) == pytest.approx(2 / 1.2, rel=0.02)


# --- the interface ---------------------------------------------------------------------------------------------------


def test_next_may_be_called_one_round_ahead_of_record():
    def world(ahead: bool) -> list[int]:
        depths, given, taken = DepthControl(3, Costs()), [], []
        for _ in range(400):
            while len(given) < 1 + ahead:
                given.append(depths.next())
            depth = given.pop(0)
            taken.append(depth)
            depths.record(depth, MIDDLE[depth], [depth], [depth])
        return taken

    assert world(True)[:9] == world(False)[:9] == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert world(True).count(3) > 300 and world(False).count(3) > 300


def test_drafts_of_unequal_rows_count_where_they_were_made():
    depths = DepthControl(3, Costs(), fixed=3)
    depths.record(3, 1.0, [3, 3, 1, 0], [3, 1, 0, 0])
    # Draft 1: 2 of 3. Draft 2: 1 of 2. Draft 3: the one that was asked.
    assert (depths.tried, depths.accepted) == ([3, 2, 1], [2, 1, 1])
    assert (depths.rounds, depths.tokens) == (1, 8)


def test_a_round_in_which_nothing_runs_tells_nothing():
    depths = DepthControl(2, Costs())
    for _ in range(20):
        depths.record(depths.next(), 5.0, [], [])
    assert depths.tokens == 0 and not any(depths.seconds) and "measuring" in depths.reason()


def test_a_plain_round_gives_each_sequence_one_token():
    depths = DepthControl(2, Costs())
    depths.record(depths.next(), 1.0, [0, 0, 0], [0, 0, 0])
    assert depths.tokens == 3


@pytest.mark.parametrize("fixed", [0, 1, 3])
def test_a_fixed_depth_is_always_the_depth_and_is_counted(fixed):
    depths = DepthControl(3, Costs(), fixed=fixed)
    for _ in range(300):
        assert depths.next() == fixed
        depths.record(fixed, PROPORTIONAL[fixed], [fixed], [0])
    assert depths.history == [(0, fixed)]
    assert (depths.rounds, depths.tokens) == (300, 300)
    assert depths.reason() == f"fixed at depth {fixed}"


def test_the_history_is_the_rounds_at_which_the_depth_changed():
    world = World()
    done = world.run(MIDDLE, GOOD, 500)
    taken = [depth for depth, _ in done]
    changes = [(i, depth) for i, depth in enumerate(taken) if i == 0 or taken[i - 1] != depth]
    assert world.depths.history == changes


def test_the_verdict_says_what_pays_and_what_would_not():
    world = World(noise=0)
    assert world.depths.reason() == "still measuring what drafting costs and gives"
    world.run(MIDDLE, (1.0,) * 3, 600)
    assert world.depths.reason().startswith("depth 3 pays: 2.4")
    world = World(noise=0)
    world.run(PROPORTIONAL, NEVER, 600)
    assert world.depths.reason().startswith("disabled: drafting would give 0.5")
    assert world.depths.reason().endswith(" times plain decoding (best depth 1)")


# --- from one generation to the next ---------------------------------------------------------------------------------


def test_depths_whose_costs_are_known_are_not_tried_again():
    costs = Costs()
    World(costs=costs).run(MIDDLE, GOOD, 2000)
    assert all(costs.samples(depth) >= 3 for depth in (1, 2, 3))
    world = World(costs=costs)
    world.run(MIDDLE, GOOD, 60)
    assert world.depths.history in ([(0, 0), (4, 2)], [(0, 0), (4, 3)])


def test_costs_are_relative_to_plain_rounds_so_that_a_longer_context_needs_no_new_ones():
    costs = Costs()
    World(costs=costs).run(MIDDLE, GOOD, 2000)
    world = World(costs=costs)
    world.run([3 * seconds for seconds in MIDDLE], GOOD, 60)
    assert world.depths.history in ([(0, 0), (4, 2)], [(0, 0), (4, 3)])


def test_the_cost_of_a_depth_without_times_is_on_a_line_through_its_neighbours():
    costs = Costs()
    assert [costs.ratio(depth) for depth in (1, 2, 3)] == [2, 3, 4]
    costs.add(2, 1.8)
    assert [costs.ratio(depth) for depth in (1, 2, 3)] == pytest.approx([1.4, 1.8, 2.2])
    costs.add(3, 4.0)
    assert costs.ratio(1) == pytest.approx(1.4)
    ends = Costs()
    ends.add(1, 1.5)
    ends.add(3, 1.7)
    assert ends.ratio(2) == pytest.approx(1.6)


def known(ratios: Sequence[float], samples: int = 3) -> Costs:
    costs = Costs()
    for depth, ratio in enumerate(ratios, 1):
        for _ in range(samples):
            costs.add(depth, ratio)
    return costs


def test_it_is_ruled_out_where_no_depth_would_pay_if_every_draft_were_accepted():
    assert known(PROPORTIONAL[1:]).never_pays(3)
    assert not known((2.0, 3.0, 3.0)).never_pays(3)
    assert known((2.0, 3.0, 3.0)).never_pays(2)


def test_it_is_not_ruled_out_before_all_depths_are_well_known():
    assert not Costs().never_pays(1)
    assert not known(PROPORTIONAL[1:], samples=2).never_pays(3)
    assert not known(PROPORTIONAL[1:3]).never_pays(3)


def test_generations_one_after_the_other_find_out_that_it_is_ruled_out():
    costs, generations = Costs(), 0
    while generations < 20 and not costs.never_pays(3):
        World(costs=costs, seed=generations).run(PROPORTIONAL, NEVER, 512)
        generations += 1
    assert generations <= 9


def test_every_tenth_question_is_answered_no_and_one_depth_is_tried_again():
    costs = known(PROPORTIONAL[1:])
    answers = [costs.never_pays(3) for _ in range(RETRY_EVERY)]
    assert answers == [True] * (RETRY_EVERY - 1) + [False]
    again = World(costs=costs)
    again.run(PROPORTIONAL, NEVER, 40)
    assert len({depth for _, depth in again.depths.history} - {0}) == 1
    assert costs.never_pays(3)


def test_a_machine_that_was_only_busy_is_not_ruled_out_for_good():
    costs, drafted = known(PROPORTIONAL[1:]), False
    for seed in range(10 * RETRY_EVERY):
        if not costs.never_pays(3):
            world = World(costs=costs, seed=seed)
            world.run(MIDDLE, GOOD, 600)
            drafted = drafted or world.depths.settled > 0
    assert drafted
