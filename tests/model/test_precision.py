"""What is kept in float32 whatever the model's dtype is, and what the narrow types cost."""

from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest
from geometries import changed
from mlx.utils import tree_flatten
from refusing import refused

from mlx_qwen35.backend import CUDA, METAL, assume
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.dtypes import DTYPES
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.kernels.gated_delta import gates
from mlx_qwen35.load import choose_dtype, load_model
from mlx_qwen35.model.layers import RMSNorm

loading = import_module("mlx_qwen35.load")  # `mlx_qwen35.load` is the function
HALVES = [mx.float16, mx.bfloat16]
half = pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])


def prompt(count: int = 70) -> mx.array:
    return mx.array(np.random.default_rng(5).integers(0, 1000, (1, count)).astype(np.int32))


@half
def test_state_and_gates_are_float32_in_a_half_model(dtype, text_model):
    model = text_model(dtype=dtype)
    cache = model.make_cache()
    logits = model(prompt(), cache)
    model(prompt()[:, :1], cache)  # one token goes another way
    assert logits.dtype == dtype and model.dtype == dtype
    for name, array in cache.arrays().items():
        assert array.dtype == (mx.float32 if name.endswith(".recurrent_state") else dtype), name
    for layer in model.layers[:3]:
        mixer = layer.linear_attn
        still = mx.zeros((1, 1, mixer.A_log.size), dtype)
        assert [gate.dtype for gate in gates(still, still, mixer, None)] == [mx.float32] * 2


@half
def test_gates_are_computed_in_float32_from_half_inputs(dtype, text_model):
    a, b = (mx.array(np.random.default_rng(i).normal(size=(1, 9, 6)).astype(np.float32)).astype(dtype) for i in (0, 1))
    mixer = text_model(dtype=dtype).layers[0].linear_attn
    for ours, want in zip(
        gates(b, a, mixer, None), gates(b.astype(mx.float32), a.astype(mx.float32), mixer, None), strict=True
    ):
        assert mx.array_equal(ours, want)


@half
def test_norms_and_decay_parameters_are_float32_and_matrices_are_not(dtype, text_model):
    for name, array in tree_flatten(text_model(dtype=dtype).layers[0].parameters()):
        small = array.ndim == 1 or name.endswith("conv1d")
        assert array.dtype == (mx.float32 if small else dtype), name


# Rounding activations to 8 (bfloat16) or 11 bits (float16) some 40 times in a row moves logits, whose deviation here is
# 0.3, by about 2**-9 or 2**-12 of it each time; where the output of a head nearly cancels, its norm magnifies that.
@pytest.mark.core(1)
@pytest.mark.parametrize("dtype, typical, most", [(mx.float16, 2e-3, 2e-2), (mx.bfloat16, 1.5e-2, 0.15)])
def test_logits_of_half_models_are_close_to_those_of_float32(dtype, typical, most, text_model):
    want = text_model()(prompt())
    model = text_model(dtype=dtype)
    cache = model.make_cache()
    steps = mx.concatenate([model(prompt()[:, t : t + 1], cache) for t in range(70)], axis=1)
    for logits in (model(prompt()), steps):
        error = mx.abs(logits.astype(mx.float32) - want)
        assert error.square().mean().sqrt().item() < typical
        assert error.max().item() < most


def test_a_state_in_float32_keeps_what_tokens_add_to_it_in_small_steps(text_model):
    # A head that decays by 1e-4 a token changes its state by less than bfloat16's half step of 2e-3.
    model = text_model(dtype=mx.bfloat16)
    cache = model.make_cache()
    model(prompt(), cache)
    state = cache.arrays()["layers.0.recurrent_state"]
    assert mx.abs(state - state.astype(mx.bfloat16).astype(mx.float32)).max().item() > 0


# --- trap 42: the one of zero-centred norms ---------------------------------------------------------------------------


