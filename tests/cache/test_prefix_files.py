"""A folder of prefixes: what one process has read another goes on with, bit for bit; what is damaged is read again."""

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from refusing import refused

from mlx_qwen35.cache.prefix import QUERY, READING, SYSTEM, TURN, Entry, PrefixLibrary
from mlx_qwen35.cache.prefix_files import COLUMNS, STATES, PrefixFiles
from mlx_qwen35.cache.prefix_folder import ASIDE
from mlx_qwen35.cache.prefix_places import UNFIT, Place, Places
from mlx_qwen35.cache.prefix_tokens import Prefix, Shown
from mlx_qwen35.cache.session_file import SessionFile, Taken
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import load
from mlx_qwen35.machine.process import LOCK
from mlx_qwen35.model.model import Model

IDENTITY = {"fingerprint": "of this model", "dtype": "float32"}
PROMPT = Prefix(np.arange(2, 42, dtype=np.int32))
ENTRY = {8: SYSTEM, 16: QUERY, 24: TURN}  # where PROMPT is stored


@pytest.fixture(scope="module")
def model(text_model) -> Model:
    return text_model()


@contextmanager
def files(folder: Path, model: Model, **options) -> Iterator[tuple[PrefixLibrary, PrefixFiles, list[str]]]:
    """A library of 0.1 GB with a folder behind it, and what that has told."""
    told: list[str] = []
    library = model.make_library(0.1)
    behind = PrefixFiles(folder, **{"identity": IDENTITY, "tell": told.append} | options)
    try:
        behind.attach(library)
        yield library, behind, told
    finally:
        behind.close()


def read(model: Model, library: PrefixLibrary, prefix: Prefix, places: dict[int, str]) -> mx.array:
    """Read a prompt from where the library or its folder has it, stored at these places; its last hidden state."""
    library.recall(prefix)
    cache, use = library.begin(prefix)
    for start, stop in pairwise([use.reused, *(n for n in places if n > use.reused), len(prefix)]):
        hidden = model.hidden(mx.array([prefix.tokens[start:stop].tolist()]), cache)[:, -1]
        mx.eval(hidden)
        use.read(cache, stop - start, places.get(stop))
    use.close()
    return hidden


def numbers(array: mx.array) -> bytes:
    return np.array(array).tobytes()


def names(folder: Path) -> list[str]:
    """The kinds of the files that are there."""
    return sorted("." + path.name.partition(".")[2] for path in folder.iterdir())


def killed(folder: Path) -> Path:
    """The folder as a process leaves it that is killed now."""
    return shutil.copytree(folder, folder.with_name(f"{folder.name} then"))


@pytest.mark.parametrize("kv", [None, pytest.param("8/4", marks=pytest.mark.full)])
def test_another_process_goes_on_with_the_same_bits(tmp_path, model, kv):
    model = load("nano", kv_bits=kv)[0] if kv else model
    with files(tmp_path / "a", model) as (library, behind, _):
        cold = read(model, library, PROMPT, ENTRY)
        behind.flush()
        then = killed(tmp_path / "a")
    for folder in (tmp_path / "a", then):
        with files(folder, model) as (library, behind, told):
            assert behind.lengths() == [8, 16, 24] and not library.entries()
            assert numbers(read(model, library, PROMPT, ENTRY)) == numbers(cold)
            assert library.counts.reused == 24 and not told
            other = Prefix(np.concatenate([PROMPT.tokens[:20], PROMPT.tokens[:9]]))
            warm = read(model, library, other, {})
            assert library.counts.reused == 24 + 16
            whole = model.make_cache()
            for start, stop in pairwise([0, 8, 16, 29]):
                alone = model.hidden(mx.array([other.tokens[start:stop].tolist()]), whole)[:, -1]
            assert numbers(warm) == numbers(alone)


def test_images_are_told_apart_by_their_pixels(tmp_path, model):
    def shows(digest: str) -> Prefix:
        return Prefix(PROMPT.tokens, (Shown(digest, ((2, 1, 3),)),))

    for digest in ("one", "two"):
        with files(tmp_path, model) as (library, _, _):
            read(model, library, shows(digest), {8: TURN})
            assert library.counts.reused == 0
    for digest, reused in (("one", 8), ("two", 8), ("three", 0)):
        with files(tmp_path, model) as (library, _, _):
            library.recall(shows(digest))
            assert library.reusable(shows(digest)) == reused


