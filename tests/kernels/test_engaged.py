"""The kernels in the model: when they are engaged, and that they generate what the operations generate."""

import warnings
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import load_text_model
from kernels.emulator import emulated, missing

from mlx_qwen35 import batch_generate, load
from mlx_qwen35.generate.loop import Row, read
from mlx_qwen35.kernels import add_norm, fused_delta, metal, norm_rotary
from mlx_qwen35.kernels.fused_delta import Heads, verdict
from mlx_qwen35.random_checkpoint import geometry

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
SHAPES = Path(__file__).parents[2] / "examples" / "pictures" / "shapes.png"
NANO = Heads(Hk=2, Hv=4, Dk=32, Dv=32, K=4)


@pytest.fixture
def as_on_a_mac(monkeypatch):
    """Kernels are taken to be available, and are emulated; the report of their launches."""
    monkeypatch.setattr(metal, "available", lambda: True)
    verdicts = (verdict, add_norm.verdict, norm_rotary.verdict)
    for known in verdicts:
        known.cache_clear()
    with emulated("forward", False) as report:
        yield report
    for known in verdicts:
        known.cache_clear()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_the_kernel_passes_its_check_at_load(as_on_a_mac, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verdict(NANO, dtype)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("rsqrt(", "sqrt("), ("(1.0f + exp(-z))", "(1.0f + exp(z))"), ("decay = exp(-exp(", "decay = exp(-0.9f * exp(")],
)
def test_a_kernel_that_disagrees_is_switched_off_with_a_warning(as_on_a_mac, monkeypatch, right, wrong):
    text = metal.source("gated_delta")
    assert right in text
    monkeypatch.setattr(metal, "source", lambda name: text.replace(right, wrong))
    metal._kernel.cache_clear()
    with pytest.warns(RuntimeWarning, match="gated_delta is switched off: its (output|state) differs"):
        assert not verdict(NANO, mx.float32)
    metal._kernel.cache_clear()


def test_a_kernel_that_does_not_compile_is_switched_off_with_a_warning(as_on_a_mac, monkeypatch):
    def refused(*_):
        raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: ...")

    monkeypatch.setattr(metal, "launch", refused)
    with pytest.warns(RuntimeWarning, match="is switched off: .* Unable to build metal library from source. MLX"):
        assert not verdict(NANO, mx.float32)
    with pytest.warns(RuntimeWarning, match=r"the Metal kernel (add_norm|norm_rotary) is switched off"):
        model, _ = load("nano")
    mx.eval(model(mx.array([[1, 2, 3]])))  # the verdicts are remembered, and the operations run


def test_off_a_mac_the_operations_run(monkeypatch):
    monkeypatch.setattr(fused_delta, "fused_gated_delta", lambda *_: pytest.fail("the kernel was launched"))
    model, _ = load("nano")
    mx.eval(model(mx.array([[1, 2, 3]])))


def test_nano_generates_the_same_tokens_with_the_kernel(as_on_a_mac, monkeypatch):
    prompts = [
        [{"role": "user", "content": "What is 34 + 58?"}],
        [{"role": "user", "content": [{"type": "image", "image": SHAPES}, {"type": "text", "text": "What is it?"}]}],
    ]
    options = {"temp": 0.8, "seed": 1, "prefill_step_size": 13, "max_tokens": 12}
    model, processor = load("nano")
    fused = [result.tokens for result in batch_generate(model, processor, prompts, **options)]
    launches = len(as_on_a_mac.launches)
    monkeypatch.setattr(metal, "available", lambda: False)
    assert fused == [result.tokens for result in batch_generate(model, processor, prompts, **options)]
    passes = -(-max(len(processor.encode_messages(prompt).tokens) for prompt in prompts) // 13) + 11
    assert launches >= 6 * passes  # six DeltaNet layers, one launch each a pass, and the check at load
    assert len(as_on_a_mac.launches) == launches


@pytest.mark.parametrize("step", [7, 64])
def test_a_tiny_checkpoint_reads_the_same_with_the_kernels(as_on_a_mac, monkeypatch, checkpoint_folder, step):
    model = load_text_model(checkpoint_folder(geometry("tiny")))
    assert len(model.layers[0].linear_attn.in_proj.products) == 1
    rows = [Row(list(range(5, 45))), Row(list(range(100, 109)))]

    def hidden() -> mx.array:
        cache = model.make_cache(2)
        out = read(model, cache, rows, step)
        return mx.concatenate([out, model.hidden(mx.array([[7], [8]]), cache)[:, 0]])

    before = len(as_on_a_mac.launches)
    fused = hidden()
    passes = -(-40 // step) + 1
    assert len(as_on_a_mac.launches) - before == passes * (3 + 1 + 8)  # three DeltaNet layers, one other, eight sums
    monkeypatch.setattr(metal, "available", lambda: False)
    assert mx.abs(fused - hidden()).max().item() < 1e-4
