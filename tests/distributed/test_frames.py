"""Orders as bytes on a connection."""

import json
import socket
import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from mlx_qwen35.distributed.channel import Order
from mlx_qwen35.distributed.frames import DTYPES, HEADER, MARK, MOST_ARRAYS, FrameError, receive, send


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


def written(kinds: object, content: bytes = b"", name: object = "x", fields: object = None) -> bytes:
    text = json.dumps({"name": name, "fields": fields or {}, "arrays": kinds}).encode()
    return HEADER.pack(MARK, len(text), len(content)) + text + content


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_arrive_as_they_were(pair, dtype):
    arrays = {
        "matrix": np.arange(12).reshape(3, 4).astype(dtype)[:, ::2], "number": np.array(1, dtype),
        "nothing": np.zeros((2, 0, 3), dtype),
    }  # fmt: skip
    send(pair[0], Order("forward", {"at": [1, None], "ß": float("inf")}, arrays))
    found = receive(pair[1])
    assert (found.name, found.fields) == ("forward", {"at": [1, None], "ß": float("inf")})
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype and found.arrays[name].shape == array.shape
        np.testing.assert_array_equal(found.arrays[name], array)


def test_an_order_longer_than_the_systems_buffers_arrives_whole(pair):
    array = np.arange(3_000_000, dtype=np.int32)
    sender = threading.Thread(target=send, args=(pair[0], Order("embed", {}, {"a": array, "b": array[:7]})))
    sender.start()
    found = receive(pair[1])
    sender.join()
    np.testing.assert_array_equal(found.arrays["a"], array)
    np.testing.assert_array_equal(found.arrays["b"], array[:7])


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([None]), np.zeros(1, complex), np.zeros((1,) * 9)])
def test_what_a_frame_cannot_hold_is_not_sent(pair, array):
    with pytest.raises(ValueError, match="a frame cannot hold"):
        send(pair[0], Order("x", {}, {"bad": array}))


@pytest.mark.parametrize("length", [1, HEADER.size - 1, HEADER.size + 1, -1])
def test_a_truncated_frame_is_the_end_of_the_connection(pair, length):
    pair[0].sendall(written([["a", "int32", [2]]], bytes(8))[:length])
    pair[0].close()
    with pytest.raises(EOFError):
        receive(pair[1])


@pytest.mark.parametrize("content", [
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    struct.pack("!4sIQ", b"mq34", 2, 0),
    HEADER.pack(MARK, 1 << 31, 0),
    HEADER.pack(MARK, 2, MOST_ARRAYS + 1),
    HEADER.pack(MARK, 2, 0) + b"[]",
    HEADER.pack(MARK, 2, 0) + b"\xff\xff",
    HEADER.pack(MARK, 20_000, 0) + b"[" * 20_000,
    written([], name=1),
    written([], fields=[1]),
    written({}),
    written([["a", "int32", [2]]], bytes(7)),
    written([["a", "int32", [2]]], bytes(9)),
    written([["a", "int32", [1 << 62, 1 << 62]]], bytes(9)),
    written([["a", "int32", [-1]]]),
    written([["a", "int32", [True]]], bytes(4)),
    written([["a", "object", [1]]], bytes(8)),
    written([["a", "int8", [1] * 9]], bytes(1)),
    written([["a", "int8"]]),
    written([[{}, "int8", [0]]]),
])  # fmt: skip
def test_what_is_no_frame_is_refused(pair, content):
    pair[0].sendall(content)
    pair[0].close()
    with pytest.raises(FrameError):
        receive(pair[1])