def test_no_column_is_written_twice_and_a_turn_that_has_gone_on_gives_its_states_back(tmp_path, model):
    with files(tmp_path, model) as (library, behind, _):
        cache, use = library.begin(PROMPT)
        for stop in range(8, 40, 8):
            mx.eval(model.hidden(mx.array([PROMPT.tokens[stop - 8 : stop].tolist()]), cache))
            use.store(cache, SYSTEM if stop == 8 else TURN)
        behind.flush()
        assert behind.lengths() == [8, 32] and names(tmp_path).count(STATES) == 2
        columns = sum(path.stat().st_size for path in tmp_path.glob(f"*{COLUMNS}"))
        token = sum(a.nbytes for name, a in cache.arrays().items() if "keys" in name or "values" in name) // 32
        assert 32 * token <= columns < 32 * token + 4 * 6000  # and headers
        del cache
        use.close()
        library.clear()
        read(model, library, PROMPT, {})
        assert library.counts.reused == 32


def test_the_engine_waits_for_no_disk(tmp_path, model, monkeypatch):
    go, write = threading.Event(), SessionFile.write
    monkeypatch.setattr(SessionFile, "write", lambda *given: go.wait(30) and write(*given))
    with files(tmp_path, model) as (library, behind, _):
        read(model, library, PROMPT, ENTRY)
        assert behind.pending > 0 and not behind.lengths()
        go.set()
        behind.flush()
        assert behind.pending == 0 and behind.lengths() == [8, 16, 24]


def test_where_the_disk_is_too_slow_the_end_makes_up_for_it(tmp_path, model, monkeypatch):
    go, write = threading.Event(), SessionFile.write
    monkeypatch.setattr(SessionFile, "write", lambda *given: go.wait(30) and write(*given))
    with files(tmp_path, model, memory=1) as (library, behind, _):
        read(model, library, PROMPT, ENTRY)
        go.set()
        behind.flush()
        assert not behind.lengths()
        behind.memory = 10**9
    with files(tmp_path, model) as (_, behind, _):
        assert behind.lengths() == [8, 16, 24]


def test_a_disk_without_room_is_told_of_and_ends_no_request(tmp_path, model, monkeypatch):
    def full(*_):
        raise InputError("disk_full", "the disk has 0.00 GB free")

    with monkeypatch.context() as patch:
        patch.setattr(SessionFile, "write", full)
        with files(tmp_path, model) as (library, behind, told):
            read(model, library, PROMPT, ENTRY)
            behind.flush()
            assert library.reusable(PROMPT) == 24 and behind.pending == 0 == behind.nbytes
            assert all("0.00 GB" in line for line in told) and told
            patch.undo()
    with files(tmp_path, model) as (_, behind, _):
        assert behind.lengths() == [8, 16, 24]


@pytest.mark.parametrize(("taken", "gone"), [(24, 16), (16, 24)])
def test_a_place_that_another_goes_on_from_may_go_while_that_one_is_copied(tmp_path, model, monkeypatch, taken, gone):
    take, dropped = Taken.of, []
    with files(tmp_path, model) as (library, behind, _):
        read(model, library, PROMPT, ENTRY)
        entries = {len(entry.prefix): entry for entry in library.entries()}

        def drop(length: int) -> None:
            behind.drop(entries[length])
            behind.flush()

        def meanwhile(array: mx.array) -> Taken:
            dropped or drop(gone)
            dropped.append(gone)
            return take(array)

        drop(taken)
        monkeypatch.setattr(Taken, "of", meanwhile)
        behind.take(entries[taken])
        behind.flush()
        assert dropped and behind.lengths() == [8]
        library.clear()
        read(model, library, PROMPT, {})
        assert library.counts.reused == 8


