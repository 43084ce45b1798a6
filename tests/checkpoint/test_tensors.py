"""A safetensors header is believed only where it keeps the format: what the format's own library refuses is refused."""

import json
import random
import struct

import mlx.core as mx
import numpy as np
import pytest
import safetensors
from refusing import refused

from mlx_qwen35.checkpoint.tensors import HEADER_BYTES, open_arrays, read_header, same_numbers
from mlx_qwen35.errors import InputError

A, B = "first.weight", "second.weight"


def written(path, header: bytes, data: bytes = bytes(24)):
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def header(**changes) -> bytes:
    """Two tensors of 8 and 16 bytes, one of them changed."""
    tensors = {
        A: {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
        B: {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
    }
    tensors[B] |= changes
    return json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()


def test_a_header_that_keeps_the_format_is_read(tmp_path):
    entries = read_header(written(tmp_path / "x", header()))
    assert [(e.dtype, e.shape, e.nbytes) for e in entries.values()] == [("BF16", (2, 2), 8), ("F32", (4,), 16)]
    assert entries[B].start == entries[A].start + 8


def test_a_file_without_tensors_is_read(tmp_path):
    assert read_header(written(tmp_path / "x", b'{"__metadata__":null}  ', b"")) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"data_offsets": [4, 20]}, {"data_offsets": [0, 16]}, {"data_offsets": [12, 28]}, {"data_offsets": [-8, 8]},
        {"data_offsets": [24, 8]}, {"data_offsets": [8]}, {"data_offsets": [8, 24, 24]}, {"data_offsets": [8.0, 24.0]},
        {"data_offsets": {"8": 24}}, {"data_offsets": "ab"}, {"data_offsets": [8, 2**64 + 24]},
        {"shape": [-4]}, {"shape": [-2, -2]}, {"shape": [4.0]}, {"shape": [True, 4]}, {"shape": ["4"]}, {"shape": 4},
        {"shape": None}, {"shape": [[4]]}, {"shape": [2**63, 2**63, 4]}, {"shape": [0, 2**70]}, {"shape": [10**400]},
        {"shape": [2**40] * 1000}, {"shape": [float("nan")]}, {"shape": [5]},
        {"dtype": "U16"}, {"dtype": "F12"}, {"dtype": ["F32"]}, {"dtype": None}, {"dtype": {}}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_lies_of_a_tensor_is_refused_and_the_tensor_named(changes, tmp_path):
    with refused("safetensors_invalid", tmp_path / "x", B):
        read_header(written(tmp_path / "x", header(**changes)))


ONE = '{"dtype":"U8","shape":[24],"data_offsets":[0,24]}'


LONG = ONE.replace("24]}", "1" * 5000 + "]}")
BROKEN = [
    f'{{"a":{ONE},"a":{ONE}}}', '{"a":{"dtype":"U8","dtype":"U8","shape":[24],"data_offsets":[0,24]}}',
    f'{{"a":{ONE},"__metadata__":{{"x":1}}}}', f'{{"a":{ONE},"__metadata__":[]}}', f'{{"a":{ONE},"__metadata__":""}}',
    f'{{"a":{ONE},"__metadata__":{{"x":{{"y":"z"}}}}}}', f"[{ONE}]", f' {{"a":{ONE}}}', f'\ufeff{{"a":{ONE}}}',
    f'{{"a":{ONE}}}\0', f'{{"a":{ONE}}}x', f'{{"a\\ud800":{ONE}}}', '{"a":' * 5000 + "1" + "}" * 5000,
    '{"a":' + "[" * 200_000, f'{{"a":{LONG}}}', '{"a":NaN}', '{"a":null}', "{}", "{",
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:40])
def test_a_header_that_is_not_of_the_format_is_refused(text, tmp_path):
    with pytest.raises(InputError) as caught:
        read_header(written(tmp_path / "x", text.encode()))
    assert caught.value.code.startswith("safetensors_") and len(str(caught.value)) < 1000


