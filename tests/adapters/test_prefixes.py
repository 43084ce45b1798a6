"""What one adapter has read is of use to it alone: in libraries, in folders, in sessions, under whatever name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapters.by_hand import made, nano_with
from refusing import refused

from mlx_qwen35 import Conversation, Session, generate
from mlx_qwen35.cache.prefix import PrefixLibrary
from mlx_qwen35.cache.prefix_files import COLUMNS, PrefixFiles
from mlx_qwen35.cache.prefix_places import Places
from mlx_qwen35.cache.prefix_tokens import Prefix
from mlx_qwen35.cache.session_file import SessionFile
from mlx_qwen35.engine.session_record import identity

ASK = "What is 34 + 58?"
OPTIONS = {"temp": 0, "max_tokens": 8, "enable_thinking": False}
NAMES = ("base", "a", "b")
READ = Prefix(np.arange(2, 12, dtype=np.int32), adapter="a")


@pytest.fixture(scope="module")
def nano():
    return nano_with(a=made(1), b=made(2))


@pytest.fixture(scope="module")
def renamed():
    """The same adapters after a restart: in another order, under other names."""
    return nano_with(b=made(1), other=made(2))


def asked(nano, library, name) -> tuple[tuple[int, ...], int]:
    """The tokens of an answer, and how many of its prompt were not read again."""
    result = generate(*nano, ASK, adapter=name, library=library, **OPTIONS)
    return result.tokens, result.cached_tokens


# --- prefixes and libraries -------------------------------------------------------------------------------------------


def test_prefixes_of_two_adapters_share_nothing():
    other = Prefix(READ.tokens, adapter="b")
    assert READ.shared(other) == 0 and not READ.begins(other) and not READ.same(other)
    assert READ.upto(4).begins(READ) and READ.upto(4).shared(READ) == 4
    assert not READ.upto(4).begins(other) and not Prefix(READ.tokens[:4]).begins(READ)


@pytest.mark.core(1)
@pytest.mark.parametrize("order", [*permutations(NAMES)])
def test_in_any_order_each_adapter_goes_on_from_what_it_has_read_itself(nano, order):
    library = nano[0].make_library()
    cold = {name: asked(nano, library, name) for name in order}
    warm = {name: asked(nano, library, name) for name in order}
    assert [cold[name][1] for name in order] == [0, 0, 0]
    assert all(warm[name][1] > 0 and warm[name][0] == cold[name][0] for name in order)
    assert len({tokens for tokens, _ in cold.values()}) == 3


def test_a_snapshot_of_another_adapter_is_not_stored(nano):
    library, cache = nano[0].make_library(), nano[0].make_cache(adapter="b")
    mx.eval(nano[0].hidden(mx.array([READ.tokens.tolist()]), cache))
    with refused("snapshot_foreign", "adapter b"):
        library.store(READ, cache.snapshot(), "turn")


# --- folders ----------------------------------------------------------------------------------------------------------


@contextmanager
def folder(path: Path, nano) -> Iterator[PrefixLibrary]:
    """A library of a process that keeps prefixes in a folder."""
    library, told = nano[0].make_library(), []
    files = PrefixFiles(path, identity(*nano), tell=told.append)
    files.attach(library)
    try:
        yield library
    finally:
        files.close()
    assert told == []


def recalled(nano, library, name) -> tuple[tuple[int, ...], int]:
    """As `asked`, of a library that may have the beginning of the prompt in its folder."""
    prompt = nano[1].encode_messages([{"role": "user", "content": ASK}], enable_thinking=False)
    library.recall(Prefix(np.array(prompt.tokens, np.int32), adapter="" if name == "base" else name))
    return asked(nano, library, name)


@pytest.mark.core(1)
@pytest.mark.parametrize("order", [NAMES, ("b", "base", "a")])
def test_after_a_restart_each_adapter_finds_its_own_whatever_its_name(nano, renamed, tmp_path, order):
    with folder(tmp_path, nano) as library:
        cold = {name: recalled(nano, library, name) for name in order}
        assert [read for _, read in cold.values()] == [0, 0, 0]
    with folder(tmp_path, renamed) as library:
        for name, before in (("other", "b"), ("base", "base"), ("b", "a")):
            tokens, read = recalled(renamed, library, name)
            assert tokens == cold[before][0] and read > 0


@pytest.mark.core(1)
@pytest.mark.parametrize("first", ["a", "base"])
def test_a_folder_gives_nothing_to_another_adapter(nano, renamed, tmp_path, first):
    with folder(tmp_path, nano) as library:
        recalled(nano, library, first)
    with folder(tmp_path, renamed) as library:
        others = {"a": ("base", "other"), "base": ("b", "other")}[first]
        assert [recalled(renamed, library, name)[1] for name in others] == [0, 0]


@pytest.mark.full
def test_files_of_before_there_were_adapters_are_of_none(nano, tmp_path):
    with folder(tmp_path, nano) as library:
        cold = recalled(nano, library, "base")
    for path in tmp_path.glob(f"*{COLUMNS}"):
        rewrite(path, lambda metadata: metadata.pop("adapter"))
    with folder(tmp_path, nano) as library:
        tokens, read = recalled(nano, library, "base")
        assert tokens == cold[0] and read > 0
        assert recalled(nano, library, "a")[1] == 0


def test_places_of_two_adapters_have_two_keys_and_none_the_one_that_it_always_had():
    places = Places({"fingerprint": "of a model"})
    keys = [places.key(Prefix(READ.tokens, adapter=name)) for name in ("", "one", "two")]
    assert len(set(keys)) == 3
    header = {"parent": '""', "media": "[]", "tokens": json.dumps(READ.tokens.tolist())}
    places.add(keys[0], header, tmp_stat())
    assert places.path(Prefix(READ.tokens, adapter="one")) == []
    with pytest.raises(ValueError, match="written with"):
        places.add(keys[1], header, tmp_stat())


def tmp_stat():
    return Path(__file__).stat()


def rewrite(path: Path, change) -> None:
    """Write a file of a session or a prefix anew, its metadata changed."""
    file = SessionFile(path)
    metadata = dict(file.header().metadata)
    arrays = dict(file.arrays())
    change(metadata)
    for name in ("checksum", "format", "version"):
        del metadata[name]
    file.write(metadata, arrays)
    file.close()


# --- sessions ---------------------------------------------------------------------------------------------------------


def saved(path: Path, nano, **options) -> tuple[int, ...]:
    """Have a session ask, and save it; the tokens of its answer."""
    with Session.load(path, *nano, **OPTIONS, **options) as session:
        turn = session.conversation.send(ASK)
        assert turn.text
        session.save()
    return turn.result.tokens


def test_a_session_goes_on_with_its_adapter_whatever_its_name(nano, renamed, tmp_path):
    saved(tmp_path / "talk", nano, adapter="a")
    with Session.load(tmp_path / "talk", *renamed, adapter="b", **OPTIONS) as session:
        turn = session.conversation.send("Add 10 to that.")
        assert session.tokens > 0 and turn.text and turn.reused > 0
        cold = generate(*renamed, messages=session.conversation.messages[:-1], adapter="b", **OPTIONS)
        assert turn.result.tokens == cold.tokens


@pytest.mark.core(2)
@pytest.mark.parametrize(
    ("own", "other", "told"),
    [("a", "b", "(a)"), ("a", None, "(a)"), (None, "a", "adapter base"), ("base", "b", "adapter base")],
)
def test_a_session_of_another_adapter_is_refused_and_stays(nano, tmp_path, own, other, told):
    path = tmp_path / "talk"
    saved(path, nano, adapter=own)
    before = path.read_bytes()
    with refused("session_foreign", "'adapter'", told):
        Session.load(path, *nano, adapter=other)
    assert path.read_bytes() == before


@pytest.mark.full
def test_a_session_of_an_adapter_that_is_not_loaded_is_refused(nano, tmp_path):
    saved(tmp_path / "talk", nano, adapter="a")
    with refused("session_foreign", "not loaded", made(1).fingerprint[:12]):
        Session.load(tmp_path / "talk", *nano_with(a=made(2)), adapter="a")


def test_a_session_of_before_there_were_adapters_is_of_none(nano, tmp_path):
    path = tmp_path / "talk"
    saved(path, nano)
    rewrite(path, lambda metadata: metadata.pop("adapter"))
    with refused("session_foreign"):
        Session.load(path, *nano, adapter="a")
    with Session.load(path, *nano, **OPTIONS) as session:
        assert session.tokens > 0


@pytest.mark.full
def test_a_session_that_took_another_adapter_is_of_that_one(nano, tmp_path):
    path = tmp_path / "talk"
    with Session.load(path, *nano, adapter="a", **OPTIONS) as session:
        assert session.conversation.send(ASK).text
        session.save()
        session.conversation.change(adapter="b")
        assert session.changed
        session.save()
    with refused("session_foreign", "(b)"):
        Session.load(path, *nano, adapter="a")
    with Session.load(path, *nano, adapter="b", **OPTIONS) as session:
        assert session.tokens == 0 and len(session.conversation.messages) == 2
        again = session.conversation.regenerate()
        assert again.text and again.result.tokens == generate(*nano, ASK, adapter="b", **OPTIONS).tokens


def test_a_session_that_takes_another_adapter_has_changed(nano, tmp_path):
    with Session.load(tmp_path / "talk", *nano, **OPTIONS) as session:
        session.save()
        session.conversation.change(adapter="b")
        assert session.changed


@pytest.mark.full
def test_undo_keeps_what_the_adapter_has_read(nano):
    conversation = Conversation(*nano, adapter="a", **OPTIONS)
    for question in (ASK, "Add 10 to that."):
        assert conversation.send(question).text
    conversation.undo()
    assert conversation.entries and all(entry.prefix.adapter == "a" for entry in conversation.entries)
