"""Orders and answers on their way: a header, JSON, and the raw bytes of arrays. Nothing in them can run.

A frame: the mark, the bytes of its JSON and of its arrays (b"mq35", u32, u64, in the network's order of bytes), the
JSON {"name", "fields", "arrays": [[name, dtype, shape], ...]}, and the arrays one behind the other.
"""

import json
import math
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlx_qwen35.distributed.channel import Order
from mlx_qwen35.values import is_whole, shown

MARK = b"mq35"
HEADER = struct.Struct("!4sIQ")
MOST_JSON = 1 << 24  # bytes
MOST_ARRAYS = 1 << 30  # bytes of all arrays of a frame
MOST_AXES = 8
_TOGETHER = 1 << 16  # bytes: a shorter frame is sent by one call
DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()
}  # bfloat16, which numpy does not have, goes as uint16


class FrameError(ValueError):
    """What came is no frame, or one above the limits."""


def send(connection: socket.socket, order: Order) -> None:
    """Send a whole frame. OSError if the connection breaks; ValueError for what a frame cannot hold."""
    parts = [np.ascontiguousarray(array, _dtype(name, array)) for name, array in order.arrays.items()]
    kinds = [[name, array.dtype.name, array.shape] for name, array in order.arrays.items()]
    text = json.dumps({"name": order.name, "fields": dict(order.fields), "arrays": kinds}).encode()
    size = sum(part.nbytes for part in parts)
    _check_sizes(len(text), size)
    head = HEADER.pack(MARK, len(text), size) + text
    pieces: list[bytes | memoryview] = [head, *(part.reshape(-1).view(np.uint8).data for part in parts)]
    for piece in [b"".join(pieces)] if len(head) + size < _TOGETHER else pieces:
        connection.sendall(piece)


def receive(connection: socket.socket) -> Order:
    """Wait for a whole frame. OSError if the connection breaks, EOFError if it ends; FrameError for anything else."""
    mark, length, size = HEADER.unpack(_exactly(connection, HEADER.size))
    if mark != MARK:
        raise FrameError(f"an order begins with {MARK!r}, got {mark!r}")
    _check_sizes(length, size)
    try:
        content = json.loads(bytes(_exactly(connection, length)))
        name, fields, kinds = content["name"], content["fields"], content["arrays"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FrameError(f"an order is JSON with name, fields and arrays: {shown(error)}") from None
    if not isinstance(name, str) or not isinstance(fields, dict):
        raise FrameError(f"an order has a name and fields, got {shown(name)} and {shown(fields)}")
    return Order(name, fields, dict(_arrays(kinds, _exactly(connection, size))))


def _dtype(name: str, array: np.ndarray) -> np.dtype:
    if array.dtype.name not in DTYPES or array.ndim > MOST_AXES:
        raise ValueError(f"array {name} of an order has {array.ndim} axes of {array.dtype}, which a frame cannot hold")
    return DTYPES[array.dtype.name]


def _check_sizes(length: int, size: int) -> None:
    if length > MOST_JSON or size > MOST_ARRAYS:
        raise FrameError(
            f"an order holds at most {MOST_JSON} bytes of JSON and {MOST_ARRAYS} of arrays, got {length} and {size}"
        )


def _arrays(kinds: Any, content: bytearray) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a frame, over its bytes."""
    if not isinstance(kinds, list):
        raise FrameError(f"the arrays of an order are a list, got {shown(kinds)}")
    start = 0
    for kind in kinds:
        match kind:
            case [str(name), str(dtype), list(shape)] if dtype in DTYPES and len(shape) <= MOST_AXES:
                pass
            case _:
                raise FrameError(f"an array is a name, a dtype and a shape, got {shown(kind)}")
        if not all(is_whole(axis) and axis >= 0 for axis in shape):
            raise FrameError(f"the shape of array {name} is no list of whole numbers: {shown(shape)}")
        count = math.prod(shape)
        stop = start + count * DTYPES[dtype].itemsize
        if stop > len(content):
            break
        yield name, np.frombuffer(content, DTYPES[dtype], count, start).reshape(shape)
        start = stop
    else:
        if start == len(content):
            return
    raise FrameError(f"the arrays of an order take other bytes than the {len(content)} that came: {shown(kinds)}")


def _exactly(connection: socket.socket, size: int) -> bytearray:
    content = bytearray(size)
    left = memoryview(content)
    while left:
        count = connection.recv_into(left)
        if not count:
            raise EOFError("the connection has ended")
        left = left[count:]
    return content