def test_no_more_is_recalled_than_a_library_may_hold(tmp_path, model):
    with files(tmp_path, model) as (library, behind, _):
        read(model, library, PROMPT, ENTRY)
        behind.flush()
        library.clear()
        library.memory = 1
        library.recall(PROMPT)
        assert not library.entries()


def test_what_no_prompt_begins_with_any_more_goes_first(tmp_path, model):
    prompts = [Prefix(PROMPT.tokens[start:]) for start in range(6)]
    with files(tmp_path, model) as (library, behind, _):
        cache = model.make_cache()
        mx.eval(model.hidden(mx.array([[2, 3, 4]]), cache))
        for number in (0, 1, 2, 3, 4, 0, 5, 0):
            _, use = library.begin(prompts[number])
            if not use.reused:
                library.store(prompts[number].upto(3), cache.snapshot(), SYSTEM)
            use.close()
            behind.flush()
            behind.memory = 11 * behind.nbytes // (2 * len(behind.lengths()))
        assert [i for i, prefix in enumerate(prompts) if behind.places.path(prefix)] == [0, 2, 3, 4, 5]
        most = behind.nbytes // 4
    with files(tmp_path, model, memory=most) as (_, behind, _):
        assert [i for i, prefix in enumerate(prompts) if behind.places.path(prefix)] == [0]


def test_one_thread_at_a_time_uses_the_model_s_arrays(tmp_path, model, monkeypatch):
    make, take, held = Model.make_cache, Taken.of, []

    def look() -> None:
        if not LOCK.acquire(blocking=False):
            held.append(True)
            return
        LOCK.release()
        held.append(False)

    def noted(way: Callable) -> Callable:
        def way_with_a_look(given, **options):
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            return way(given, **options)

        return way_with_a_look

    with files(tmp_path, model, memory=1) as (library, behind, _):
        read(model, library, PROMPT, ENTRY)
        behind.memory = 10**9
        monkeypatch.setattr(Taken, "of", noted(take))
    taken = len(held)
    with files(tmp_path, model) as (library, behind, _):
        monkeypatch.setattr(Model, "make_cache", noted(make))
        library.recall(PROMPT)
    assert 0 < taken < len(held) and all(held)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [flip, pytest.param(cut, marks=pytest.mark.full)])
@pytest.mark.parametrize(("ending", "reused"), [(STATES, 16), (COLUMNS, 16)])
def test_a_damaged_file_is_set_aside_and_the_rest_is_used(tmp_path, model, damage: Callable, ending, reused):
    with files(tmp_path, model) as (library, behind, _):
        cold = read(model, library, PROMPT, ENTRY)
        behind.flush()
        newest = max(tmp_path.glob(f"*{ending}"), key=lambda path: path.stat().st_mtime_ns)
    damage(newest)
    with files(tmp_path, model) as (library, _, told):
        assert numbers(read(model, library, PROMPT, ENTRY)) == numbers(cold)
        assert library.counts.reused == reused
        (line,) = told
        assert newest.name in line and (tmp_path / (newest.name + ASIDE)).exists()
    with files(tmp_path, model):
        assert not list(tmp_path.glob(f"*{ASIDE}"))


def test_a_header_that_names_no_adapter_is_told_as_one(tmp_path):
    header = {"parent": '""', "tokens": "[1]", "media": "[]", "adapter": "77"}
    with pytest.raises(UNFIT):
        Places({}).add("0", header, tmp_path.stat())


def test_a_file_that_cannot_be_read_for_a_time_is_kept(tmp_path, model):
    with files(tmp_path, model) as (library, behind, told):
        read(model, library, PROMPT, ENTRY)
        behind.flush()
        library.clear()
        first = tmp_path / (behind.places.path(PROMPT)[0] + COLUMNS)
        kept = first.rename(tmp_path / "kept")
        first.mkdir()
        library.recall(PROMPT)
        assert library.reusable(PROMPT) == 0 and len(told) == 3 and behind.lengths() == [8, 16, 24]
        first.rmdir()
        kept.rename(first)
        library.recall(PROMPT)
        assert library.reusable(PROMPT) == 24