def test_a_name_that_comes_twice_among_many_is_found_at_once(tmp_path):
    names = [f'"{i}":0' for i in range(200_000)]
    with refused("safetensors_invalid", "199999"):
        read_header(written(tmp_path / "x", f"{{{','.join([*names, names[-1]])}}}".encode()))


def test_a_header_in_another_encoding_is_refused(tmp_path):
    with refused("safetensors_invalid"):
        read_header(written(tmp_path / "x", f'{{"a":{ONE}}}'.encode("utf-16")))


def test_a_header_beyond_the_formats_limit_is_refused_unread(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.write(struct.pack("<Q", HEADER_BYTES + 1) + b'{"a"')
        file.truncate(HEADER_BYTES + 100)  # sparse
    with refused("safetensors_invalid", HEADER_BYTES + 1, HEADER_BYTES):
        read_header(tmp_path / "x")


def mutated(text: bytes, rng: random.Random) -> bytes:
    """A header with one or two places overwritten, doubled, taken out or exchanged for numbers that lie near by."""
    for _ in range(rng.choice([1, 1, 1, 2])):
        at = rng.randrange(len(text))
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
        elif kind == 1:
            end = min(len(text), at + rng.randint(1, 40))
            text = text[:at] + text[at:end] + text[at:]
        elif kind == 2:
            text = text[:at] + text[at + rng.randint(1, 20) :]
        else:
            number = rng.choice(
                [b"0", b"8", b"16", b"24", b"-8", b"1e3", b"4.0", b"18446744073709551616", b'"8"', b"null"]
            )
            digits = [i for i in range(len(text)) if text[i : i + 1].isdigit()]
            at = rng.choice(digits) if digits else at
            text = text[:at] + number + text[at + 1 :]
        text = text or b"{"
    return text


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.full)])
def test_what_the_formats_library_refuses_is_refused(count, tmp_path):
    rng = random.Random(5)
    agreed = refusals = 0
    for _ in range(count):
        file = written(tmp_path / "x", mutated(header(), rng))
        try:
            found = safetensors.deserialize(file.read_bytes())
            theirs = {name: (t["dtype"], tuple(t["shape"]), len(t["data"])) for name, t in found}
        except safetensors.SafetensorError:
            theirs = None
        try:
            ours = {e.stored_name: (e.dtype, e.shape, e.nbytes) for e in read_header(file).values()}
        except InputError:
            refusals += 1
            continue
        assert ours == theirs, file.read_bytes()
        agreed += 1
    assert agreed > count / 60 and refusals > count / 2


# --- numbers ---------------------------------------------------------------------------------------------------------


def stored(path, **arrays: tuple[str, np.ndarray]):
    """A file of any dtype: name = (safetensors' dtype, numbers)."""
    described, position = {}, 0
    for name, (dtype, array) in arrays.items():
        described[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    return read_header(written(path, json.dumps(described).encode(), b"".join(a.tobytes() for _, a in arrays.values())))


NUMBERS = np.array([[1.5, -0.1], [3e-39, 1e39]])


def test_float64_becomes_float32_and_what_lies_beside_it_stays(tmp_path):
    half = mx.array([1.0, 2.0, 0.1], mx.bfloat16)
    entries = stored(tmp_path / "x", wide=("F64", NUMBERS), half=("BF16", np.array(mx.view(half, mx.uint16))))
    arrays = open_arrays(entries)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(np.array(arrays["wide"]), NUMBERS.astype(np.float32))
    assert arrays["half"].dtype == mx.bfloat16 and mx.array_equal(arrays["half"], half)


def test_numbers_are_compared_by_value_and_not_by_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_qwen35.checkpoint.tensors.PIECE", 3)
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    other = values.copy()
    other[1, 3] = 7.5
    entries = stored(
        tmp_path / "x",
        a=("F32", values), b=("F16", values.astype(np.float16)), c=("F64", values.astype(np.float64)), d=("F32", other),
        e=("F32", values.reshape(4, 2)), f=("I32", values.astype(np.int32)),
    )  # fmt: skip
    assert [same_numbers(entries["a"], entries[name]) for name in "abcdef"] == [True, True, True, False, False, False]
