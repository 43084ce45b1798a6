"""Recording of kernel launches: what MLX would compile, with which sizes and arrays."""

import mlx.core as mx
from kernels.capture import Launch, capture

SOURCE = "uint i = thread_position_in_grid.x; out[i] = T(a[i] + b[0] + number) * N + (FLAG ? a_shape[0] : a_ndim);"


def recorded(**call: object) -> list[Launch]:
    kernel = mx.fast.metal_kernel(
        name="demo", input_names=["a", "b", "number"], output_names=["out"], source=SOURCE, header="// first line\n"
    )

    def function(a: mx.array, b: mx.array) -> mx.array:
        options = {"grid": (64, 2, 3), "threadgroup": (32, 2, 1)} | call
        template = [("T", mx.float16), ("N", 3), ("FLAG", True)]
        (y,) = kernel(inputs=[a, b, 5], template=template, output_shapes=[(64,)], output_dtypes=[mx.float16], **options)
        return y * 2

    return capture(function, mx.zeros((16, 4)), mx.zeros((3,), mx.bfloat16))


def test_the_source_is_the_whole_generated_function() -> None:
    (launch,) = recorded()
    assert launch.source.startswith("// first line\n")
    assert SOURCE in launch.source
    assert f"[[kernel]] void {launch.name}(" in launch.source


def test_grid_and_threadgroup_are_recorded() -> None:
    (launch,) = recorded(grid=(7, 5, 3), threadgroup=(4, 2, 1))
    assert (launch.grid, launch.threadgroup) == ((7, 5, 3), (4, 2, 1))


def test_template_arguments_are_those_of_the_instantiation() -> None:
    (launch,) = recorded()
    assert launch.template == ("float16_t", "3", "1")
    assert launch.function == f"{launch.name}<float16_t, 3, 1>"


def test_each_input_has_its_shape_dtype_and_address_space() -> None:
    (launch,) = recorded()
    assert [(b.name, b.space, b.shape, b.dtype) for b in launch.inputs] == [
        ("a", "device", (16, 4), mx.float32),
        ("b", "constant", (3,), mx.bfloat16),
        ("number", "reference", (), mx.int32),
    ]


def test_each_output_has_its_shape_and_dtype() -> None:
    (launch,) = recorded()
    assert [(b.name, b.space, b.shape, b.dtype) for b in launch.outputs] == [("out", "device", (64,), mx.float16)]


def test_parameters_tell_arrays_from_facts_and_attributes() -> None:
    (launch,) = recorded()
    assert [(p.name, p.kind, p.buffer) for p in launch.parameters] == [
        ("a", "buffer", "a"),
        ("a_shape", "shape", "a"),
        ("a_ndim", "ndim", "a"),
        ("b", "buffer", "b"),
        ("number", "buffer", "number"),
        ("out", "buffer", "out"),
        ("thread_position_in_grid", "attribute", ""),
    ]


def test_launches_come_in_order_and_other_operations_are_left_out() -> None:
    def twice(a: mx.array) -> mx.array:
        for name in ("first", "second"):
            kernel = mx.fast.metal_kernel(name=name, input_names=["a"], output_names=["out"], source="out[0] = a[0];")
            (a,) = kernel(
                inputs=[mx.exp(a)], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(8,)], output_dtypes=[a.dtype]
            )
        return a

    names = [launch.name for launch in capture(twice, mx.zeros((8,)))]
    assert ["first" in names[0], "second" in names[1], len(names)] == [True, True, 2]
