"""Places of one conversation come back from the arrays of a session bit by bit, and go on without a copy."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.session_arrays import ROOM, misfits, read_places, session_arrays
from mlx_qwen35.cache.session_file import SessionFile
from mlx_qwen35.model.model import Model

LENGTHS = [3, 70, 300]


@pytest.fixture(scope="module")
def model(text_model) -> Model:
    return text_model()


@pytest.fixture(scope="module")
def places(model) -> list[Cache]:
    """A conversation at each of the lengths."""
    cache, found = model.make_cache(), []
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, LENGTHS[-1]))
    for start, stop in zip([0, *LENGTHS], LENGTHS, strict=False):
        model.hidden(mx.array(tokens[:, start:stop]), cache)
        cache.evaluate()
        found.append(cache.copy())
    return found


@pytest.fixture
def saved(model, places, tmp_path) -> Iterator[SessionFile]:
    file = SessionFile(tmp_path / "talk")
    file.write({}, {"first": mx.zeros(3), **session_arrays(places, model.make_cache())})
    yield file
    file.close()


def bits(cache: Cache) -> dict[str, bytes]:
    return {name: np.array(array).tobytes() for name, array in cache.arrays().items()}


def test_every_place_comes_back_as_it_was(model, places, saved):
    found, others = read_places(saved.arrays(), model.make_cache(), [place.position for place in places])
    assert list(others) == ["first"]
    for cache, place in zip(found, places, strict=True):
        assert (cache.position, bits(cache)) == (place.position, bits(place))


def test_places_share_their_columns(model, places, saved):
    found, _ = read_places(saved.arrays(), model.make_cache(), [place.position for place in places])
    blank = model.make_cache()
    grows = [i for i, layer in enumerate(blank.layers) if not layer.nbytes]
    columns = [sum(layer.nbytes for layer in (cache.layers[i] for i in grows)) for cache in found]
    assert len(set(columns)) == 1
    arrays = {id(array) for cache in found for i in grows for array in cache.layers[i].arrays()}
    assert len(arrays) == sum(len(blank.layers[i].arrays()) for i in grows)
    names = saved.header().entries
    assert {name for name in names if name.endswith("keys")} == {f"layers.{i}.keys" for i in grows}


def test_each_place_goes_on_by_itself(model, places, saved):
    found, _ = read_places(saved.arrays(), model.make_cache(), [place.position for place in places])
    tokens = mx.array([[5, 9, 2]])
    expected = [model(tokens, place.copy()) for place in places]
    for cache, logits in reversed(list(zip(found, expected, strict=True))):
        assert mx.array_equal(model(tokens, cache), logits)


def test_the_deepest_place_goes_on_in_the_memory_into_which_it_was_read(model, places, saved):
    (*_, cache), _ = read_places(saved.arrays(), model.make_cache(), [place.position for place in places])
    before = cache.nbytes
    cache.reserve(ROOM)
    assert cache.nbytes == before
    cache.reserve(ROOM + 256)
    assert cache.nbytes > before


def test_no_places_are_no_arrays(model):
    assert session_arrays([], model.make_cache()) == {}
    assert read_places(iter(()), model.make_cache(), []) == ([], {})


def test_arrays_that_do_not_fit_are_named(model, saved):
    blank, entries = model.make_cache(), saved.header().entries
    assert misfits(entries, blank, LENGTHS) == []
    keys = next(name for name in entries if name.endswith("keys"))
    assert keys in misfits(entries, blank, [*LENGTHS[:-1], 301])
    assert all(name.startswith("marks.1.") for name in misfits(entries, blank, LENGTHS[1:]))
    assert misfits(entries, blank, LENGTHS[1:])
    assert misfits({name: entry for name, entry in entries.items() if name != keys}, blank, LENGTHS) == [keys]
