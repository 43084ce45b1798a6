"""The output appears whole or not at all, and nothing else is touched."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
from converting import cannot_exchange
from refusing import refused
from watching import when_shown

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.convert import convert, space
from mlx_qwen35.convert.journal import JOURNAL

Usage = namedtuple("Usage", "total used free")  # what shutil.disk_usage returns

SLOW = """
import os, sys, time
from mlx_qwen35.convert import __main__ as command
write = os.pwrite
def slow(*given):
    time.sleep(0.05)
    return write(*given)
os.pwrite = slow
sys.argv = ["convert", "--hf-path", sys.argv[1], "--mlx-path", sys.argv[2], *sys.argv[3:]]
command.main()
"""


def start_slow(source, out, *options):
    """A conversion in a process of its own, caught in the middle: some tensors are written, others not."""
    command = [sys.executable, "-c", SLOW, str(source), str(out), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    work = out.parent / f".{out.name}.converting"
    deadline = time.monotonic() + 30
    while not (work.is_dir() and any(work.iterdir())):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    assert process.poll() is None
    return process, work


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def finished(raw, tmp_path):
    return contents(convert(raw, tmp_path / "finished" / "out"))


def test_killed_run_leaves_no_target_and_nothing_that_opens(raw, tmp_path, finished, capfd):
    out = tmp_path / "out"
    process, work = start_slow(raw, out)
    process.kill()
    process.communicate()
    assert not out.exists()
    with refused("config_missing"):
        open_checkpoint(work)
    capfd.readouterr()
    assert contents(convert(raw, out)) == finished
    assert "removed the unfinished conversion" in capfd.readouterr().err
    assert not work.exists()


def test_interrupted_command_leaves_nothing(raw, tmp_path):
    process, work = start_slow(raw, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert not work.exists() and not (tmp_path / "out").exists()


def test_keyboard_interrupt_of_the_function_leaves_nothing(raw, tmp_path, monkeypatch):
    write, left = os.pwrite, list(range(10))

    def interrupt(*given):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return write(*given)

    monkeypatch.setattr(os, "pwrite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(raw, tmp_path / "here" / "out", quantize=True)
    assert not any((tmp_path / "here").iterdir())


def test_killed_replacement_keeps_the_old_checkpoint(raw, tmp_path, finished):
    out = convert(raw, tmp_path / "out")
    process, _ = start_slow(raw, out, "--overwrite", "-q")
    process.kill()
    process.communicate()
    assert contents(out) == finished


def test_replacement_killed_between_the_two_renames_is_undone_at_the_next_start(raw, tmp_path, finished):
    out = convert(raw, tmp_path / "out")
    out.rename(tmp_path / ".out.replaced")
    with refused("target_refused"):
        convert(raw, out, quantize=True)
    assert contents(out) == finished
    assert not (tmp_path / ".out.replaced").exists()


def test_rename_that_fails_puts_the_old_checkpoint_back(raw, tmp_path, finished, monkeypatch):
    out = convert(raw, tmp_path / "out")
    rename = os.rename

    def fail_once(source, to):
        if source.name == ".out.converting":
            raise OSError("no more renames")
        rename(source, to)

    cannot_exchange(monkeypatch)
    monkeypatch.setattr(os, "rename", fail_once)
    with refused("output_unwritable"):
        convert(raw, out, quantize=True, overwrite=True)
    assert contents(out) == finished
    assert [path.name for path in tmp_path.glob(".out*")] == []


def test_configuration_is_written_after_the_weights_were_checked(raw, tmp_path, monkeypatch):
    work, seen = tmp_path / ".out.converting", []
    when_shown("reading again", lambda: seen.append({path.suffix for path in work.iterdir()}), monkeypatch)
    convert(raw, tmp_path / "out")
    assert len(seen) > 1  # at the beginning and, when all was checked, at the end
    assert all(suffixes == {".jsonl", ".safetensors"} for suffixes in seen)


def test_second_conversion_to_the_same_target_waits_for_the_first(raw, tmp_path):
    process, _ = start_slow(raw, tmp_path / "out")
    try:
        with refused("target_busy"):
            convert(raw, tmp_path / "out")
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_target_with_content_is_refused_and_untouched(raw, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with refused("target_refused"):
        convert(raw, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_overwrite_refuses_what_is_no_checkpoint(raw, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with refused("target_refused"):
        convert(raw, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_overwrite_replaces_the_whole_checkpoint(raw, tmp_path, finished):
    out = convert(raw, tmp_path / "out", quantize=True)
    (out / "stray.json").write_text("{}")
    assert contents(convert(raw, out, overwrite=True)) == finished
    assert [path.name for path in tmp_path.glob(".out*")] == []


def test_failed_replacement_keeps_the_old_checkpoint(raw, tmp_path, finished, monkeypatch):
    out = convert(raw, tmp_path / "out")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with refused("disk_full"):
        convert(raw, out, quantize=True, overwrite=True)
    assert contents(out) == finished
    assert [path.name for path in tmp_path.glob(".out*")] == []


def test_left_over_of_a_killed_run_does_not_count_as_used_space(raw, tmp_path, monkeypatch):
    def free(_):
        assert not (tmp_path / ".out.converting" / "model-00001-of-00001.safetensors").exists()
        return Usage(1e12, 0, 1e12)

    (tmp_path / ".out.converting").mkdir()
    (tmp_path / ".out.converting" / JOURNAL).touch()
    (tmp_path / ".out.converting" / "model-00001-of-00001.safetensors").write_bytes(b"half")
    monkeypatch.setattr(shutil, "disk_usage", free)
    convert(raw, tmp_path / "out")


def test_what_a_resumed_run_has_written_counts_as_room(tmp_path, monkeypatch):
    (tmp_path / ".out.converting").mkdir()
    (tmp_path / ".out.converting" / "model-00001-of-00001.safetensors").write_bytes(os.urandom(1_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e9, 1e9, 500_000))
    space.check_space(1_400_000, tmp_path / "out")
    with refused("disk_full"):
        space.check_space(1_600_000, tmp_path / "out")


def test_empty_folder_is_a_good_target(raw, tmp_path, finished):
    (tmp_path / "out").mkdir()
    assert contents(convert(raw, tmp_path / "out")) == finished


def test_file_is_no_target(raw, tmp_path):
    (tmp_path / "out").write_text("mine")
    with refused("target_refused"):
        convert(raw, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("place", [".", "inside", "../raw", ".."])
def test_target_and_source_must_lie_apart(tmp_path, place):
    source = write_random_checkpoint(tmp_path / "holder" / "raw", geometry("tiny"))
    for name in ("config.json", *(file.name for file in source.glob("*.safetensors"))):
        shutil.copyfile(source / name, source.parent / name)  # so that --overwrite would take the folder above
    before = contents(source)
    with refused("target_overlaps_source"):
        convert(source, source / place, overwrite=True)
    assert contents(source) == before


def test_link_to_the_source_is_no_target(tmp_path):
    source = write_random_checkpoint(tmp_path / "raw", geometry("tiny"))
    (tmp_path / "link").symlink_to(source)
    with refused("target_overlaps_source"):
        convert(source, tmp_path / "link", overwrite=True)


def test_place_that_cannot_be_made_is_named(raw, tmp_path):
    (tmp_path / "file").write_text("")
    with refused("output_unwritable"):
        convert(raw, tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_named(raw, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    with refused("output_unwritable", "Permission denied"):
        convert(raw, tmp_path / "shut" / "out")


def test_disk_space_is_checked_before_anything_is_written(raw, tmp_path, monkeypatch):
    needed = sum(path.stat().st_size for path in convert(raw, tmp_path / "measure", recipe="bf16").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e9, 1e9, needed - 100_000))
    with refused("disk_full", "0.01"):
        convert(raw, tmp_path / "new" / "out", recipe="bf16")
    assert not any((tmp_path / "new").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e9, 1e9, needed + 100_000))
    convert(raw, tmp_path / "new" / "out", recipe="bf16")
