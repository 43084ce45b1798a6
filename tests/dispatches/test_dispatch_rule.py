"""How many launches each operation is."""

from collections import Counter
from functools import partial

import mlx.core as mx
import pytest
from dispatches.count import markers
from dispatches.count.dispatches import AROUND, count
from dispatches.recording import HEADS, counted, kernel, zeros


@pytest.mark.parametrize(
    "view",
    [
        lambda x: mx.broadcast_to(x, (3, *x.shape)),
        lambda x: x.swapaxes(1, 2),
        lambda x: x[..., None],
        lambda x: x.squeeze(0),
        lambda x: x[..., 3:9],
        lambda x: x[..., ::2],
        lambda x: mx.split(x, 2, axis=-1)[1],
        lambda x: x.view(mx.uint16),
        mx.stop_gradient,
        lambda x: x.reshape(4, -1),
        lambda x: x.flatten(),
        lambda x: mx.unflatten(x, -1, (2, 256)),
        lambda x: mx.depends(x, zeros(2)),
        lambda x: x.swapaxes(1, 2).reshape(16, 512),  # one token: the elements stay in order
        lambda x: mx.split(x, 2, axis=-1)[1][:, :, :, None].reshape(1, 16, 256),  # the steps of the view will do
        lambda x: x[..., :256].reshape(4, 4, 256, 1),
        lambda x: x.reshape(4, 4, 512)[..., :256].reshape(16, 256),
    ],
)
def test_views_count_zero(view):
    assert counted(view, zeros(*HEADS)) == {}


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda x: x * 2, "Multiply"),
        (lambda x: x + x, "Add"),
        (mx.exp, "Exp"),
        (mx.rsqrt, "Rsqrt"),
        (lambda x: x.astype(mx.float32), "AsType"),
        (lambda x: x.sum(-1), "sum"),
        (lambda x: mx.argmax(x, -1), "argmax"),
        (lambda x: mx.softmax(x, axis=-1), "Softmax"),
        (lambda x: mx.where(x > 0, x, x), "Select"),
        (lambda x: x[mx.array([0])], "Gather"),
        (lambda x: mx.take_along_axis(x, mx.zeros((1, 1, 16, 1), mx.int32), -1), "GatherAxis"),
        (lambda x: x @ zeros(512, 8), "Matmul"),
        (lambda x: x @ zeros(8, 512).T, "Matmul"),
        (lambda x: mx.conv1d(x[0], zeros(512, 1, 1), groups=512), "Convolution"),
        (lambda x: mx.arange(3) + 0, "Arange"),
        (lambda x: mx.zeros((3,)), "Full"),
        (lambda x: mx.quantized_matmul(x, zeros(8, 64, dtype=mx.uint32), zeros(8, 8), zeros(8, 8)), "QuantizedMatmul"),
        (kernel(), "kernel some_kernel"),
    ],
)
def test_other_operations_count_one(operation, name):
    assert counted(operation, zeros(*HEADS))[name] == 1


def test_a_scalar_costs_nothing_by_itself():
    assert counted(lambda x: 2.0 * x + 1, zeros(*HEADS)) == {"Multiply": 1, "Add": 1}


def test_a_reshape_that_must_copy_counts_one():
    assert counted(lambda x: mx.split(x, 2, axis=-1)[0].reshape(1, 1, -1), zeros(*HEADS)) == {"Reshape": 1}
    assert counted(lambda x: x.swapaxes(1, 2).reshape(1, 8, -1), zeros(1, 4, 2, 8)) == {"Reshape": 1}
    assert counted(lambda x: mx.repeat(x, 2, axis=-1), zeros(*HEADS)) == {"Reshape": 1}
    assert counted(lambda x: mx.broadcast_to(x, (2, 8)).flatten(), zeros(1, 8)) == {"Flatten": 1}


def test_a_copy_lies_in_order():
    assert counted(lambda x: x.swapaxes(1, 2).flatten().reshape(4, -1), zeros(1, 4, 2, 8)) == {"Flatten": 1}


def test_an_elementwise_result_lies_as_its_inputs_do():
    assert counted(lambda x: mx.exp(x.swapaxes(1, 2)).flatten(), zeros(1, 4, 2, 8)) == {"Exp": 1, "Flatten": 1}
    assert counted(lambda x: mx.exp(x[..., ::2]).flatten(), zeros(1, 4, 2, 8)) == {"Exp": 1}


def test_concatenate_and_stack_count_one_copy_an_input():
    x = zeros(1, 1, 64)
    assert counted(lambda x: mx.concatenate([x, x, x]), x) == {"Concatenate": 3}
    assert counted(lambda x: mx.stack([x, x], axis=-1), x) == {"Concatenate": 2}
    assert counted(lambda x: mx.concatenate([x, x[:, :, :0]], axis=2), x) == {"Concatenate": 1}


