"""How a model is split over machines: which layers, how long a context, what is refused, and seconds of a token."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from adapters.by_hand import made
from refusing import refused

from mlx_qwen35.budget.plan import PIXELS, Machine, longest_context, mac, plan_memory
from mlx_qwen35.budget.split_speed import (
    Link,
    collectives,
    one_seconds,
    part_bytes,
    pipeline_seconds,
    rate_of,
    split_seconds,
    tensor_seconds,
)
from mlx_qwen35.budget.splitting import (
    CHUNK_OF,
    PIPELINE,
    STEP,
    TENSOR,
    Split,
    lowest_maximum,
    pipeline_split,
    split_model,
    split_of,
    tensor_split,
)
from mlx_qwen35.cache.kv_format import KVFormat
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.names import MTP, VISION
from mlx_qwen35.checkpoint.random import geometry, write_headers
from mlx_qwen35.checkpoint.share import Share
from mlx_qwen35.convert.planned import planned
from mlx_qwen35.convert.recipes import StorageOptions
from mlx_qwen35.machine.chip import parse_chip


@pytest.fixture(scope="session")
def of_size(tmp_path_factory: pytest.TempPathFactory):
    """(member of the family, recipe) -> a checkpoint that exists only as headers."""
    known: dict[tuple[str, str], Checkpoint] = {}

    def checkpoint(size: str, recipe: str = "bf16") -> Checkpoint:
        if (size, recipe) not in known:
            folder: Path = tmp_path_factory.mktemp("headers") / "model"
            write_headers(folder, geometry(size))
            known[size, recipe] = (
                open_checkpoint(folder) if recipe == "bf16" else planned(folder, StorageOptions(recipe))
            )
        return known[size, recipe]

    return checkpoint


def machine(megabytes: float, kv: KVFormat = KVFormat()) -> Machine:  # noqa: B008
    return Machine(f"{megabytes:g} MB", int(megabytes * 1e6), mx.float32, "cpu", kv=kv)


def by_hand(checkpoint: Checkpoint, machines: Sequence[Machine], layers: Sequence[range], mtp: int, adapters) -> int:
    """The longest context of these ranges, each planned as the smaller model that its machine loads; 0: none fits."""
    text, found = checkpoint.config.text, []
    chunk = plan_memory(checkpoint, machines[0], CHUNK_OF).chunk
    for rank, (own, held) in enumerate(zip(machines, layers, strict=True)):
        share = Share.pipeline(text, held)
        part, pairs = share.of(checkpoint), [share.of_adapter(one, checkpoint) for one in adapters]
        if rank:
            entries = {name: entry for name, entry in part.entries.items() if not name.startswith((VISION, MTP))}
            alone = replace(part.config.text, mtp_num_hidden_layers=0)
            part = replace(part, config=replace(part.config, text=alone), entries=entries)
        plan = plan_memory(part, own, STEP, chunk=chunk, mtp=mtp, adapters=pairs)
        found.append(longest_context(part, plan, own.kv, mtp))
    return min(found)


@pytest.mark.core(2)
@pytest.mark.parametrize(
    "megabytes", [(170, 170), (150, 190), (230, 130), (160, 120, 110), (150, 95, 105, 110)], ids=str
)
@pytest.mark.parametrize(("kv", "mtp", "more"), [(None, 0, 1), ("8/4", 1, 1.3)])
def test_no_other_borders_give_a_longer_context(of_size, megabytes, kv, mtp, more):
    checkpoint = of_size("mid")
    machines = [machine(more * count, KVFormat.of(kv)) for count in megabytes]
    count = checkpoint.config.text.num_hidden_layers
    split = pipeline_split(checkpoint, machines, mtp=mtp)
    every = [
        [range(*edges) for edges in itertools.pairwise((0, *inner, count))]
        for inner in itertools.combinations(range(1, count), len(machines) - 1)
    ]
    best = max(by_hand(checkpoint, machines, layers, mtp, ()) for layers in every)
    assert STEP < best < checkpoint.config.text.max_position_embeddings  # neither nothing nor everything fits
    assert split.context == best == by_hand(checkpoint, machines, split.layers, mtp, ())
    assert [n for layers in split.layers for n in layers] == list(range(count))


def test_adapters_take_room_in_the_layers_that_they_change():
    checkpoint, adapter = open_checkpoint(resolve("nano")), made(1)
    machines = [machine(60), machine(58)]
    bare, with_one = (pipeline_split(checkpoint, machines, adapters=own) for own in ([], [adapter]))
    assert with_one.context == by_hand(checkpoint, machines, with_one.layers, 0, [adapter])
    loaded = [
        plan_memory(share.of(checkpoint), own, 1024, adapters=[share.of_adapter(adapter, checkpoint)])
        for share, own in zip(with_one.shares(checkpoint.config.text), machines, strict=True)
    ]
    taken = [plan.adapters for plan in loaded]
    assert [plan.adapters for plan in with_one.plans] == taken and sum(taken) > 0
    assert [plan.weights for plan in with_one.plans] == [plan.weights for plan in loaded]
    assert not any(plan.adapters for plan in bare.plans)


def test_a_machine_that_is_alone_holds_what_the_plan_of_one_machine_holds(of_size):
    checkpoint, own = of_size("4b", "4bit"), mac(8)
    plan = plan_memory(checkpoint, own, CHUNK_OF, pixels=PIXELS, mtp=1)
    split = split_model(PIPELINE, checkpoint, [own], "4B", mtp=1)
    assert split.context == longest_context(checkpoint, plan, own.kv, 1)
    assert split.plans[0] == plan_memory(checkpoint, own, split.context, pixels=PIXELS, mtp=1, chunk=plan.chunk)


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("size", "recipe", "gigabytes", "least"),
    [("27b", "4bit", (16, 16), 65_536), ("9b", "8bit", (8, 16), 131_072), ("9b", "bf16", (16, 16), 65_536)],
)
def test_what_outgrows_one_mac_has_a_long_context_on_two(of_size, size, recipe, gigabytes, least):
    checkpoint, machines = of_size(size, recipe), [mac(one) for one in gigabytes]
    assert not any(plan_memory(checkpoint, one, 1024).fits for one in machines[:1])
    split = split_model(PIPELINE, checkpoint, machines, size)
    assert split.context >= least and all(plan.image <= plan.machine.limit for plan in split.plans)
    assert split.plans[0].vision_encoder > 0 == split.plans[1].vision_encoder


def test_an_image_gives_way_where_text_alone_fits(of_size):
    split = split_model(PIPELINE, of_size("27b", "4bit"), [mac(8), mac(16)], "27B")
    assert split.context >= 1024 and split.plans[0].vision_encoder == 0


def test_a_larger_machine_holds_more_layers_and_rank_0_fewer_for_what_it_has_besides(of_size):
    checkpoint = of_size("27b", "4bit")
    even, uneven = (
        [len(layers) for layers in split_model(PIPELINE, checkpoint, [mac(16), mac(n)], "27B").layers] for n in (16, 24)
    )
    assert even[0] < even[1] < uneven[1]


def test_where_every_context_fits_machines_are_filled_alike(of_size):
    split = split_model(PIPELINE, of_size("4b", "4bit"), [mac(32), mac(64)], "4B")
    fills = [plan.image / plan.machine.limit for plan in split.plans]
    assert split.context == 262_144 and max(fills) / min(fills) < 1.3


def test_each_part_of_a_tensor_split_is_planned_as_the_smaller_model_that_is_loaded(of_size):
    checkpoint, machines = of_size("27b", "4bit"), [mac(16), mac(24)]
    split = split_model(TENSOR, checkpoint, machines, "27B", mtp=1)
    text = checkpoint.config.text
    held = [plan_memory(Share.tensor(text, rank, 2).of(checkpoint), mac(16), 1024).weights for rank in (0, 1)]
    assert [plan.weights for plan in split.plans] == held
    assert split.plans[0].drafts > 0 == split.plans[1].drafts
    assert {plan.sampling for plan in split.plans} == {plan_memory(checkpoint, mac(16), 1024).sampling}
    whole, drafting = (plan_memory(checkpoint, mac(16), split.context, mtp=mtp).kv for mtp in (0, 1))
    assert [plan.kv for plan in split.plans] == [drafting - whole // 2, whole // 2]  # all heads of the draft head's
    assert split.plans[0].state == split.plans[1].state == plan_memory(checkpoint, mac(16), 1024, mtp=1).state // 2
    longer = [replace(plan, kv=plan.kv + plan.kv // 8) for plan in split.plans]
    assert all(plan.fits for plan in split.plans) and not longer[0].fits


@pytest.mark.core(1)
@pytest.mark.parametrize("kind", [PIPELINE, TENSOR])
def test_chunks_are_planned_as_the_machine_with_the_shortest_chooses_them(of_size, kind):
    checkpoint, machines = of_size("9b", "4bit"), [mac(64), mac(16)]
    long, short = (plan_memory(checkpoint, one, CHUNK_OF).chunk for one in machines)
    split = split_model(kind, checkpoint, machines, "27B")
    assert {plan.chunk for plan in split.plans} == {short} and short < long


@pytest.mark.parametrize("kind", [PIPELINE, TENSOR])
def test_what_fits_no_two_machines_is_refused_with_what_each_needs_and_has(of_size, kind):
    with refused("memory_exceeded", "27B", "11.5 GB", "M1, 16 GB", kind) as caught:
        split_model(kind, of_size("27b"), [mac(16), mac(16)], "27B")
    assert str(caught.value).count("a model may take") == 2


def test_more_machines_than_layers_are_refused(of_size):
    with refused("split_unfit", "4", "5"):
        split_model(PIPELINE, of_size("tiny"), [mac(8)] * 5, "tiny")


def test_heads_that_do_not_divide_are_refused(of_size):
    with refused("split_unfit"):
        tensor_split(of_size("tiny"), [mac(8)] * 2)


def test_borders_have_the_lowest_highest_cost():
    costs = [3, 1, 4, 1, 5, 9, 2, 6]

    def cost(rank: int, layers: range) -> float:
        return sum(costs[n] for n in layers) / (1, 2, 3)[rank]

    found = lowest_maximum(3, 8, cost)
    every = [
        max(cost(0, range(a)), cost(1, range(a, b)), cost(2, range(b, 8)))
        for a, b in itertools.combinations(range(1, 8), 2)
    ]
    assert max(cost(rank, layers) for rank, layers in enumerate(found)) == min(every)


def test_auto_is_tensor_over_jaccl_and_a_pipeline_over_the_ring():
    assert [split_of(backend) for backend in ("jaccl", "ring")] == [TENSOR, PIPELINE]


# --- seconds of a token ----------------------------------------------------------------------------------------------

PUBLISHED = {  # design notes: GB of a token, GB/s, layers -> ms on one, on two at 0.3 ms a sum, on two at 15 us
    "4B, M1": (2.37, 68, 32, (35, 37, 18)),
    "4B, M1 Max": (2.37, 400, 32, (5.9, 22, 3.9)),
    "27B, M4 Pro": (15.6, 273, 64, (57, 67, 30)),
    "27B, M5 Max": (15.6, 600, 64, (26, 51, 15)),
}


@pytest.mark.parametrize(("gigabytes", "speed", "layers", "told"), PUBLISHED.values(), ids=PUBLISHED)
def test_milliseconds_are_those_of_the_design(gigabytes, speed, layers, told):
    """The table has a step = bytes / (2 x bandwidth) + 2 sums a layer x latency, and full bandwidth."""
    nbytes, rate = gigabytes * 1e9, speed * 1e9
    slow, fast = (tensor_seconds([nbytes / 2] * 2, [rate] * 2, 2 * layers, wait) for wait in (0.3e-3, 15e-6))
    for seconds, milliseconds in zip((one_seconds(nbytes, rate), slow, fast), told, strict=True):
        digits = 1 if milliseconds < 10 else 0
        assert abs(1000 * seconds - milliseconds) <= 0.5 * 10**-digits + 0.01


def test_a_pipeline_takes_what_one_machine_takes_and_a_hop_for_each():
    assert pipeline_seconds([6e9, 2e9], [2e9, 1e9], 0.5e-3) == pytest.approx(3 + 2 + 1e-3)


def test_the_slowest_part_of_a_tensor_split_counts():
    assert tensor_seconds([6e9, 6e9], [3e9, 2e9], 10, 0.01) == pytest.approx(3 + 0.1)


def test_parts_of_a_token_add_up_to_the_whole(of_size):
    checkpoint = of_size("9b", "4bit")
    whole = plan_memory(checkpoint, mac(64), 8192)
    for kind in (PIPELINE, TENSOR):
        split = split_model(kind, checkpoint, [mac(24), mac(16)], "27B")
        parts = part_bytes(checkpoint, split, 8192)
        one = split_model(PIPELINE, checkpoint, [mac(64)], "27B")
        assert sum(parts) == pytest.approx(part_bytes(checkpoint, one, 8192)[0], rel=1e-3)
        assert sum(parts) < whole.weights + whole.kv + whole.state  # an untied table is no output matrix


@pytest.mark.full
def test_the_published_run_over_jaccl_takes_as_long_as_is_computed(of_size):
    """27B in 4 bit, two M4 Pro: 17.0 tokens a second (ml-explore/mlx-lm#990)."""
    checkpoint, machines = of_size("27b", "4bit"), [mac(48, chip="M4 Pro")] * 2
    split = split_model(TENSOR, checkpoint, machines, "27B")
    parts, rates = part_bytes(checkpoint, split, 1024), [rate_of(parse_chip("Apple M4 Pro"))] * 2
    seconds = split_seconds(split, parts, rates, Link(30e-6, 15e-6, 1e9), checkpoint.config.text)
    assert seconds == pytest.approx(1 / 17.0, rel=0.1)


def test_a_slow_link_costs_a_tensor_split_its_sums_and_a_pipeline_its_hops(of_size):
    checkpoint, machines = of_size("9b", "4bit"), [mac(24, chip="M4 Pro")] * 2
    text, rate = checkpoint.config.text, rate_of(parse_chip("Apple M4 Pro"))
    link, none = Link(0.6e-3, 0.3e-3, 1e9), Link(0, 0, float("inf"))
    grown = {}
    for kind in (PIPELINE, TENSOR):
        split: Split = split_model(kind, checkpoint, machines, "27B")
        parts = part_bytes(checkpoint, split, 8192)
        slow, fast = (split_seconds(split, parts, [rate] * 2, one, text) for one in (link, none))
        grown[kind] = slow - fast
    assert collectives(text) == 66
    assert grown[TENSOR] == pytest.approx(66 * 0.3e-3 + 0.3e-3)
    assert grown[PIPELINE] == pytest.approx(2 * (0.3e-3 + 2 * text.hidden_size * 2 / 1e9))
