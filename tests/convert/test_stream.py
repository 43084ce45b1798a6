"""The bytes depend on the source and the options alone, not on chunks, threads or time."""

import pytest
from converting import files_of, unpacked

from mlx_qwen35.convert import convert, stream

OPTIONS = [{}, {"q_mode": "nvfp4"}, {"q_bits": 8, "dtype": "float16", "q_vision_bits": 6}]


@pytest.mark.parametrize(
    "options", [{"q_bits": 3}, *(pytest.param(options, marks=pytest.mark.full) for options in OPTIONS)], ids=str
)
def test_chunked_result_is_that_of_whole_tensors(raw, tmp_path, monkeypatch, options):
    if options:
        options = {"rounding": "nearest"} | options
    whole = files_of(convert(raw, tmp_path / "whole", quantize=True, **options))
    monkeypatch.setattr(stream, "CHUNK_BYTES", 7777)  # a few rows of a matrix, with a shorter last chunk
    assert files_of(convert(raw, tmp_path / "chunked", quantize=True, **options)) == whole


@pytest.mark.parametrize(
    "dtype", ["float16", *(pytest.param(dtype, marks=pytest.mark.full) for dtype in ("bfloat16", "float32"))]
)
def test_unquantized_chunks_join_to_the_whole(raw, tmp_path, monkeypatch, dtype):
    whole = files_of(unpacked(raw, tmp_path / "whole", dtype=dtype))
    monkeypatch.setattr(stream, "CHUNK_BYTES", 5000)
    assert files_of(unpacked(raw, tmp_path / "chunked", dtype=dtype)) == whole


def test_second_run_with_other_threads_gives_the_same_bytes(raw, tmp_path, monkeypatch):
    first = files_of(convert(raw, tmp_path / "first", quantize=True))
    monkeypatch.setattr(stream, "THREADS", 5)
    assert files_of(convert(raw, tmp_path / "second", quantize=True)) == first


def test_progress_names_the_tensors_on_stderr(raw, tmp_path, capfd):
    convert(raw, tmp_path / "out")
    out, err = capfd.readouterr()
    assert out == "" and "100%" in err and "mtp.layers.0." in err
