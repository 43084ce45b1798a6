"""A library of prefixes: warm is cold, other pixels are others, the cap holds, and what is in use stays."""

import gc
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from memory_use import active
from refusing import refused

from mlx_qwen35.cache.cache import Snapshot
from mlx_qwen35.cache.layer import CachePosition
from mlx_qwen35.cache.prefix import QUERY, READING, STEP, SYSTEM, TURN, PrefixLibrary, Use
from mlx_qwen35.cache.prefix_tokens import Prefix, Shown
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.model.model import Model
from mlx_qwen35.prompt.positions import Placeholder

CHUNK, IMAGE = 16, (2, 3)  # tokens; height and width


@pytest.fixture(scope="module")
def model(text_model) -> Model:
    return text_model()


def row(model: Model, prefix: Prefix, start: int) -> PromptRow:
    """What is behind the first `start` tokens of a prompt. A digest is the seed of an image's embeddings."""
    placeholders = [Placeholder(*place) for shown in prefix.media for place in shown.places if place[0] >= start]
    seeds = [int(shown.digest) for shown in prefix.media if shown.start >= start]
    size = (IMAGE[0] * IMAGE[1], model.config.hidden_size)
    embeddings = [mx.array(np.random.default_rng(seed).normal(size=size), model.dtype) for seed in seeds]
    shifted = [p._replace(start=p.start - start) for p in placeholders]
    return PromptRow(prefix.tokens[start:].tolist(), shifted, mx.concatenate(embeddings) if embeddings else None)


def cut(row: PromptRow, start: int, stop: int) -> PromptRow:
    """Columns of a prompt that cut no image."""
    inside = [i for i, p in enumerate(row.placeholders) if start <= p.start < stop]
    if not inside or row.embeddings is None:
        return PromptRow(row.tokens[start:stop])
    placeholders = [row.placeholders[i]._replace(start=row.placeholders[i].start - start) for i in inside]
    embeddings = row.embeddings.reshape(len(row.placeholders), IMAGE[0] * IMAGE[1], -1)[mx.array(inside)]
    return PromptRow(row.tokens[start:stop], placeholders, embeddings.reshape(-1, embeddings.shape[-1]))


def read(model: Model, library: PrefixLibrary, prefix: Prefix, places: list[int]) -> tuple[mx.array, Use]:
    """Read a prompt, stored at these places; (1, D), its last hidden state."""
    cache, use = library.begin(prefix)
    whole = row(model, prefix, use.reused)
    inner = [place for place in places if use.reused < place < len(prefix) and prefix.whole(place)]
    for start, stop in pairwise([use.reused, *inner, len(prefix)]):
        hidden = prefill(model, cache, cut(whole, start - use.reused, stop - use.reused), CHUNK)
        use.read(cache, stop - start, QUERY if stop in inner else None)
    return hidden, use


def empty(model: Model, length: int) -> Snapshot:
    """A snapshot that says it has so many tokens."""
    cache = model.make_cache()
    cache.position = CachePosition((length,), (length,))
    return cache.snapshot()


def cold(model: Model, prefix: Prefix) -> mx.array:
    return prefill(model, model.make_cache(), row(model, prefix, 0), CHUNK)


def edited(rng: np.random.Generator, prefix: Prefix) -> Prefix:
    """A prompt with more tokens, another token, another image in an old one's place, or one more."""
    tokens, media = prefix.tokens.copy(), list(prefix.media)
    deed = rng.choice(["append", "change", "show", "swap"])
    if deed == "swap" and media:
        i = rng.integers(len(media))
        media[i] = media[i]._replace(digest=str(rng.integers(100)))
    elif deed == "change":
        tokens[rng.choice([i for i, token in enumerate(tokens) if token != 1])] = rng.integers(2, 90)
    elif deed == "show":
        media.append(Shown(str(rng.integers(100)), ((len(tokens), *IMAGE),)))
        tokens = np.concatenate([tokens, [1] * (IMAGE[0] * IMAGE[1]), [2]])
    else:
        tokens = np.concatenate([tokens, rng.integers(2, 90, size=rng.integers(1, 40))])
    return Prefix(tokens.astype(np.int32), tuple(media))


@pytest.mark.core(1)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 30))])
@pytest.mark.parametrize("aligned", [True, False])
def test_after_any_edits_warm_is_cold(model, seed, aligned):
    """Bit for bit where a snapshot ends with a chunk, else within 1e-5."""
    rng, library = np.random.default_rng(seed), model.make_library(0.001)
    known, total = [Prefix(np.arange(2, 30, dtype=np.int32))], 0
    for _ in range(8):
        prefix = edited(rng, known[rng.integers(len(known))])
        length = len(prefix)
        places = range(CHUNK, length, CHUNK) if aligned else sorted({*rng.integers(1, length, 3).tolist(), length - 1})
        warm, _ = read(model, library, prefix, list(places))
        total += length
        expected = cold(model, prefix)
        if aligned and all(prefix.whole(place) for place in places):
            assert np.array(warm).tobytes() == np.array(expected).tobytes()
        assert float(mx.abs(warm - expected).max()) < 1e-5
        assert library.counts.read == total - library.counts.reused
        known.append(prefix)
    assert library.counts.reused > 0
    assert library.counts.stored == len(library.entries()) + library.counts.evicted


