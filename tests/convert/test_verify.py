"""Errors are measured on what is written, and what is written is read again before the folder appears."""

import errno
import os
import shutil
import threading
import zlib

import mlx.core as mx
import numpy as np
import pytest
from converting import arrays_of, converted, files_of
from refusing import refused

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.names import hugging_face_name
from mlx_qwen35.checkpoint.random import _random_tensor, geometry, write_random_checkpoint
from mlx_qwen35.convert import stream, verify
from mlx_qwen35.convert.journal import Journal
from mlx_qwen35.convert.rounding import quantize
from mlx_qwen35.quantization import Quantization

LAYER = "model.language_model.layers.0."
DOWN, CONV = f"{LAYER}mlp.down_proj.weight", f"{LAYER}linear_attn.conv1d.weight"


def stands_for(folder, name) -> np.ndarray:
    """float64 values of a tensor of a folder, packed or not, from what is stored."""
    checkpoint, arrays = open_checkpoint(folder), arrays_of(folder)
    how, stem = checkpoint.quantization(name), name.removesuffix("weight")
    if how is None:
        return np.array(arrays[name].astype(mx.float32), np.float64)
    parts = [arrays[stem + suffix] for suffix in how.parts((1, how.group_size))]
    parts = [part.astype(mx.float32) if part.dtype != mx.uint8 and part.dtype != mx.uint32 else part for part in parts]
    options = {"group_size": how.group_size, "bits": how.bits, "mode": how.mode}
    return np.array(mx.dequantize(*parts, dtype=mx.float32, **options), np.float64)


@pytest.mark.core(1)
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float16"},
        {"quantize": True},
        *(pytest.param(options, marks=pytest.mark.full) for options in ({}, {"quantize": True, "q_mode": "mxfp4"})),
        pytest.param({"recipe": "5bit"}, marks=pytest.mark.full),
    ],
)
def test_errors_are_those_of_the_stored_values(source_of, tmp_path, monkeypatch, options):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 50_000)
    source = source_of("float32")
    report = converted(source, tmp_path / "out", **{"dtype": "bfloat16"} | options)
    before = {hugging_face_name(name): array for name, array in arrays_of(source).items()}
    assert set(report.errors) == set(before)
    for name, array in before.items():
        values, error = np.array(array, np.float64), report.errors[name]
        lost = stands_for(tmp_path / "out", name) - values
        assert error.largest == pytest.approx(np.abs(lost).max(), rel=1e-5, abs=1e-30), name
        assert error.relative == pytest.approx((lost**2).sum() / (values**2).sum(), rel=1e-4, abs=1e-30), name
    assert report.errors[DOWN].relative > 0 and report.errors[f"{LAYER}linear_attn.A_log"].relative == 0


def test_errors_do_not_depend_on_overflow_of_squares(tmp_path):
    def tensor(name, shape):
        return _random_tensor(name, shape) * (1e25 if name == DOWN else 1e-30 if name == CONV else 1)

    source = write_random_checkpoint(tmp_path / "raw", geometry("tiny"), dtype=mx.float32, tensor=tensor)
    errors = converted(source, tmp_path / "out", dtype="bfloat16").errors
    assert errors[DOWN].relative == pytest.approx(errors[DOWN.replace("s.0", "s.1")].relative, rel=0.05)
    assert errors[CONV].relative == pytest.approx(errors[DOWN].relative, rel=0.2)


def test_search_is_the_default_and_loses_less_than_nearest(raw, tmp_path):
    best = converted(raw, tmp_path / "best", quantize=True).errors
    nearest = converted(raw, tmp_path / "nearest", quantize=True, rounding="nearest").errors
    packed = [name for name, error in nearest.items() if open_checkpoint(tmp_path / "best").quantization(name)]
    assert len(packed) == 32 + 8 + 10
    assert all(best[name].relative < nearest[name].relative for name in packed)


@pytest.mark.parametrize("mode", ["affine", pytest.param("nvfp4", marks=pytest.mark.full)])
def test_search_is_weighted_by_the_statistics_of_the_tensor(raw, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 40_000)
    weights = np.geomspace(1e-3, 1e3, 448).astype(np.float32)
    options = {"quantize": True, "q_mode": mode}
    converted(raw, tmp_path / "out", statistics={DOWN: weights}, **options)
    converted(raw, tmp_path / "plain", **options)
    how = open_checkpoint(tmp_path / "out").quantization(DOWN)
    assert how == Quantization(64, 4, "affine") or mode == "nvfp4"
    parts = quantize(arrays_of(raw)[DOWN], how, weights)
    after, plain = arrays_of(tmp_path / "out"), arrays_of(tmp_path / "plain")
    for suffix, part in zip(("weight", "scales", "biases"), parts, strict=False):
        assert mx.array_equal(after[DOWN.removesuffix("weight") + suffix], part)
    changed = {name for name in after if not mx.array_equal(after[name], plain[name])}
    assert changed and all(name.startswith(DOWN.removesuffix("weight")) for name in changed)


