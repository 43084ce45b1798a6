"""The kernels in the model: when they are engaged, and that they generate what the operations generate."""

import json
import warnings
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import load_text_model
from geometries import changed
from kernels.backends import EMULATED, OPERATIONS
from kernels.emulator import emulated, missing

from mlx_qwen35 import batch_generate, load
from mlx_qwen35.backend import assume
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.kv_format import UNQUANTIZED, KVFormat
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.shapes import is_matrix, text_shapes
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.kernels import add_norm, attention, fused, fused_delta, norm_rotary, packed_attention
from mlx_qwen35.kernels.fused_delta import Heads, self_check
from mlx_qwen35.model.enabled import EnabledLayers, enabled_kernels, warn_unfit_layers
from mlx_qwen35.model.model import Model
from mlx_qwen35.model.weights import Weights
from mlx_qwen35.quantization import Quantization

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
SHAPES = Path(__file__).parents[2] / "examples" / "pictures" / "shapes.png"
NANO = Heads(Hk=2, Hv=4, Dk=32, Dv=32, K=4)


@pytest.fixture
def as_on_a_mac():
    """Kernels can run, and are emulated; the report of their launches."""
    checks = (self_check, add_norm.self_check, norm_rotary.self_check, attention.fused_self_check)
    checks += (packed_attention.self_check,)
    for known in checks:
        known.cache_clear()
    with assume(EMULATED), emulated("forward", False) as report:
        yield report
    for known in checks:
        known.cache_clear()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_the_kernel_passes_its_check_at_load(as_on_a_mac, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert self_check(NANO, dtype)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("rsqrt(", "sqrt("), ("(1.0f + exp(-z))", "(1.0f + exp(z))"), ("decay = exp(-exp(", "decay = exp(-0.9f * exp(")],
)
def test_a_kernel_that_disagrees_is_switched_off_with_a_warning(as_on_a_mac, monkeypatch, right, wrong):
    text = fused.source("gated_delta")
    assert right in text
    monkeypatch.setattr(fused, "source", lambda name: text.replace(right, wrong))
    with pytest.warns(RuntimeWarning, match="gated_delta is switched off: its (output|state) differs"):
        assert not self_check(NANO, mx.float32)