def test_the_longest_snapshot_begins_and_one_token_is_left(model):
    library, prefix = model.make_library(), Prefix(np.arange(2, 60, dtype=np.int32))
    read(model, library, prefix, [20, 57])
    assert library.begin(prefix)[1].reused == 57
    assert library.begin(prefix.upto(57))[1].reused == 20
    assert library.begin(prefix.upto(20))[1].reused == 0


def test_the_same_tokens_with_other_pixels_or_at_another_place_are_another_prompt(model):
    tokens = np.array([5, 1, 1, 1, 1, 1, 1, 7, 8, 9, 10], np.int32)
    one = Prefix(tokens, (Shown("3", ((1, 2, 3),)),))
    library = model.make_library()
    read(model, library, one, [9])
    assert library.begin(Prefix(tokens, (Shown("3", ((1, 2, 3),)),)))[1].reused == 9
    assert library.begin(Prefix(tokens, (Shown("4", ((1, 2, 3),)),)))[1].reused == 0
    assert library.begin(Prefix(tokens, (Shown("3", ((1, 3, 2),)),)))[1].reused == 0
    assert library.begin(Prefix(tokens))[1].reused == 0


@pytest.mark.parametrize(
    ("tokens", "media", "expected"),
    [
        ([5, 1, 1, 7, 8], ["3"], 5),
        ([5, 1, 1, 7, 8, 9, 2, 2], ["3"], 6),
        ([5, 1, 1, 6, 8, 9], ["3"], 3),
        ([5, 1, 1, 7, 8], ["4"], 1),
        ([5, 1, 1, 7, 8], [], 1),
        ([6, 1, 1, 7, 8], ["3"], 0),
    ],
)
def test_where_two_prompts_part(tokens, media, expected):
    def prefix(tokens: list[int], media: list[str]) -> Prefix:
        return Prefix(np.array(tokens, np.int32), tuple(Shown(digest, ((1, 1, 2),)) for digest in media))

    assert prefix(tokens, media).shared(prefix([5, 1, 1, 7, 8, 9], ["3"])) == expected


def test_inside_an_image_nothing_is_stored_and_that_is_counted(model):
    prefix = Prefix(np.array([5, 1, 1, 1, 1, 1, 1, 7], np.int32), (Shown("3", ((1, 2, 3),)),))
    library = model.make_library()
    cache, use = library.begin(prefix)
    model(mx.array([[5, 1, 1]]), cache)
    use.store(cache, READING)
    assert not library.entries() and library.counts.skipped == {"inside an image": 1}


def test_a_snapshot_of_another_form_is_refused(model):
    library = model.make_library()
    with refused("snapshot_foreign"):
        library.store(Prefix(np.array([1], np.int32)), model.make_cache(2).snapshot(), TURN)


@pytest.mark.parametrize("length", [0, 9, 11])
def test_a_snapshot_of_other_tokens_is_refused(model, length):
    library = model.make_library()
    with refused("snapshot_foreign", "10", str(length)):
        library.store(Prefix(np.arange(10, dtype=np.int32)), empty(model, length), TURN)
    assert not library.entries()


def test_a_place_that_another_prompt_stores_again_stays_in_use(model):
    library, prefix = model.make_library(), Prefix(np.arange(2, 40, dtype=np.int32))
    library.memory = 0
    (one, first), (other, second) = library.begin(prefix), library.begin(prefix)
    for cache, use, kind in ((one, first, TURN), (other, second, SYSTEM)):
        model(mx.array([prefix.tokens[:20].tolist()]), cache)
        use.store(cache, kind)
    assert [entry.kind for entry in library.entries()] == [SYSTEM] and library.counts.stored == 1
    second.close()
    assert library.entries() == list(first.kept.values())
    first.close()
    assert not library.entries()


@pytest.mark.full
@pytest.mark.parametrize("conversations", [60, pytest.param(1000, marks=pytest.mark.full)])
def test_the_cap_holds_what_runs_stays_and_the_counts_add_up(model, conversations):
    rng, library = np.random.default_rng(0), model.make_library()
    library.memory = 40 * model.make_cache().nbytes
    running = Prefix(np.arange(2, 40, dtype=np.int32))
    _, kept = read(model, library, running, [30])
    for _ in range(conversations):
        tokens = np.concatenate([running.tokens[: rng.choice([0, 20])], rng.integers(2, 90, size=rng.integers(3, 9))])
        prefix = Prefix(tokens.astype(np.int32))
        cache, use = library.begin(prefix)
        for length, kind in ((len(prefix) - 2, SYSTEM), (len(prefix) - 1, QUERY), (len(prefix), TURN)):
            if length > cache.length:
                model(mx.array([prefix.tokens[cache.length : length].tolist()]), cache)
                use.store(cache, str(rng.choice([kind, TURN])))
                assert library.nbytes <= library.memory
        del cache
        use.close()
        assert library.nbytes <= library.memory
    assert library.ready([running]) == [30] and kept.kept
    assert library.counts.stored == len(library.entries()) + library.counts.evicted
    kept.close()
    library.clear()
    assert not library.entries() and library.nbytes == 0


