"""The file of a session: whole or absent, one process at a time, and any damage is told."""

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from refusing import refused

from mlx_qwen35.cache import session_file
from mlx_qwen35.cache.session_file import SessionFile

NOTE = 'é"}{"checksum": "0'


def arrays(seed: int = 0) -> dict[str, mx.array]:
    """Arrays of every dtype, some of them views, one empty."""
    wide = mx.random.normal((1, 3, 50, 8), key=mx.random.key(seed))
    halves = [mx.float32, mx.float16, mx.bfloat16]
    return {
        **{f"a{i}": wide[:, :, : 7 + i].astype(dtype) for i, dtype in enumerate(halves)},
        "view": wide[:, :, 3:40], "tokens": mx.arange(seed, seed + 9, dtype=mx.uint32), "none": mx.zeros((1, 2, 0, 3)),
        "bytes": mx.arange(5).astype(mx.uint8), "words": mx.array([2**32 - 1, seed], mx.uint32),
    }  # fmt: skip


def bits(array: mx.array) -> tuple:
    return array.dtype, array.shape, np.array(mx.view(array.flatten(), mx.uint8)).tobytes()


def assert_holds(path: Path, seed: int) -> None:
    file = SessionFile(path)
    found = {name: bits(array) for name, array in file.arrays()}
    file.close()
    assert found == {name: bits(array) for name, array in arrays(seed).items()}
    assert list(found) == list(arrays(seed))


def assert_refused(path: Path, *facts: str) -> None:
    """Reading it is refused, and it is left as it is."""
    before, file = path.read_bytes(), SessionFile(path)
    with refused("session_invalid", path, *facts):
        dict(file.arrays())
    file.close()
    assert path.read_bytes() == before


def save(path: Path, seed: int = 0) -> Path:
    file = SessionFile(path)
    assert file.write({"note": NOTE}, arrays(seed)) == path.stat().st_size
    file.close()
    return path


@pytest.fixture
def saved(tmp_path) -> Path:
    return save(tmp_path / "talk")  # nothing is appended to its name


def test_a_file_gives_back_what_was_written_bit_by_bit(saved):
    assert_holds(saved, 0)
    file = SessionFile(saved)
    assert file.header().metadata["note"] == NOTE
    file.close()
    assert os.listdir(saved.parent) == ["talk"]


def test_other_programs_read_it(saved):
    from safetensors.numpy import load

    loaded = mx.load(str(saved), format="safetensors")
    assert {name: bits(array) for name, array in loaded.items()} == {n: bits(a) for n, a in arrays().items()}
    half = {name: a for name, a in arrays().items() if a.dtype != mx.bfloat16}
    file = SessionFile(saved)
    file.write({}, half)
    file.close()
    assert set(load(saved.read_bytes())) == set(half)


def test_large_arrays_are_written_in_pieces(saved, monkeypatch):
    monkeypatch.setattr(session_file, "PIECE", 100)
    before = saved.read_bytes()
    assert save(saved).read_bytes() == before
    assert_holds(saved, 0)


def test_a_link_stays_one(saved):
    link = saved.with_name("link")
    link.symlink_to(saved)
    save(link, 1)
    assert link.is_symlink()
    assert_holds(saved, 1)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["length", "header", "data"])
def test_a_flipped_bit_is_told_wherever_it_is(saved, part):
    whole = saved.read_bytes()
    data = 8 + struct.unpack("<Q", whole[:8])[0]
    span = {"length": range(8), "header": range(8, data, 17), "data": range(data, len(whole), 293)}[part]
    for place in span:
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert_refused(saved)


def test_a_file_that_was_cut_is_told_to_be_truncated(saved):
    whole = saved.read_bytes()
    for cut in sorted({0, 1, 7, 8, 9, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 50)}):
        saved.write_bytes(whole[:cut])
        assert_refused(saved, "truncated")
    saved.write_bytes(whole + b"\0")
    assert_refused(saved, "bytes were added")


def rewritten(path: Path, **metadata: str) -> Path:
    """The file with other metadata, and no other change."""
    whole = path.read_bytes()
    data = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:data])
    header["__metadata__"] |= metadata
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[data:])
    return path


@pytest.mark.parametrize(
    "change", [{"format": "mlx_lm.cache"}, {"version": "2"}, {"note": "other"}, {"checksum": "0" * 64}]
)
def test_changed_metadata_is_told_by_its_name(saved, change):
    (name,) = change
    assert_refused(rewritten(saved, **change), "checksum" if name == "note" else name)


def test_another_kind_of_file_is_told(saved):
    for other in (b"hello, this is a text", b'{"messages": [{"role": "user"}]}', b"\x89PNG\r\n\x1a\n" + bytes(100)):
        saved.write_bytes(other)
        assert_refused(saved, "it is none")
    mx.save_safetensors(str(saved.with_suffix(".safetensors")), {"weight": mx.zeros(3)}, {"format": "mlx"})
    assert_refused(saved.with_suffix(".safetensors"), "'format'", "mlx")
    with refused("session_invalid", saved.parent):
        SessionFile(saved.parent)


def test_a_file_needs_a_name():
    for nothing in ("", Path(""), None, 3):
        with refused("session_invalid", "name"):
            SessionFile(nothing)


def test_a_name_is_taken_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    SessionFile("~/talk.v1").write({}, {})
    assert (tmp_path / "~" / "talk.v1").exists()


