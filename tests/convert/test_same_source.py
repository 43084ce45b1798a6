"""--resume knows a source by what was read of it, and a journal by what can have been written."""

import json
import os
import shutil

import pytest
from converting import converted, files_of
from refusing import refused

from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.convert import stream
from mlx_qwen35.convert.journal import JOURNAL
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import StorageOptions

OPTIONS = {"quantize": True, "rounding": "nearest"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 100_000)
    monkeypatch.setattr(stream, "BATCH_BYTES", 1_000_000)


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("same") / "raw", geometry("tiny"), vision=False, mtp=False)


def break_off(source, work, verify=True):
    """Half of a conversion, as a killed process leaves it."""
    work.mkdir()
    stream.write(make_plan(source, StorageOptions(**OPTIONS)), work, verify=verify)
    lines = (work / JOURNAL).read_bytes().splitlines(keepends=True)
    (work / JOURNAL).write_bytes(b"".join(lines[: len(lines) // 2]))
    for file in work.glob("*.json"):
        file.unlink()


@pytest.fixture(scope="module")
def killed(master, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stream, "CHUNK_BYTES", 100_000)
        work = tmp_path_factory.mktemp("killed") / "work"
        break_off(master, work)
        return work


@pytest.fixture
def begun(killed, master, tmp_path):
    """A source of its own and the hidden folder of its conversion to tmp_path / "out"."""
    source = shutil.copytree(master, tmp_path / "raw")
    return source, shutil.copytree(killed, tmp_path / ".out.converting")


def test_a_source_of_other_times_in_another_place_is_the_same(begun, master, tmp_path, capfd):
    source, _ = begun
    for file in source.iterdir():
        os.utime(file, ns=(1, 1))
    source.rename(tmp_path / "moved")
    converted(tmp_path / "moved", tmp_path / "out", resume=True, **OPTIONS)
    assert "resuming: " in capfd.readouterr().err
    converted(master, tmp_path / "whole", **OPTIONS)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("verify", [True, False])
def test_a_source_changed_in_what_was_read_is_another_though_size_and_time_are_the_same(master, tmp_path, verify):
    source, work = shutil.copytree(master, tmp_path / "raw"), tmp_path / ".out.converting"
    break_off(source, work, verify)
    first = make_plan(source, StorageOptions(**OPTIONS)).jobs[0].source.parts[0]
    file, status = first.file, first.file.stat()
    with file.open("r+b") as weights:
        weights.seek(first.start)
        weights.write(bytes(100))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = files_of(work)
    with refused("resume_differs", "the source changed"):
        converted(source, tmp_path / "out", resume=True, verify=verify, **OPTIONS)
    assert files_of(work) == before


def test_another_config_is_another_source(begun, tmp_path):
    source, _ = begun
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"initializer_range": 0.5}))
    with refused("resume_differs", "the source changed"):
        converted(source, tmp_path / "out", resume=True, **OPTIONS)


def test_float16_is_looked_at_again(master, tmp_path, capfd):
    """Which tensors float16 cannot hold was found in a source that may have changed since."""
    work = tmp_path / ".out.converting"
    work.mkdir()
    stream.write(make_plan(master, StorageOptions(dtype="float16")), work)
    lines = (work / JOURNAL).read_text().splitlines(keepends=True)
    kept = json.dumps({"kept": {"model.language_model.norm.weight": "too large"}}) + "\n"
    (work / JOURNAL).write_text(lines[0] + kept)
    with refused("resume_differs", "the source changed"):
        converted(master, tmp_path / "out", resume=True, dtype="float16")


def test_chunks_whose_file_was_gone_are_forgotten_for_good(begun, master, tmp_path):
    """Else a second kill would leave a file of zeros that the journal of the first takes for written."""
    source, work = begun
    next(work.glob("*.safetensors")).unlink()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):

        def interrupt(*_):
            raise KeyboardInterrupt

        patched.setattr(os, "pread", interrupt)
        stream.write(make_plan(source, StorageOptions(**OPTIONS)), work)
    assert '"chunk"' not in (work / JOURNAL).read_text()


# --- the journal -----------------------------------------------------------------------------------------------------

DAMAGE = {
    "garbage": b"garbage\n",
    "not UTF-8": b'{"chunk": "\xff\xfe"}\n',
    "zeros": bytes(64) + b"\n",
    "a list": b"[1]\n",
    "an empty line": b"\n",
    "a field missing": b'{"chunk": 1}\n',
    "a field too many": b'{"chunk": 1, "source": "", "more": 1}\n',
    "a chunk that is text": b'{"chunk": "1", "source": ""}\n',
    "a chunk that is true": b'{"chunk": true, "source": ""}\n',
    "a negative chunk": b'{"chunk": -1, "source": ""}\n',
    "a chunk that is not there": b'{"chunk": 1000000000000, "source": "", "checksums": [1], "difference": [0, 0, 0]}\n',
    "a number of 5,000 digits": b'{"chunk": ' + b"9" * 5000 + b', "source": ""}\n',
    "a checksum missing": b'{"chunk": 1, "source": "", "checksums": [], "difference": [0, 0, 0]}\n',
    "checksums that are none": b'{"chunk": 1, "source": "", "checksums": [null], "difference": [0, 0, 0]}\n',
    "a negative error": b'{"chunk": 1, "source": "", "checksums": [1], "difference": [-1, 0, 0]}\n',
    "an error that is no number": b'{"chunk": 1, "source": "", "checksums": [1], "difference": [NaN, 0, 0]}\n',
    "two errors": b'{"chunk": 1, "source": "", "checksums": [1], "difference": [0, 0]}\n',
    "a digest that is none": b'{"chunk": 1, "source": 5}\n',
    "reasons that are none": b'{"kept": {"a": 1}}\n',
    "a second first line": b'{"source": "", "options": "", "programs": ""}\n',
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_journal_is_refused_and_stays(begun, tmp_path, damage):
    source, work = begun
    with (work / JOURNAL).open("ab") as journal:
        journal.write(damage)
    before = files_of(work)
    with refused("journal_damaged", work / JOURNAL):
        converted(source, tmp_path / "out", resume=True, **OPTIONS)
    assert files_of(work) == before


@pytest.mark.parametrize("damage", [b"\xff\n", b"{}\n", b'{"chunk": 0, "source": ""}\n', b'{"source": 1}\n'])
def test_a_journal_whose_first_line_is_damaged_is_refused(begun, tmp_path, damage):
    source, work = begun
    lines = (work / JOURNAL).read_bytes().split(b"\n", 1)
    (work / JOURNAL).write_bytes(damage + lines[1])
    with refused("journal_damaged", work / JOURNAL, "line 1"):
        converted(source, tmp_path / "out", resume=True, **OPTIONS)


def test_a_journal_of_another_version_is_not_called_damaged(begun, tmp_path):
    source, work = begun
    first, _ = (work / JOURNAL).read_text().split("\n", 1)
    other = json.dumps(json.loads(first) | {"programs": "mlx-qwen35 9.9"})
    (work / JOURNAL).write_text(f'{other}\n{{"of": "another kind"}}\n')
    with refused("resume_differs", "9.9"):
        converted(source, tmp_path / "out", resume=True, **OPTIONS)


def test_without_resume_a_damaged_journal_goes(begun, tmp_path):
    source, work = begun
    (work / JOURNAL).write_bytes(b"\xff\n")
    converted(source, tmp_path / "out", **OPTIONS)
    assert not work.exists()