@pytest.mark.full
def test_of_a_dropped_long_prompt_a_short_snapshot_does_not_hold_the_memory(model):
    library, prefix = model.make_library(), Prefix(np.arange(1000, dtype=np.int32) % 90)
    cache, use = library.begin(prefix)
    for length, kind in ((100, SYSTEM), (999, TURN)):
        prefill(model, cache, PromptRow(prefix.tokens[cache.length : length].tolist()), 512)
        use.store(cache, kind)
    del cache
    use.close()
    whole = library.nbytes
    library.trim(whole - 1)
    assert [entry.kind for entry in library.entries()] == [SYSTEM] and library.nbytes < whole / 2


@pytest.mark.full
def test_a_stored_snapshot_takes_its_bytes_and_no_more(model):
    """Behind drafts the states are views of those of all steps, unless they are copied."""
    library, prefix = model.make_library(), Prefix(np.arange(300, dtype=np.int32) % 90)
    gc.collect()
    before = active()
    cache, use = library.begin(prefix)
    position = cache.position
    mx.eval(model.hidden(mx.array([prefix.tokens[:256].tolist()]), cache, stepwise=True), cache.held())
    cache.rollback(position, [250])
    use.store(cache, TURN)
    del cache
    use.close()
    gc.collect()
    assert active() - before < 1.05 * library.nbytes


def test_only_the_first_of_a_batch_goes_on_without_a_copy_and_none_beside_what_runs(model):
    library, prefix = model.make_library(), Prefix(np.arange(2, 60, dtype=np.int32))
    read(model, library, prefix, [20])
    assert library.ready([prefix, prefix, prefix.upto(20)]) == [20, 0, 0]
    cache, _ = library.begin(prefix)
    assert library.ready([prefix]) == [0]
    del cache
    assert library.ready([prefix]) == [20]


def test_room_is_made_by_what_the_coming_prompts_will_not_keep(model):
    library, coming = model.make_library(), Prefix(np.arange(2, 60, dtype=np.int32))
    other = Prefix(np.concatenate([coming.tokens[:15], coming.tokens]))
    for prefix, lengths in ((coming, (10, 20, 30, 40)), (other, (18, 50))):
        for length, kind in zip(lengths, (SYSTEM, QUERY, QUERY, TURN), strict=False):
            library.store(prefix.upto(length), empty(model, length), kind)
    running = library.keep(other)
    library.make_room([coming])
    assert [len(entry.prefix) for entry in library.entries()] == [10, 18, 30, 40, 50]
    running.close()
    library.make_room([coming])
    assert [len(entry.prefix) for entry in library.entries()] == [10, 30, 40]


def test_a_new_query_lets_go_of_the_turns_of_the_loop_before_it(model):
    library, tokens = model.make_library(), np.arange(2, 60, dtype=np.int32)
    loop, after = Prefix(tokens), Prefix(np.concatenate([tokens[:20], tokens[:30]]))
    alone = Prefix(np.arange(30, 60, dtype=np.int32))
    for prefix, length, kind in ((loop, 20, QUERY), (loop, 40, TURN), (loop, 45, READING), (alone, 5, TURN)):
        library.store(prefix.upto(length), empty(model, length), kind)
    library.begin(loop)
    assert len(library.entries()) == 4
    library.begin(after)
    assert [(len(entry.prefix), entry.kind) for entry in library.entries()] == [(5, TURN), (20, QUERY), (45, READING)]


def test_what_goes_first(model):
    """Turns and readings before queries, queries before systems, the oldest first."""
    library, rng = model.make_library(), np.random.default_rng(0)
    for kind in (SYSTEM, QUERY, TURN, QUERY, SYSTEM, READING):
        prefix = Prefix(rng.integers(2, 90, size=5).astype(np.int32))
        cache, use = library.begin(prefix)
        model(mx.array([prefix.tokens.tolist()]), cache)
        use.store(cache, kind)
        del cache
        use.close()
    order = []
    while left := library.entries():
        library.trim(library.nbytes - 1)
        order += [entry.kind for entry in left if entry not in library.entries()]
    assert order == [TURN, READING, QUERY, QUERY, SYSTEM, SYSTEM]


def test_of_a_long_reading_one_place_at_each_double_distance_stays(model):
    library, prefix = model.make_library(), Prefix(np.zeros(33 * STEP, np.int32))
    _, use = library.begin(prefix)
    for n in range(1, 33):
        entry = library.store(prefix.upto(n * STEP), empty(model, n * STEP), READING)
        use.kept[READING] = entry
        library.replace(entry, None)
        far = [n - len(other.prefix) // STEP for other in library.entries()]
        assert len(far) <= n.bit_length() + 1
        assert all(any(1 << k <= d < 2 << k for d in far) for k in range(n.bit_length() - 1) if (2 << k) <= n)