def test_a_kernel_that_does_not_compile_is_switched_off_with_a_warning(as_on_a_mac, monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: ...")

    monkeypatch.setattr(fused, "launch", refused)
    with pytest.warns(RuntimeWarning, match="is switched off: .* Unable to build metal library from source. MLX"):
        assert not self_check(NANO, mx.float32)
    with pytest.warns(RuntimeWarning, match=r"the kernel (add_norm|norm_rotary) is switched off"):
        model, _ = load("nano")
    mx.eval(model(mx.array([[1, 2, 3]])))  # the checks are remembered, and the operations run


def test_off_a_mac_the_operations_run(monkeypatch):
    monkeypatch.setattr(fused_delta, "fused_gated_delta", lambda *_, **__: pytest.fail("the kernel was launched"))
    model, _ = load("nano")
    mx.eval(model(mx.array([[1, 2, 3]])))


@pytest.mark.full
def test_nano_generates_the_same_tokens_with_the_kernel(as_on_a_mac, monkeypatch):
    prompts = [
        [{"role": "user", "content": "What is 34 + 58?"}],
        [{"role": "user", "content": [{"type": "image", "image": SHAPES}, {"type": "text", "text": "What is it?"}]}],
    ]
    options = {"temp": 0.8, "seed": 1, "prefill_step_size": 13, "max_tokens": 12}
    model, processor = load("nano")
    by_kernels = [result.tokens for result in batch_generate(model, processor, prompts, **options)]
    launches = len(as_on_a_mac.launches)
    with assume(OPERATIONS):
        assert by_kernels == [result.tokens for result in batch_generate(model, processor, prompts, **options)]
    passes = -(-max(len(processor.encode_messages(prompt).tokens) for prompt in prompts) // 13) + 11
    assert launches >= 6 * passes  # six DeltaNet layers, one launch each a pass, and the check at load
    assert len(as_on_a_mac.launches) == launches


@pytest.mark.core(1)
@pytest.mark.parametrize("step", [7, 64])
def test_a_tiny_checkpoint_reads_the_same_with_the_kernels(as_on_a_mac, monkeypatch, checkpoint_folder, step):
    model = load_text_model(checkpoint_folder(geometry("tiny")))
    assert len(model.layers[0].linear_attn.in_proj.products) == 1
    rows = [PromptRow(list(range(5, 45))), PromptRow(list(range(100, 109)))]

    def hidden() -> mx.array:
        caches = [model.make_cache() for _ in rows]
        out = [prefill(model, cache, row, step) for cache, row in zip(caches, rows, strict=True)]
        return mx.concatenate([*out, model.hidden(mx.array([[7], [8]]), Cache.joined(caches))[:, 0]])

    before = len(as_on_a_mac.launches)
    by_kernels = hidden()
    passes = -(-40 // step) + -(-9 // step) + 1
    assert len(as_on_a_mac.launches) - before == passes * (3 + 1 + 8)  # three DeltaNet layers, one other, eight sums
    with assume(OPERATIONS):
        assert mx.abs(by_kernels - hidden()).max().item() < 1e-4


# --- in how many layers ----------------------------------------------------------------------------------------------

MIXER = "linear_attn.in_proj_"


def packed_model(
    unpacked: tuple[str, ...] = (),
    bits: dict[str, int] | None = None,
    config: dict | None = None,
    kv: KVFormat = UNQUANTIZED,
) -> Model:
    """A model of zeros, packed in 4 bit; names that end so are not packed, or in other bits."""
    config = parse_config(config or geometry("tiny")).text
    arrays, packings = {}, {}
    for name, shape in text_shapes(config).items():
        stem = name.removesuffix(".weight")
        if not is_matrix(name, shape) or stem.endswith(unpacked):
            arrays[name] = mx.zeros(shape, mx.float32)
            continue
        number = next((n for end, n in (bits or {}).items() if stem.endswith(end)), 4)
        packings[name] = Quantization(64, number, "affine")
        for suffix, size in packings[name].parts(shape).items():
            arrays[f"{stem}.{suffix}"] = mx.zeros(size, mx.uint32 if suffix == "weight" else mx.float32)
    return Model(config, Weights(arrays, packings.get, mx.float32, 1e-6), memory_limit=0, kv=kv)


def layers(found: dict[str, EnabledLayers]) -> dict[str, tuple[int, int]]:
    return {name: tuple(count) for name, count in found.items()}


ALL = {"gated_delta": (3, 3), "norm_rotary": (1, 1), "add_norm": (4, 4), "attention without scores": (0, 1)}


@pytest.mark.parametrize("unpacked", [(), (f"{MIXER}b", f"{MIXER}a")], ids=["all packed", "b and a are not packed"])
def test_each_kernel_runs_in_every_layer_that_it_is_made_for(as_on_a_mac, unpacked):
    model = packed_model(unpacked)
    assert layers(enabled_kernels(model)) == ALL
    warn_unfit_layers(model)  # a warning would be an error
    assert str(EnabledLayers(3, 4)) == "3 of 4 layers"


def test_the_kernel_for_packed_keys_is_counted_where_keys_are_packed(as_on_a_mac):
    model = packed_model(kv=KVFormat.of("8/4"))
    assert layers(enabled_kernels(model)) == ALL | {"packed_attention": (1, 1)}
    warn_unfit_layers(model)  # a warning would be an error
    model.kv = KVFormat(6, 8)
    assert layers(enabled_kernels(model)) == ALL | {"packed_attention": (0, 1)}
    with pytest.warns(RuntimeWarning, match="packed_attention does not run in 1 of 1 layers"):
        warn_unfit_layers(model)


@pytest.mark.parametrize(
    ("bits", "name", "fewer"),
    [
        ({f"layers.1.{MIXER}z": 8}, r"gated_delta does not run in 1 of 3 layers \(1\)", {"gated_delta": (2, 3)}),
        ({f"{MIXER}z": 8}, r"gated_delta does not run in 3 of 3 layers \(0, 1, 2\)", {"gated_delta": (0, 3)}),
        ({f"{MIXER}b": 8}, r"gated_delta does not run in 3 of 3", {"gated_delta": (0, 3)}),
        ({"self_attn.v_proj": 6}, r"norm_rotary does not run in 1 of 1 layers \(3\)", {"norm_rotary": (0, 1)}),
        ({"mlp.up_proj": 8, "self_attn.o_proj": 8}, None, {}),
    ],
)
def test_layers_whose_projections_are_packed_in_other_bits_are_named_and_not_counted(as_on_a_mac, bits, name, fewer):
    model = packed_model(bits=bits)
    assert layers(enabled_kernels(model)) == ALL | fewer
    with pytest.warns(RuntimeWarning, match=name) if name else warnings.catch_warnings():
        warn_unfit_layers(model)


def test_many_layers_are_named_by_the_first_eight(as_on_a_mac, monkeypatch):
    monkeypatch.setattr(fused_delta, "self_check", lambda *_: True)
    monkeypatch.setattr(norm_rotary, "self_check", lambda *_: True)
    monkeypatch.setattr(add_norm, "self_check", lambda *_: True)
    twelve = changed(geometry("tiny"), num_hidden_layers=12)
    with pytest.warns(RuntimeWarning, match=r"in 9 of 9 layers \(0, 1, 2, 4, 5, 6, 8, 9 \.\.\.\)"):
        warn_unfit_layers(packed_model(bits={f"{MIXER}z": 8}, config=twelve))


def test_a_kernel_that_is_switched_off_runs_in_no_layer(as_on_a_mac, monkeypatch):
    text = fused.source
    monkeypatch.setattr(fused, "source", lambda name: text(name).replace("+ epsilon", "+ 0.1f"))
    with pytest.warns(RuntimeWarning, match="add_norm is switched off: its norm differs"):
        assert layers(enabled_kernels(packed_model())) == ALL | {"add_norm": (0, 4)}


def test_attention_without_scores_is_counted_where_mlx_has_a_kernel(as_on_a_mac, monkeypatch):
    monkeypatch.setattr(attention, "fused_self_check", lambda *_: True)
    assert layers(enabled_kernels(packed_model())) == ALL | {"attention without scores": (1, 1)}


def test_off_a_mac_no_kernel_runs_and_nothing_is_told():
    model = packed_model(bits={f"{MIXER}z": 8})
    warn_unfit_layers(model)
    assert layers(enabled_kernels(model)) == {name: (0, of) for name, (_, of) in ALL.items()}


def test_a_model_is_loaded_with_its_kernels_checked_and_misfits_told(as_on_a_mac, checkpoint_copy):
    folder = checkpoint_copy(mtp=False, vision=False)
    (file,) = folder.glob("*.safetensors")
    arrays = dict(mx.load(str(file)))
    mx.eval(arrays)
    stem = f"model.language_model.layers.1.{MIXER}z."
    parts = mx.quantize(arrays[f"{stem}weight"], group_size=64, bits=4)
    arrays |= {f"{stem}{part}": array for part, array in zip(("weight", "scales", "biases"), parts, strict=True)}
    mx.save_safetensors(str(file), arrays, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 64, "bits": 4}}))
    with pytest.warns(RuntimeWarning, match=r"gated_delta does not run in 1 of 3 layers \(1\)"):
        load_text_model(folder)
    assert as_on_a_mac.launches
