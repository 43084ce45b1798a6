"""A killed conversion goes on, and its bytes are those of one that was not disturbed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from converting import converted, files_of
from refusing import refused

from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.convert import stream
from mlx_qwen35.convert.journal import JOURNAL, Journal, identity
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import StorageOptions

OPTIONS = {"quantize": True, "rounding": "nearest"}
CHUNK, BATCH = 30_000, 200_000
# Chunks take a while, so that a kill finds some written, some noted and some neither.
CONVERT = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from converting import converted
from mlx_qwen35.convert import stream
stream.CHUNK_BYTES, stream.BATCH_BYTES = json.loads(sys.argv[4])
write = os.pwrite
def slow(*given):
    time.sleep(0.001)
    return write(*given)
os.pwrite = slow
report = converted(Path(sys.argv[2]), Path(sys.argv[3]), resume=True, **json.loads(sys.argv[5]))
print(json.dumps({name: [error.relative, error.largest] for name, error in report.errors.items()}))
"""


def start(source, out, options=OPTIONS):
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", CONVERT, tests, str(source), str(out), json.dumps([CHUNK, BATCH])]
    return subprocess.Popen([*command, json.dumps(options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def noted(work: Path) -> int:
    """How many chunks the journal has; 0 when there is none."""
    file = work / JOURNAL
    return file.read_text().count('"chunk"') if file.is_file() else 0


def kill_after(process, work, chunks):
    """Kill a conversion once it has noted so many chunks more."""
    first, deadline = noted(work), time.monotonic() + 60
    while noted(work) < first + chunks:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture
def small(monkeypatch):
    """Chunks and batches of the size that the killed conversions have."""
    monkeypatch.setattr(stream, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(stream, "BATCH_BYTES", BATCH)


@pytest.fixture
def broken_off(raw, tmp_path, small):
    """The hidden folder of a conversion to tmp_path / "out" that was killed."""
    work = tmp_path / ".out.converting"
    kill_after(start(raw, tmp_path / "out"), work, 100)
    return work


@pytest.mark.full
@pytest.mark.parametrize("options", [OPTIONS, {"dtype": "float16"}], ids=["quantized", "float16"])
def test_run_killed_at_random_moments_ends_with_the_bytes_of_an_undisturbed_one(raw, tmp_path, small, options):
    out, work, moments = tmp_path / "out", tmp_path / ".out.converting", random.Random(1)
    counts = []
    for _ in range(4):
        process = start(raw, out, options)
        kill_after(process, work, 1)
        process = start(raw, out, options)
        kill_after(process, work, moments.randrange(10, 60))
        counts.append(noted(work))
    assert counts == sorted(set(counts))  # each went on from where the last one was
    process = start(raw, out, options)
    printed, messages = process.communicate(timeout=120)
    assert process.returncode == 0 and "resuming:" in messages
    report = converted(raw, tmp_path / "whole", **options)
    assert files_of(out) == files_of(tmp_path / "whole")
    errors = {name: [error.relative, error.largest] for name, error in report.errors.items()}
    assert json.loads(printed) == errors and any(relative for relative, _ in errors.values())


def test_resumed_run_writes_only_what_is_not_noted(raw, tmp_path, broken_off, monkeypatch):
    lines = [json.loads(line) for line in (broken_off / JOURNAL).read_text().splitlines()]
    there = sum(len(line["checksums"]) for line in lines if "chunk" in line)  # one for each part of a chunk
    write, counts = os.pwrite, {"whole": 0, "out": 0}
    for name in counts:

        def counted(*given, name=name):
            counts[name] += 1
            return write(*given)

        monkeypatch.setattr(os, "pwrite", counted)
        converted(raw, tmp_path / name, resume=True, **OPTIONS)
    assert counts["whole"] - counts["out"] == there >= 100
    assert not (tmp_path / "out" / JOURNAL).exists()


def test_line_that_was_cut_off_does_not_count(raw, tmp_path, broken_off):
    journal = broken_off / JOURNAL
    text = journal.read_bytes()
    journal.write_bytes(text[:-7])
    known = identity(make_plan(raw, StorageOptions(**OPTIONS)), verify=True, chunk=CHUNK, commit="")
    with Journal(broken_off, known) as opened:
        assert len(opened.done) == text.count(b'"chunk"') - 1
    assert journal.read_bytes() == text[: text[:-1].rindex(b"\n") + 1]
    converted(raw, tmp_path / "out", resume=True, **OPTIONS)
    converted(raw, tmp_path / "whole", **OPTIONS)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_bits": 8}, "the options differ"),
        pytest.param({"rounding": "search"}, "the options differ", marks=pytest.mark.full),
        pytest.param({"verify": False}, "the options differ", marks=pytest.mark.full),
        pytest.param({"dtype": "float32"}, "the options differ", marks=pytest.mark.full),
    ],
)
def test_other_options_are_refused_and_the_leftovers_stay(raw, tmp_path, broken_off, options, message):
    before = files_of(broken_off)
    with refused("resume_differs", "--resume", message):
        converted(raw, tmp_path / "out", resume=True, **OPTIONS | options)
    assert files_of(broken_off) == before and not (tmp_path / "out").exists()


def test_changed_source_is_refused(tmp_path, small):
    source = write_random_checkpoint(tmp_path / "raw", geometry("tiny"))
    work = tmp_path / ".out.converting"
    kill_after(start(source, tmp_path / "out"), work, 20)
    first = make_plan(source, StorageOptions(**OPTIONS)).jobs[0].source.parts[0]
    with first.file.open("r+b") as file:
        file.seek(first.start)
        file.write(bytes(100))
    with refused("resume_differs"):
        converted(source, tmp_path / "out", resume=True, **OPTIONS)
    assert noted(work) >= 20


def test_other_version_is_refused_by_its_number(raw, tmp_path, broken_off):
    identity, *lines = (broken_off / JOURNAL).read_text().splitlines(keepends=True)
    (broken_off / JOURNAL).write_text("".join([re.sub(r"mlx-qwen35 [^,]+", "mlx-qwen35 9.9", identity), *lines]))
    with refused("resume_differs", "mlx-qwen35", "9.9"):
        converted(raw, tmp_path / "out", resume=True, **OPTIONS)


def test_data_that_was_lost_is_found(raw, tmp_path, broken_off):
    """What the journal notes and the disk does not hold: found when the file is read again."""
    file = next(broken_off.glob("*.safetensors"))
    with file.open("r+b") as shard:
        shard.seek(200_000)
        shard.write(bytes(100_000))
    with refused("output_differs", "model-00001-of-00001.safetensors", "gate_proj"):
        converted(raw, tmp_path / "out", resume=True, **OPTIONS)
    assert not (tmp_path / "out").exists() and not broken_off.exists()


def test_missing_file_starts_from_the_beginning(raw, tmp_path, broken_off):
    next(broken_off.glob("*.safetensors")).unlink()
    converted(raw, tmp_path / "out", resume=True, **OPTIONS)
    converted(raw, tmp_path / "whole", **OPTIONS)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_without_resume_the_leftovers_go_and_the_message_names_the_option(raw, tmp_path, broken_off, capfd):
    converted(raw, tmp_path / "out", **OPTIONS)
    text = capfd.readouterr().err
    assert "removed the unfinished conversion in" in text and "(--resume would have gone on with it)" in text


def test_nothing_to_resume_is_told(raw, tmp_path, capfd):
    converted(raw, tmp_path / "out", resume=True)
    assert "nothing to resume in" in capfd.readouterr().err


@pytest.mark.parametrize("left", [b'{"source": "x', *(pytest.param(b, marks=pytest.mark.full) for b in (b"", b"[[["))])
def test_a_journal_without_a_whole_line_has_nothing_to_resume_which_is_told(raw, tmp_path, broken_off, capfd, left):
    (broken_off / JOURNAL).write_bytes(left)
    converted(raw, tmp_path / "out", resume=True, **OPTIONS)
    assert "nothing to resume in" in capfd.readouterr().err


def test_line_is_written_after_the_data_is_on_disk(raw, tmp_path, small, monkeypatch):
    monkeypatch.setattr(stream, "THREADS", 1)  # chunks are written in order
    write, sync, note = os.pwrite, os.fsync, Journal.append
    written, synced, noted, kept = 0, 0, 0, []

    def written_too(*given):
        nonlocal written
        count = write(*given)
        written += 1
        return count

    def synced_too(*given):
        nonlocal synced
        before = written
        sync(*given)
        synced = before

    def noted_too(journal, done):
        nonlocal noted
        noted += sum(len(chunk.checksums) for chunk in done.values())
        kept.append(1 + noted <= synced)  # the header, and each part of a chunk
        note(journal, done)

    monkeypatch.setattr(os, "pwrite", written_too)
    monkeypatch.setattr(os, "fsync", synced_too)
    monkeypatch.setattr(Journal, "append", noted_too)
    converted(raw, tmp_path / "out", **OPTIONS)
    assert len(kept) > 20 and all(kept)
    assert 1 + noted == written
