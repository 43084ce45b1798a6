"""Every kind of layer on its own against transformers, in float32."""

import mlx.core as mx
import pytest
from parity import cases

from mlx_qwen35.checkpoint.config import RopeConfig
from mlx_qwen35.model.rotary import Rotary

# Outputs are of order 1; sums of up to 4096 products in another order differ by a few 1e-6.
TOLERANCE = 1e-5

every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.full if case.name in cases.MORE_DRAWS else (), id=case.name)
        for case in (*cases.CASES, cases.REAL_WIDTHS)
    ],
)


def layer_outputs(model, x: mx.array):
    """Yield i, the output of layer i alone, and of its mixer alone, for the same input."""
    cache = model.make_cache()
    with cache.forward(x.shape[1]) as context:
        rotary = model.rotary.table(context.positions)
        for i, layer in enumerate(model.layers):
            alone = model.make_cache().layers[i]
            alone.reserve(context.counts)
            mixer = layer[layer.mixer_name](x, rotary, context, alone)
            stream, delta = layer(x, None, rotary, context, cache.layers[i])
            yield i, (stream + delta)[0], mixer[0]


@pytest.mark.core(3)
@every_case
def test_decoder_layers_and_mixers_equal_transformers(case, parity_model, reference):
    x = mx.array(cases.layer_input(case))[None]
    names = {layer.mixer_name for layer in parity_model(case).layers}
    assert names == {"self_attn", "linear_attn"}
    for i, whole, mixer in layer_outputs(parity_model(case), x):
        assert reference(case).error(f"layers.{i}.mixer", mixer) < TOLERANCE, f"mixer {i}"
        assert reference(case).error(f"layers.{i}", whole) < TOLERANCE, f"layer {i}"


@pytest.mark.core(3)
@every_case
def test_mlp_equals_transformers(case, parity_model, reference):
    x = mx.array(cases.layer_input(case))[None]
    assert reference(case).error("mlp", parity_model(case).layers[0].mlp(x)[0]) < TOLERANCE


@every_case
def test_zero_centred_norm_equals_transformers(case, parity_model, reference):
    x = mx.array(cases.layer_input(case))[None]
    assert reference(case).error("norm", parity_model(case).layers[0].input_layernorm(x)[0]) < TOLERANCE


@every_case
def test_rotary_table_of_three_different_axes_equals_transformers(case, parity_model, reference):
    cos, sin = parity_model(case).rotary.table(mx.array(cases.positions(case)))
    for name, table in (("cos", cos), ("sin", sin)):
        near, far = mx.concatenate([table, table], axis=-1)[:, 0]
        assert reference(case).error(name, near) < TOLERANCE
        # A frequency that a machine's power function rounds by one bit otherwise is 0.01 radians off out there.
        assert reference(case).error(name, far, start=40) < 0.05


def test_axes_of_the_published_sections_interleave():
    axes = Rotary(RopeConfig(1e7, 64, (11, 11, 10))).axes
    assert "".join("THW"[axis] for axis in axes.tolist()) == "THWTHWTHWTHWTHWTHWTHWTHWTHWTHWTH"


def test_equal_axes_give_the_table_of_plain_positions(parity_model):
    rotary = parity_model(cases.CASES[0]).rotary
    plain = mx.arange(24).reshape(2, 12)
    for one, three in zip(rotary.table(plain), rotary.table(mx.stack([plain] * 3)), strict=True):
        assert mx.array_equal(one, three)