# --- writing ---------------------------------------------------------------------------------------------------------


def test_one_process_at_a_time_uses_a_file(saved, tmp_path):
    for path in (saved, tmp_path / "absent"):
        first = SessionFile(path)
        with refused("session_busy", path):
            SessionFile(path)
        first.write({}, arrays())
        with refused("session_busy", path):  # it has another file's place now
            SessionFile(path)
        first.close()
        SessionFile(path).close()


def test_a_file_that_is_not_written_leaves_nothing(tmp_path):
    SessionFile(tmp_path / "talk").close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, there, error):
    path = tmp_path / "talk"
    if there:
        save(path)
    file = SessionFile(path)

    def fails(*given):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with refused("output_unwritable", path) if isinstance(error, OSError) else pytest.raises(KeyboardInterrupt):
            file.write({}, arrays(1))
    assert path.exists() == there
    file.write({"note": NOTE}, arrays(2))  # it can go on
    file.close()
    assert_holds(path, 2)
    assert os.listdir(tmp_path) == ["talk"]


def test_a_full_disk_is_told_before_anything_is_written(saved, monkeypatch):
    monkeypatch.setattr(session_file.shutil, "disk_usage", lambda path: session_file.shutil._ntuple_diskusage(9, 9, 9))
    file = SessionFile(saved)
    with refused("disk_full", saved):
        file.write({}, arrays(1))
    file.close()
    assert_holds(saved, 0)


def test_a_file_that_was_removed_is_written_again(saved):
    for seed in (1, 2):
        file = SessionFile(saved)
        saved.unlink()
        file.write({}, arrays(seed))
        with refused("session_busy"):
            SessionFile(saved)
        file.close()
        assert_holds(saved, seed)


def test_a_file_that_was_removed_and_begun_anew_belongs_to_the_one_who_did(saved):
    file = SessionFile(saved)
    saved.unlink()
    other = SessionFile(saved)
    with refused("session_busy", saved):
        file.write({}, arrays(1))
    file.close()  # the other's hidden file stays
    other.write({}, arrays(2))
    other.close()
    assert_holds(saved, 2)


@pytest.mark.parametrize("there", [True, False])
def test_a_file_that_appeared_meanwhile_is_not_written_over(tmp_path, there):
    path = tmp_path / "talk"
    if there:
        save(path)
    file = SessionFile(path)
    path.unlink(missing_ok=True)
    path.write_text("another program's")
    with refused("output_unwritable", path, "appeared"):
        file.write({}, arrays(1))
    assert path.read_text() == "another program's"
    path.unlink()
    file.write({}, arrays(2))
    file.close()
    assert_holds(path, 2)
    assert os.listdir(tmp_path) == ["talk"]


@pytest.mark.parametrize("name", ["talk", "t" * 250])
def test_a_file_that_cannot_be_written_is_told_when_it_is_opened(tmp_path, name):
    path = save(tmp_path / "saved").rename(tmp_path / name)
    if name == "talk":  # nor can a folder without write permission have a hidden file, except that of an administrator
        (tmp_path / ".talk.saving").mkdir()
    with refused("output_unwritable", path):
        SessionFile(path)


@pytest.mark.parametrize("leftover", [True, False])
def test_a_session_that_is_read_leaves_no_hidden_file(saved, leftover):
    if leftover:  # by a process that was killed
        saved.with_name(".talk.saving").write_bytes(b"half")
    SessionFile(saved).close()
    assert os.listdir(saved.parent) == ["talk"]


def test_a_file_keeps_its_permissions(tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    path = save(tmp_path / "talk")
    assert path.stat().st_mode == usual.stat().st_mode
    for mode in (0o600, 0o664):
        path.chmod(mode)
        assert save(path).stat().st_mode & 0o777 == mode


def test_a_file_is_flushed_out_of_the_drives_own_cache_where_that_is_a_command_of_its_own(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(session_file.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(session_file.fcntl, "fcntl", lambda file, command: flushed.append(command))
    save(tmp_path / "talk")
    assert flushed == [51, 51]  # the file and its folder


def test_a_folder_that_is_absent_is_told(tmp_path):
    with refused("output_unwritable", tmp_path / "no" / "talk"):
        SessionFile(tmp_path / "no" / "talk")


# Forks before MLX has computed anything; each child writes without end, until it is killed.
KILLED = """
import os, random, shutil, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_session_file import save
path, kept, times = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
for number in range(times):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, b".")
        for seed in range(10_000):
            save(path, seed % 4)
    os.read(read, 1)
    time.sleep(random.Random(number).uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if path.exists():
        shutil.copyfile(path, kept / str(number))
"""


@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.full)])
def test_a_process_killed_while_it_saves_leaves_the_old_file_or_the_new_one(tmp_path, times):
    kept = tmp_path / "kept"
    kept.mkdir()
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED, tests, str(save(tmp_path / "talk", 3)), str(kept), str(times)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), tests])}
    subprocess.run(command, check=True, timeout=100, env=environment)
    assert len(list(kept.iterdir())) == times
    for file in kept.iterdir():
        held = SessionFile(file)
        seed = int(dict(held.arrays())["tokens"][0].item())
        held.close()
        assert_holds(file, seed)
    save(tmp_path / "talk", 1)  # what the killed left is in nobody's way
    assert_holds(tmp_path / "talk", 1)
