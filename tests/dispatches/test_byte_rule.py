"""How many bytes the launches of each operation read and write."""

from functools import partial

import mlx.core as mx
from dispatches.recording import in_all, kernel, moved, zeros

X = 64 * 2  # bytes of a row of 64


def test_an_operation_reads_its_inputs_and_writes_its_outputs():
    x = zeros(1, 64)
    assert moved(lambda x, y: x + y, x, x) == (2 * X, X)
    assert moved(lambda x: x.astype(mx.float32), x) == (X, 2 * X)
    assert moved(lambda x: x.sum(-1), zeros(4, 64)) == (4 * X, 8)
    assert moved(lambda x: mx.exp(mx.exp(x)), x) == (2 * X, 2 * X)


def test_an_array_given_twice_is_read_once():
    assert moved(lambda x: x * x, zeros(1, 64)) == (X, X)


def test_views_move_nothing():
    assert moved(lambda x: x[..., :32].swapaxes(0, 1)[None], zeros(1, 64)) == (0, 0)


def test_a_slice_counts_only_itself_and_a_broadcast_axis_once():
    assert moved(lambda x: mx.exp(x[:, :8]), zeros(4, 64)) == (4 * 16, 4 * 16)
    assert moved(lambda x, y: x + y, zeros(4, 64), zeros(1, 64)) == (4 * X + X, 4 * X)
    assert moved(lambda x: x * 2, zeros(1, 64)) == (X + 2, X)


def test_a_copy_is_read_and_written():
    assert moved(lambda x: x.T.flatten(), zeros(4, 64)) == (4 * X, 4 * X)
    assert moved(lambda x: mx.broadcast_to(x, (3, 64)).flatten(), zeros(1, 64)) == (X, 3 * X)
    assert moved(lambda x, y: mx.concatenate([x, y]), zeros(1, 64), zeros(3, 64)) == (4 * X, 4 * X)


def test_a_look_up_reads_its_rows():
    rows, table = mx.array([[3]]), zeros(100, 64)
    assert moved(lambda rows: table[rows], rows) == (4 + X, X)
    assert moved(lambda x: mx.take_along_axis(x, rows, 1), zeros(1, 64)) == (4 + 2, 2)
    assert moved(lambda x: mx.slice(x, mx.array([2]), [0], (1, 64)), zeros(100, 64)) == (4 + X, X)


def test_a_write_into_a_cache_moves_what_is_written():
    def written(x: mx.array, row: mx.array) -> mx.array:
        x[2:3] = row
        return x

    update = partial(mx.slice_update, start_indices=mx.array([2]), axes=[0])
    cache, row = zeros(256, 64), zeros(1, 64)
    assert moved(written, cache, row) == (X, X)
    assert moved(lambda x, row: update(x, row), cache, row) == (X + 4, X)


def test_a_write_into_what_is_read_elsewhere_moves_the_whole_too():
    def both(x: mx.array, row: mx.array) -> list[mx.array]:
        other = mx.exp(x)
        x[2:3] = row
        return [other, x]

    exp = 256 * X
    assert moved(both, zeros(256, 64), zeros(1, 64)) == (exp + 256 * X + X, exp + 256 * X + X)


def test_a_product_reads_its_matrix_as_it_is_packed():
    packed, scales = zeros(8, 8, dtype=mx.uint32), zeros(8, 1)
    biases = scales + 1
    mx.eval(biases)
    found = in_all(lambda x: mx.quantized_matmul(x, packed, scales, biases), zeros(1, 64))
    matrix = 8 * (8 * 4 + 2 + 2)
    assert (found.read, found.written) == (X + matrix, 16)
    assert found.matrices == matrix and found.rest == X + 16


def test_a_matrix_that_is_not_packed_is_one_too_and_what_was_computed_is_none():
    matrix = zeros(8, 64)
    assert in_all(lambda x: x @ matrix.T, zeros(1, 64)).matrices == 8 * X
    assert in_all(lambda x: x @ mx.exp(matrix).T, zeros(1, 64)).matrices == 0
    assert in_all(lambda x: x + matrix, zeros(1, 64)).matrices == 0


def test_an_input_that_is_copied_first_moves_twice():
    part = 32 * 2
    assert moved(lambda x: kernel()(x[:, :32]), zeros(4, 64)) == (2 * 4 * part, 2 * 4 * part)
    assert moved(lambda x: kernel(in_order=False)(x[:, :32]), zeros(4, 64)) == (4 * part, 4 * part)
    assert moved(lambda x: x[:1, :32] @ zeros(32, 8), zeros(4, 64)) == (2 * part + 512, part + 16)
    broadcast = moved(lambda x: kernel()(mx.broadcast_to(x, (4, 64))), zeros(1, 64))
    assert broadcast == (X + 4 * X, 4 * X + 4 * X)


def test_a_norm_reads_rows_and_weight(marked):
    norm = partial(mx.fast.rms_norm, weight=zeros(64), eps=1e-6)
    assert moved(lambda x: norm(x), zeros(4, 64)) == (4 * X + X, 4 * X)
    assert moved(lambda x: norm(mx.split(x, 2, axis=-1)[0]), zeros(4, 128)) == (8 * X + X, 8 * X)


def test_attention_reads_the_queries_and_the_keys_in_use(marked):
    keys, values = zeros(1, 4, 256, 64), zeros(1, 4, 256, 64)

    def attend(q: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, keys[:, :, :5], values[:, :, :5], scale=1.0)

    assert moved(attend, zeros(1, 16, 1, 64), keys, values) == (16 * X + 2 * 4 * 5 * X, 16 * X)


def test_a_compiled_function_reads_its_inputs_and_writes_its_outputs_once(marked):
    @mx.compile
    def convolved(x: mx.array) -> mx.array:
        return (x.astype(mx.float32) * 2).sum(0).astype(x.dtype)

    assert moved(convolved, zeros(4, 64)) == (4 * X, X)


def test_a_contiguous_that_need_not_copy_moves_nothing(marked):
    assert moved(lambda x: mx.contiguous(x[1:]), zeros(4, 64)) == (0, 0)
    assert moved(lambda x: mx.contiguous(x.T), zeros(4, 64)) == (4 * X, 4 * X)