def test_what_was_asked_is_for_its_owner_alone(tmp_path, model):
    with files(tmp_path, model) as (library, behind, _):
        read(model, library, PROMPT, ENTRY)
        behind.flush()
        assert len(list(tmp_path.iterdir())) == 7
        assert not any(path.stat().st_mode & 0o077 for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault", [{"tokens": "[1099511627776]"}, {"media": '[["a", []]]'}, {"tokens": "[" * 10_000 + "]" * 10_000}]
)
def test_no_header_keeps_a_server_from_its_start(tmp_path, model, fault):
    about = IDENTITY | {"parent": '""', "start": "0", "tokens": "[2, 3]", "media": "[]"} | fault
    file = SessionFile(tmp_path / f"one{COLUMNS}")
    file.write(about, {})
    file.close()
    with files(tmp_path, model) as (_, behind, told):
        assert not behind.lengths() and len(told) == 1


def test_the_end_of_a_long_chain_is_let_go_of():
    places = Places(IDENTITY)
    keys = ["", *map(str, range(sys.getrecursionlimit() + 100))]
    for parent, key in pairwise(keys):
        places[key] = Place(PROMPT, parent, 1)
    assert places.cut("1") == keys[2:] and [*places] == ["0"]


@pytest.mark.full
def test_of_a_file_that_others_go_on_from_all_is_read_again(tmp_path, model):
    with files(tmp_path, model) as (library, behind, _):
        read(model, library, PROMPT, {8: SYSTEM})
        behind.flush()
        (first,) = tmp_path.glob(f"*{COLUMNS}")
        read(model, library, PROMPT, ENTRY)
    flip(first)
    with files(tmp_path, model) as (library, behind, told):
        read(model, library, PROMPT, {})
        behind.flush()
        assert library.counts.reused == 0 and len(told) == 1 and not behind.lengths()
        assert set(names(tmp_path)) == {COLUMNS + ASIDE, ".server.saving"}


@pytest.mark.parametrize("field", ["fingerprint", pytest.param("dtype", marks=pytest.mark.full)])
def test_what_another_model_wrote_is_told_of_in_a_line_and_stays(tmp_path, model, field):
    with files(tmp_path, model) as (library, _, _):
        read(model, library, PROMPT, ENTRY)
    with files(tmp_path, model, identity=IDENTITY | {field: "another"}) as (library, behind, told):
        library.recall(PROMPT)
        assert library.reusable(PROMPT) == 0 and not behind.lengths() and behind.nbytes == 0
        (line,) = told
        assert "3" in line
    with files(tmp_path, model) as (_, behind, told):
        assert behind.lengths() == [8, 16, 24] and not told


def test_one_process_at_a_time_has_the_folder(tmp_path, model):
    with files(tmp_path, model), refused("session_busy"), files(tmp_path, model):
        pass
    with files(tmp_path, model):
        pass


def test_a_folder_that_cannot_be_is_refused(tmp_path, model):
    (tmp_path / "file").touch()
    with refused("output_unwritable"), files(tmp_path / "file" / "inside", model):
        pass


@pytest.mark.parametrize("inserts", [30, pytest.param(10_000, marks=pytest.mark.full)])
def test_the_cap_holds_and_the_lowest_kind_goes_first(tmp_path, model, inserts):
    rng, snapshots = np.random.default_rng(0), {}
    for length in (3, 5, 8):
        cache = model.make_cache()
        mx.eval(model.hidden(mx.array([list(range(2, 2 + length))]), cache))
        snapshots[length] = cache.snapshot()
    with files(tmp_path, model) as (_, behind, told):
        first = Entry(Prefix(np.full(5, 3, np.int32)), SYSTEM, snapshots[5])
        behind.take(first)
        behind.flush()
        behind.memory = 20 * behind.nbytes
        for _ in range(inserts):
            length = int(rng.choice([3, 5, 8]))
            prefix = Prefix(rng.integers(2, 90, size=length).astype(np.int32))
            behind.take(Entry(prefix, str(rng.choice([QUERY, TURN, READING])), snapshots[length]))
            behind.flush()
            assert behind.nbytes <= behind.memory
        on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert 0.8 * behind.memory < on_disk == behind.nbytes and not told
        assert 10 < len(behind.lengths()) < 25 and behind.places.path(first.prefix)
