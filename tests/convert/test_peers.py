"""A converted folder in the programs that load it: ours, transformers, mlx-lm, mlx-vlm."""

import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qwen35.checkpoint import open_checkpoint
from mlx_qwen35.convert import convert
from mlx_qwen35.load import load_model

IDS = np.random.default_rng(7).integers(0, 980, (1, 6))  # few: on the CPU MLX multiplies half types slowly
SAME_DTYPE = [(dtype, bits) for dtype in ("float32", "bfloat16", "float16") for bits in (None, 4, 8)]
# float32 sums of another order: 1e-6 to 2e-5 at logits of standard deviation 0.3 (tests/parity)
TOLERANCE = 1e-4


def options(dtype: str, bits: int | None) -> dict:
    return {"dtype": dtype, "quantize": bits is not None, "q_bits": bits}


def by_us(folder: Path, dtype: mx.Dtype = mx.float32) -> mx.array:
    return load_model(open_checkpoint(folder), dtype, str(folder))(mx.array(IDS)).astype(mx.float32)


@pytest.fixture(scope="module")
def mlx_lm():
    """(convert, load_model) of mlx-lm."""
    pytest.importorskip("mlx_lm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_lm.convert import convert as theirs
        from mlx_lm.utils import load_model as load
    return theirs, lambda folder: load(folder)[0]


@pytest.fixture
def both(mlx_lm, source_of, tmp_path):
    """(source dtype, output dtype, bits) -> mlx-lm's models of our folder and of the one that it converts itself."""

    def models(source: str, dtype: str, bits: int | None):
        theirs, load = mlx_lm
        ours = convert(source_of(source), tmp_path / "ours", **options(dtype, bits))
        theirs(str(source_of(source)), str(tmp_path / "theirs"), **options(dtype, bits))
        return load(ours), load(tmp_path / "theirs")

    return models


def largest(difference: mx.array) -> float:
    return mx.max(mx.abs(difference.astype(mx.float32))).item()


@pytest.mark.parametrize(("dtype", "bits"), SAME_DTYPE)
def test_mlx_lm_computes_with_our_folder_what_it_computes_with_its_own(both, dtype, bits):
    ours, theirs = both(dtype, dtype, bits)
    parameters = dict(tree_flatten(theirs.parameters()))
    for name, array in tree_flatten(ours.parameters()):
        assert array.dtype == parameters[name].dtype and mx.array_equal(array, parameters[name]), name
    logits = ours(mx.array(IDS))
    assert 0.1 < mx.std(logits.astype(mx.float32)).item() < 1
    assert mx.array_equal(logits, theirs(mx.array(IDS)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bits", [None, 4])
def test_mlx_lm_differs_only_by_its_own_rounding_of_norms(both, dtype, bits):
    """From a bfloat16 source mlx-lm forms 1 + w in bfloat16 when it converts; from our folder in the output's dtype."""
    ours, theirs = both("bfloat16", dtype, bits)
    parameters = dict(tree_flatten(theirs.parameters()))
    own = dict(tree_flatten(ours.parameters()))
    rounded = [name for name in own if not mx.array_equal(own[name], parameters[name])]
    assert rounded and all(name.endswith("norm.weight") for name in rounded)
    for name in rounded:
        assert largest(own[name] - parameters[name]) < 2**-8 + 2**-10, name  # half a step of bfloat16 in [1, 2)
        own[name] = parameters[name]
    ours.load_weights(list(own.items()))
    assert mx.array_equal(ours(mx.array(IDS)), theirs(mx.array(IDS)))


def test_default_options_are_mlx_lms(mlx_lm, raw, tmp_path):
    theirs, load = mlx_lm
    convert(raw, tmp_path / "ours", quantize=True)
    theirs(str(raw), str(tmp_path / "theirs"), quantize=True)
    ours, theirs = (load(tmp_path / name)(mx.array(IDS)) for name in ("ours", "theirs"))
    assert ours.dtype == theirs.dtype == mx.bfloat16 and mx.array_equal(ours, theirs)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_other_modes_load_in_mlx_lm(mlx_lm, source_of, tmp_path, mode):
    theirs, load = mlx_lm
    convert(source_of("float32"), tmp_path / "ours", quantize=True, q_mode=mode)
    theirs(str(source_of("float32")), str(tmp_path / "theirs"), quantize=True, q_mode=mode)
    assert mx.array_equal(*(load(tmp_path / name)(mx.array(IDS)) for name in ("ours", "theirs")))


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_mlx_vlm_loads_text_and_vision(mlx_lm, source_of, tmp_path, bits):
    pytest.importorskip("mlx_vlm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_vlm.utils import load_model as load
    folder = convert(source_of("float32"), tmp_path / "out", **options("float32", bits))
    model = load(folder)
    logits = model.language_model(mx.array(IDS)).logits
    assert largest(logits - mlx_lm[1](folder)(mx.array(IDS))) < TOLERANCE
    stored = {name: a for file in folder.glob("*.safetensors") for name, a in mx.load(str(file)).items()}
    for name in ("blocks.1.attn.qkv.weight", "merger.linear_fc2.bias", "pos_embed.weight"):
        parameter = dict(tree_flatten(model.vision_tower.parameters()))[name]
        assert mx.array_equal(parameter, stored[f"model.visual.{name}"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_loader_computes_the_sources_logits_exactly(raw, tmp_path, dtype):
    """bfloat16 too: what it cannot hold is kept exactly beside it."""
    assert mx.array_equal(by_us(convert(raw, tmp_path / "out", dtype=dtype)), by_us(raw))


@pytest.mark.parametrize("bits", [4, 8])
def test_our_loader_agrees_with_mlx_lm_on_quantized_folders(mlx_lm, source_of, tmp_path, bits):
    folder = convert(source_of("float32"), tmp_path / "out", **options("float32", bits))
    assert largest(by_us(folder) - mlx_lm[1](folder)(mx.array(IDS))) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_transformers_loads_the_unquantized_folder(source_of, tmp_path, dtype):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = convert(source_of(dtype), tmp_path / "out")

    def logits(path: Path):
        model, info = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            return model(input_ids=torch.tensor(IDS)).logits.numpy()

    after = logits(folder)
    assert np.abs(after - np.array(by_us(folder))).max() < (TOLERANCE if dtype == "float32" else 0.01)
    if dtype == "float32":
        assert np.array_equal(after, logits(source_of(dtype)))