def written(x: mx.array, row: mx.array) -> mx.array:
    x[:, 2:3] = row
    return x


def test_a_write_into_a_cache_counts_one():
    assert counted(written, zeros(1, 8, 4), zeros(1, 1, 4)) == {"SliceUpdate": 1}


def test_a_write_into_what_is_read_elsewhere_counts_one_more():
    def both(x: mx.array, row: mx.array) -> list[mx.array]:
        return [mx.exp(x), mx.slice_update(x, row, mx.array([2]), [1])]

    assert counted(lambda x, row: [mx.exp(x), written(x, row)], zeros(1, 8, 4), zeros(1, 1, 4)) == {
        "Exp": 1, "SliceUpdate": 2,
    }  # fmt: skip
    assert counted(both, zeros(1, 8, 4), zeros(1, 1, 4)) == {"Exp": 1, "DynamicSliceUpdate": 3}


def test_an_address_that_is_computed_counts_one_more():
    start = mx.array([2])
    assert counted(lambda x: mx.slice(x, start, [1], (1, 1, 4)), zeros(1, 8, 4)) == {"DynamicSlice": 2}
    update = partial(mx.slice_update, update=zeros(1, 1, 4), start_indices=start, axes=[1])
    assert counted(lambda x: update(x), zeros(1, 8, 4)) == {"DynamicSliceUpdate": 2}


@pytest.mark.parametrize(
    ("layout", "launches"),
    [(lambda x: x, 1), (lambda x: x.T, 1), (lambda x: x[::2], 1), (lambda x: x[:, :8], 1), (lambda x: x[:, ::2], 2),
     (lambda x: x[:1], 1), (lambda x: x[:1, :8], 2)],
)  # fmt: skip
def test_a_product_copies_what_has_gaps_inside_and_a_part_of_a_single_row(layout, launches):
    columns = layout(zeros(64, 64)).shape[-1]
    assert counted(lambda x: layout(x) @ zeros(columns, 8), zeros(64, 64)) == {"Matmul": launches}


