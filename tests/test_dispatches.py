"""mlx_qwen35.bench --dispatches: what each operation counts, whole programs, and which options it takes."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen35.bench import dispatches, main, markers
from mlx_qwen35.bench.dispatches import AROUND, Dispatches, count, count_program, format_dispatches
from mlx_qwen35.bench.measure import ProgramError
from mlx_qwen35.config import FULL, LINEAR
from mlx_qwen35.random_checkpoint import geometry

OURS_4B = {LINEAR: 8, FULL: 12, AROUND: 10}  # of one layer; 298 in all


@pytest.fixture
def marked(monkeypatch):
    """MLX as a process that counts sees it, for the length of a test."""
    for module, name in (
        *((mx.fast, name) for name in ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")),
        *((mx, name) for name in ("dequantize", "contiguous", "compile", "default_device")),
        (mx.metal, "is_available"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    real = dict(markers._state.real)
    markers.prepare()
    yield
    markers._state.real = real


def zeros(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return markers.blank(shape, dtype)


def counted(function, *inputs: mx.array) -> Counter:
    """Launches by operation."""
    return count(markers.record(function, *inputs)["nodes"]).places.get(AROUND, Counter())


def kernel(in_order: bool = True):
    made = mx.fast.metal_kernel(
        name="some_kernel", input_names=["x"], output_names=["y"], source="", ensure_row_contiguous=in_order
    )
    one = (1, 1, 1)
    return lambda x: made(inputs=[x], grid=one, threadgroup=one, output_shapes=[x.shape], output_dtypes=[x.dtype])[0]


HEADS = (1, 1, 16, 512)  # queries and gates of 16 heads, of one token


# --- the rule --------------------------------------------------------------------------------------------------------


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


# --- programs --------------------------------------------------------------------------------------------------------


def version(package: str) -> str | None:
    return importlib.metadata.version(package) if importlib.util.find_spec(package.replace("-", "_")) else None


needs_mlx_lm = pytest.mark.skipif(version("mlx-lm") != "0.32.2", reason="needs mlx-lm 0.32.2")
needs_mlx_vlm = pytest.mark.skipif(version("mlx-vlm") != "0.7.10", reason="needs mlx-vlm 0.7.10")


def by_place(found: Dispatches) -> dict[str, float]:
    return {kind: place.dispatches / place.layers for kind, place in found.places.items()}


@pytest.fixture(scope="module")
def ours() -> Dispatches:
    return count_program("mlx_qwen35", geometry("4b"))


@needs_mlx_lm
def test_mlx_lm_takes_814():
    found = count_program("mlx-lm", geometry("4b"))
    assert found.total == 814 and by_place(found) == {LINEAR: 26, FULL: 23, AROUND: 6}
    assert found.places[LINEAR].operations["kernel gated_delta_step_packed_btree"] == 24  # the path of a Mac
    assert found.not_counted == {"rope": 16}


@needs_mlx_vlm
def test_mlx_vlm_takes_831_within_a_percent():
    found = count_program("mlx-vlm", geometry("4b"))
    assert abs(found.total - 831) < 8.31 and by_place(found) == {LINEAR: 27, FULL: 22, AROUND: 10}
    assert found.places[LINEAR].operations["kernel gated_delta_step"] == 24


def test_ours_takes_what_is_pinned(ours):
    assert by_place(ours) == OURS_4B and ours.not_counted == {"compiled _circle": 1}
    assert ours.places[LINEAR].operations["kernel gated_delta"] == 24  # one launch a DeltaNet layer


def test_the_figures_of_the_places_add_up(ours):
    assert ours.total == sum(sum(place.operations.values()) for place in ours.places.values())
    assert {kind: place.layers for kind, place in ours.places.items()} == {LINEAR: 24, FULL: 8, AROUND: 1}


def test_the_embedding_is_around_the_layers_and_the_cache_write_in_them(ours):
    assert ours.places[AROUND].operations["Gather"] == 3 and ours.places[AROUND].operations["dequantize"] == 1
    assert ours.places[FULL].operations["SliceUpdate"] == 16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_matrix_is_in_memory():
    code = (  # VmHWM, since ru_maxrss starts with what the process had that started this one
        "import runpy, sys; sys.argv = ['dispatch_worker.py', 'mlx_qwen35'];"
        f"runpy.run_path({dispatches.__file__.replace('dispatches.py', 'dispatch_worker.py')!r}, run_name='__main__');"
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=json.dumps(geometry("4b")), capture_output=True, text=True, check=True)
    peak = int(done.stderr.split()[-1]) * 1024
    assert peak < 600e6  # the weights would be 2.4 GB


# --- the command -----------------------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code
    return capsys.readouterr().err or str(stopped.value.code)


@pytest.mark.parametrize(
    "given",
    [
        ["--vision"], ["--prompt-lengths", "5"], ["--decode-tokens", "32"], ["--repeats", "5"], ["--plot", "x.png"],
        ["--image-megapixels", "1"], ["--clip-frames", "8"], ["--clip-size", "512x512"], ["--revision", "main"],
        ["--dtype", "bfloat16"], ["--prefill-step-size", "1024"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_other_options_are_refused(given, capsys):
    said = refused(["--geometry", "tiny", "--dispatches", *given], capsys)
    assert f"{given[0]} has no effect with --dispatches. Leave one of them out" in said


def test_a_model_is_refused(capsys):
    assert "give --geometry in the place of --model" in refused(["--model", "nano", "--dispatches"], capsys)


def test_a_program_without_metal_is_refused(capsys):
    said = refused(["--geometry", "tiny", "--dispatches", "--compare", "mlx-lm,transformers"], capsys)
    assert "--dispatches can compare with mlx-lm, mlx-vlm, got transformers" in said


def test_json_holds_the_table(tmp_path: Path, capsys):
    file = tmp_path / "counts.json"
    main(["--geometry", "tiny", "--dispatches", "--json", str(file)])
    content = json.loads(file.read_text())
    assert list(content) == ["mlx_qwen35"]
    found = content["mlx_qwen35"]
    assert found["dispatches_per_token"] == sum(place["dispatches"] for place in found["places"].values())
    printed = capsys.readouterr().out
    assert re.search(rf"^mlx_qwen35 .* {found['dispatches_per_token']} +\d+$", printed, re.MULTILINE)


def test_a_program_that_fails_is_named_and_the_others_are_shown(monkeypatch, capsys):
    def count_or_fail(program: str, config: dict) -> Dispatches:
        if program == "mlx-lm":
            raise ProgramError(program, "out of paper")
        return Dispatches({AROUND: dispatches.Place(1, Counter(Exp=3))}, Counter(rope=2))

    monkeypatch.setattr(dispatches, "count_program", count_or_fail)
    said = refused(["--geometry", "tiny", "--dispatches", "--compare", "mlx-lm,mlx-vlm"], capsys)
    assert "mlx-lm could not run: out of paper" in said and "mlx-vlm" not in said


def test_ours_that_fails_ends_it(monkeypatch, capsys):
    monkeypatch.setattr(dispatches, "count_program", lambda *_: (_ for _ in ()).throw(ProgramError("x", "no paper")))
    assert "mlx_qwen35 could not be counted: no paper" in refused(["--geometry", "tiny", "--dispatches"], capsys)


def test_the_reason_of_a_failure_is_the_last_line_that_the_program_said():
    with pytest.raises(ProgramError, match=r"KeyError: 'nothing' \(ended with code 1\)"):
        count_program("nothing", geometry("tiny"))


def test_the_table_shows_figures_of_one_layer():
    places = {LINEAR: dispatches.Place(3, Counter(Exp=6)), AROUND: dispatches.Place(1, Counter(Exp=1, Add=1))}
    table = format_dispatches("title", {"ours": Dispatches(places, Counter(rope=2))}).splitlines()
    assert table[0] == "title" and [line.split() for line in table[5:8]] == [
        ["ours", "linear_attention", "layer", "around", "token"], ["Exp", "2", "1", "7"], ["Add", "1", "1"],
    ]  # fmt: skip
    assert table[-1] == "ours: MLX launches 2 more, which the rule leaves out: 2 of rope"