def test_without_verification_nothing_is_measured_and_the_bytes_are_the_same(raw, tmp_path, capfd):
    converted(raw, tmp_path / "checked", quantize=True)
    assert "reading again" in capfd.readouterr().err
    report = converted(raw, tmp_path / "out", quantize=True, verify=False)
    assert report.errors == {}
    assert "reading again" not in capfd.readouterr().err
    assert files_of(tmp_path / "out") == files_of(tmp_path / "checked")


@pytest.mark.parametrize("position", [40, 5_000_000, -1], ids=["header", "middle", "end"])
def test_damaged_byte_is_found_and_the_folder_does_not_appear(raw, tmp_path, monkeypatch, position):
    converted(raw, tmp_path / "whole")
    (file,) = (tmp_path / "whole").glob("*.safetensors")
    place, write, damaged = position % file.stat().st_size, os.pwrite, []

    def damage(file, data, start):
        if start <= place < start + len(data):
            data = bytearray(data)
            data[place - start] ^= 1
            damaged.append(place)
        return write(file, data, start)

    monkeypatch.setattr(os, "pwrite", damage)
    with refused("output_differs", "model-00001-of-00001"):
        converted(raw, tmp_path / "here" / "out")
    assert damaged == [place] and not any((tmp_path / "here").iterdir())


@pytest.mark.parametrize("damage", [lambda data: data + b"x", lambda data: data[:-1]], ids=["longer", "shorter"])
def test_file_of_another_length_is_found(tmp_path, damage):
    data = os.urandom(1000)
    ranges = {"b": (400, 1000), "a": (0, 400)}
    written = [verify.FileRange(a, b - a, zlib.crc32(data[a:b]), name) for name, (a, b) in ranges.items()]
    file = tmp_path / "file"
    file.write_bytes(data)
    verify.check_file(file, written)
    file.write_bytes(damage(data))
    with refused("output_differs"):
        verify.check_file(file, written)


def test_damaged_copy_of_the_tokenizer_is_found(raw, tmp_path, monkeypatch):
    copy = shutil.copyfile

    def damage(source, target):
        copy(source, target)
        target.write_bytes(target.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(shutil, "copyfile", damage)
    with refused("output_differs"):
        converted(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- disks and sources that fail -------------------------------------------------------------------------------------


def test_disk_that_fills_up_in_the_middle_leaves_nothing(raw, tmp_path, monkeypatch):
    plain, written = os.pwrite, []

    def full(file, data, position):
        if sum(written) + len(data) > 4_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(plain(file, data[:100_000], position))  # a disk may write less than it is given
        return written[-1]

    monkeypatch.setattr(os, "pwrite", full)
    with refused("disk_full", tmp_path / "here" / "out"):
        converted(raw, tmp_path / "here" / "out")
    assert sum(written) > 3_000_000 and not any((tmp_path / "here").iterdir())


def test_no_thread_goes_on_when_the_journal_cannot_be_written(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(stream, "BATCH_BYTES", 100_000)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Journal, "append", full)
    with refused("disk_full") as caught:
        converted(raw, tmp_path / "here" / "out")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")], caught
    assert not any((tmp_path / "here").iterdir())


def test_partial_writes_are_continued(raw, tmp_path, monkeypatch):
    plain = os.pwrite
    converted(raw, tmp_path / "whole")
    monkeypatch.setattr(os, "pwrite", lambda file, data, position: plain(file, data[:70_001], position))
    converted(raw, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_read_only_target_is_named(raw, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with refused("output_unwritable"):
        converted(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change(source, how):
    file = sorted(source.glob("*.safetensors"))[-1]
    if how == "truncated":
        os.truncate(file, file.stat().st_size - 50_000)
    elif how == "grown":
        with file.open("ab") as stream:
            stream.write(b"more")
    elif how == "touched":
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1000))
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["truncated", "grown", "touched", "removed"])
@pytest.mark.parametrize("moment", ["before the first byte", "in the middle"])
def test_source_that_changes_after_its_header_was_read_is_refused(raw, tmp_path, monkeypatch, how, moment):
    source = shutil.copytree(raw, tmp_path / "raw")
    # When the header of the output is written; and between the plan and the first byte, when room is looked for.
    owner, name = (os, "pwrite") if moment == "in the middle" else (shutil, "disk_usage")
    plain, changed = getattr(owner, name), []

    def change_once(*given):
        if not changed:
            changed.append(change(source, how))
        return plain(*given)

    monkeypatch.setattr(owner, name, change_once)
    with refused("source_changed"):
        converted(source, tmp_path / "here" / "out")
    assert not any((tmp_path / "here").iterdir())


def test_range_that_overflows_the_scale_is_refused_unless_searched(tmp_path):
    def tensor(name, shape):
        array = np.array(_random_tensor(name, shape).astype(mx.float32))
        if name == DOWN:
            array[3, :2] = 3e38, -3e38
        return mx.array(array)

    source = write_random_checkpoint(tmp_path / "raw", geometry("tiny"), tensor=tensor)
    with refused("weights_overflow", DOWN, "BF16"):
        converted(source, tmp_path / "out", quantize=True, rounding="nearest")
    assert not (tmp_path / "out").exists()
    converted(source, tmp_path / "out", quantize=True, rounding="search")
    arrays = arrays_of(tmp_path / "out")
    assert mx.all(mx.isfinite(arrays[DOWN.replace("weight", "scales")])).item()