def packed_product(x: mx.array) -> mx.array:
    scales = zeros(8, x.shape[-1] // 64)
    return mx.quantized_matmul(x, zeros(8, x.shape[-1] // 8, dtype=mx.uint32), scales, scales)


def test_a_packed_product_copies_a_part_of_a_row_and_what_is_made_of_it():
    """Gate and up in one projection: MLX keeps the long row's stride, and then takes a single row for one with gaps."""

    def gated(x: mx.array) -> mx.array:
        gate, up = mx.split(x, 2, axis=-1)
        return mx.sigmoid(gate) * up

    whole = zeros(1, 1, 256)
    assert counted(packed_product, whole) == {"QuantizedMatmul": 1}
    assert counted(lambda x: packed_product(x[..., :128]), whole) == {"QuantizedMatmul": 2}
    assert counted(lambda x: packed_product(gated(x)), whole) == {"Sigmoid": 1, "Multiply": 1, "QuantizedMatmul": 2}
    flat = counted(lambda x: packed_product(gated(x).reshape(1, -1)), whole)
    assert flat == {"Sigmoid": 1, "Multiply": 1, "QuantizedMatmul": 1}


def test_a_kernel_copies_inputs_out_of_order_where_it_wants_order():
    x = zeros(1, 4, 2, 8)
    assert counted(lambda x: kernel()(x.swapaxes(1, 2)), x) == {"kernel some_kernel": 2}
    assert counted(lambda x: kernel(in_order=False)(x.swapaxes(1, 2)), x) == {"kernel some_kernel": 1}


# --- markers ---------------------------------------------------------------------------------------------------------


def test_a_norm_counts_one_and_a_copy_of_rows_with_gaps(marked):
    weight = zeros(256)
    norm = partial(mx.fast.rms_norm, weight=weight, eps=1e-6)
    assert counted(lambda x: norm(x), zeros(1, 16, 256)) == {"rms_norm": 1}
    assert counted(lambda x: norm(mx.split(x, 2, axis=-1)[0]), zeros(*HEADS)) == {"rms_norm": 2}
    assert counted(lambda x: norm(x.swapaxes(1, 2)), zeros(1, 4, 2, 256)) == {"rms_norm": 2}
    assert counted(lambda x: norm(x[:, :1]), zeros(4, 8, 256)) == {"rms_norm": 2}
    assert counted(lambda x: mx.fast.layer_norm(x, weight, weight, 1e-6), zeros(1, 16, 256)) == {"layer_norm": 1}


def test_a_norm_with_a_wider_weight_casts_what_it_norms(marked):
    weight = zeros(256, dtype=mx.float32)
    found = counted(lambda x: mx.fast.rms_norm(x, weight, 1e-6), zeros(1, 16, 256))
    assert found == {"AsType": 1, "rms_norm": 1}


def test_rope_counts_one(marked):
    def rope(x: mx.array, dims: int) -> mx.array:
        return mx.fast.rope(x, dims, traditional=False, base=1e7, scale=1.0, offset=3)

    for dims in (256, 64):
        assert counted(lambda x, dims=dims: rope(x.swapaxes(1, 2), dims), zeros(1, 5, 16, 256)) == {"rope": 1}


def test_the_copy_before_a_partial_rotation_is_named(marked):
    def not_counted(dims: int) -> Counter:
        rotated = partial(mx.fast.rope, traditional=False, base=1e7, scale=1.0, offset=3)
        return count(markers.record(lambda x: rotated(x, dims), zeros(1, 16, 1, 256))["nodes"]).not_counted

    assert not_counted(64) == {"rope": 1} and not_counted(256) == {}


def test_attention_counts_one_and_a_copy_of_queries_out_of_order(marked):
    keys = zeros(1, 4, 256, 256)

    def attend(q: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, keys[:, :, :5], keys[:, :, :5], scale=1.0)

    assert counted(attend, zeros(1, 16, 1, 256)) == {"scaled_dot_product_attention": 1}
    assert counted(lambda q: attend(q.swapaxes(1, 2)), zeros(1, 2, 16, 256)) == {"scaled_dot_product_attention": 1}
    assert counted(lambda q: attend(q[..., :256]), zeros(*HEADS).swapaxes(1, 2)) == {"scaled_dot_product_attention": 2}


def test_a_look_up_in_a_packed_table_counts_four(marked):
    table, scales, biases = zeros(100, 8, dtype=mx.uint32), zeros(100, 1), zeros(100, 1) + 1
    mx.eval(biases)
    found = counted(lambda i: mx.dequantize(table[i], scales[i], biases[i], 64, 4), mx.array([[3]]))
    assert found == {"Gather": 3, "dequantize": 1}


def test_contiguous_counts_one_where_it_must_copy(marked):
    def window(x: mx.array) -> mx.array:
        return mx.contiguous(x[:, 1:])

    assert counted(window, zeros(1, 4, 8192)) == {}  # 16 KB more than the window
    assert counted(window, zeros(1, 4, 8192, dtype=mx.float32)) == {"contiguous": 1}
    assert counted(lambda x: mx.contiguous(x.T), zeros(4, 8)) == {"contiguous": 1}


def test_a_compiled_function_counts_one(marked):
    @partial(mx.compile, shapeless=True)
    def gated(x: mx.array, gate: mx.array) -> mx.array:
        return x.astype(mx.float32) * mx.sigmoid(gate) * 2

    assert counted(lambda x: gated(x, x), zeros(1, 1, 64)) == {"compiled gated": 1}


def test_a_reduction_splits_a_compiled_function(marked):
    @mx.compile
    def convolved(x: mx.array) -> mx.array:
        return (x.astype(mx.float32) * 2).sum(1, keepdims=True).astype(x.dtype)

    assert counted(convolved, zeros(1, 4, 64)) == {"compiled convolved": 3}


def test_parts_of_a_compiled_function_that_share_nothing_count_one_together(marked):
    @mx.compile
    def both(x: mx.array, y: mx.array) -> dict[str, mx.array]:
        return {"x": mx.exp(x) + 1, "y": mx.sigmoid(y)}

    found = count(markers.record(lambda x: list(both(x, x + x).values()), zeros(1, 1, 64))["nodes"])
    assert found.places[AROUND] == {"compiled both": 1, "Add": 1}
    assert found.not_counted == {"compiled both": 1}


def test_a_compiled_function_inside_another_is_part_of_it(marked):
    inner = mx.compile(lambda x: mx.exp(x) * 2)

    @mx.compile
    def outer(x: mx.array) -> mx.array:
        return inner(x) + 1

    assert counted(outer, zeros(1, 1, 64)) == {"compiled outer": 1}


def test_a_norm_in_a_compiled_function_is_a_launch_of_its_own(marked):
    @mx.compile
    def scaled(x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x * 2, None, 1e-6) + 1

    assert counted(scaled, zeros(1, 1, 64)) == {"compiled scaled": 3}


def test_outside_a_recording_the_functions_compute(marked):
    assert mx.fast.rms_norm(mx.ones((1, 4)), None, 0.0).tolist() == [[1, 1, 1, 1]]
    assert mx.contiguous(mx.ones((2, 2)).T).tolist() == [[1, 1], [1, 1]]