def test_the_one_of_a_norm_is_added_in_float32(text_model):
    """1 + w in bfloat16 keeps 8 bits of w: an error of more than 1e-3 where the sum in float32 has less than 1e-4."""
    rng = np.random.default_rng(0)
    x = mx.array(rng.normal(size=(1, 7, 256)).astype(np.float32))
    for dtype in DTYPES.values():
        norm = text_model(dtype=dtype).layers[0].input_layernorm
        assert norm.weight.dtype == mx.float32
        stored = (norm.weight - 1).astype(mx.bfloat16)
        exact = np.array(x, np.float64) / np.sqrt((np.array(x, np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
        exact *= 1 + np.array(stored.astype(mx.float32), np.float64)
        folded = RMSNorm((1 + stored).astype(mx.float32), 1e-6)
        assert np.abs(np.array(folded(x)) - exact).max() > 1e-3
        assert np.abs(np.array(norm(x)) - exact).max() < 1e-4


def test_folding_the_one_in_bfloat16_would_move_logits_by_more_than_the_parity_tests_allow(
    text_model, checkpoint_folder
):
    want = text_model()(prompt())
    model = load_model(open_checkpoint(checkpoint_folder()), mx.float32, "tiny")
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 1 + 2 * 4 + 2
    for norm in norms:
        norm.weight = norm.weight.astype(mx.bfloat16).astype(mx.float32)
    assert mx.abs(model(prompt()) - want).max().item() > 1e-3


# --- the choice of dtype ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_by_name(name, checkpoint_folder):
    assert choose_dtype(open_checkpoint(checkpoint_folder()), name) == DTYPES[name]


def test_an_unknown_dtype_is_refused(checkpoint_folder):
    with refused("option_invalid", "float32", "float16", "bfloat16", "float8"):
        choose_dtype(open_checkpoint(checkpoint_folder()), "float8")


@pytest.fixture
def stored_as(checkpoint_folder):
    """A dtype -> a checkpoint whose tensors are stored in it."""
    config = changed(geometry("tiny"), num_hidden_layers=1, layer_types=["linear_attention"])
    return lambda dtype: open_checkpoint(checkpoint_folder(config, dtype=dtype, mtp=False, vision=False))


@pytest.mark.parametrize("stored", [*HALVES, mx.float32], ids=str)
def test_the_default_dtype_is_float32_on_the_cpu(stored, stored_as, on_chip):
    on_chip("Apple M1")
    assert choose_dtype(stored_as(stored), None) == mx.float32


@pytest.mark.parametrize(
    ("chip", "of_bfloat16"),
    [
        ("Apple M1", mx.float16), ("Apple M1 Ultra", mx.float16), ("Apple M2 Pro", mx.float16),
        ("Apple M3", mx.bfloat16), ("Apple M4 Max", mx.bfloat16), ("Apple M5", mx.bfloat16),
        ("Apple processor", mx.bfloat16), (None, mx.bfloat16),
    ],
)  # fmt: skip
def test_the_default_dtype_on_a_gpu_is_the_stored_one_but_float16_for_bfloat16_on_m1_and_m2(
    chip, of_bfloat16, stored_as, on_chip
):
    if chip:
        on_chip(chip)
    for stored, expected in ((mx.bfloat16, of_bfloat16), (mx.float16, mx.float16), (mx.float32, mx.float32)):
        with assume(METAL if chip else CUDA):
            assert choose_dtype(stored_as(stored), None) == expected


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_that_is_asked_for_wins_on_every_chip(name, stored_as, on_chip):
    on_chip("Apple M1")
    with assume(METAL):
        assert choose_dtype(stored_as(mx.bfloat16), name) == DTYPES[name]


def test_a_bfloat16_checkpoint_is_loaded_in_the_dtype_that_suits_the_machine(stored_as, monkeypatch):
    checkpoint = stored_as(mx.bfloat16)
    monkeypatch.setattr(loading, "default_dtype", lambda stored: mx.float16 if stored == mx.bfloat16 else None)
    model = load_model(checkpoint, choose_dtype(checkpoint, None), "it")
    assert model.dtype == model.embed_tokens.weight.dtype == model(prompt()).dtype == mx.float16
