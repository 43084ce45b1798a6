"""Fused folders in the programs that adapters come from: the logits of PEFT and mlx-lm, which load what is written."""

import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapters import golden_adapters as goldens
from converting import converted

from mlx_qwen35.checkpoint.adapter import read_adapter
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.convert.evaluate import evaluate
from mlx_qwen35.convert.fusion import AdapterOptions
from mlx_qwen35.load import load_model

TOLERANCE = 1e-4  # float32 sums of another order
WHOLE = ("peft-norm", "peft-table", "mlx-full")
CHOSEN = ("mlx-full", "peft-embedding")  # the others belong to the full matrix


@pytest.fixture(scope="module")
def model(parity_folder) -> Path:
    """The checkpoint that the golden adapters are for: bfloat16, a tied head."""
    return parity_folder(goldens.MODEL)


@pytest.fixture
def fused(model, tmp_path):
    """(name of a golden adapter, options) -> the folder with it."""

    def folder(name: str, **options) -> Path:
        own = goldens.write(name, tmp_path / name, model)
        converted(model, tmp_path / "out", adapter=AdapterOptions(own), verify=False, **options)
        return tmp_path / "out"

    return folder


def by_us(folder: Path) -> np.ndarray:
    made = load_model(open_checkpoint(folder), mx.float32, str(folder))
    return np.array(made(mx.array(goldens.TOKENS)[None], made.make_cache(1))[0])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in CHOSEN else pytest.mark.full) for name in (*goldens.PEFT, *goldens.MLX)],
)
def test_fused_logits_are_those_of_the_program_that_wrote_the_adapter(fused, name):
    folder = fused(name, dtype="float32")
    assert goldens.answers(name).error("logits", by_us(folder)) < TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize("name", [*WHOLE, "peft-embedding", "mlx-dora"])
def test_evaluation_reads_whole_tensors_and_magnitudes_as_they_are_fused(fused, model, name, tmp_path):
    folder = fused(name, dtype="float32")
    read = read_adapter(tmp_path / name, open_checkpoint(model))
    found = evaluate(open_checkpoint(model), open_checkpoint(folder), [goldens.TOKENS.tolist()], adapter=read)
    assert abs(found.kl) < 1e-9 and max(found.layers) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize("name", ["peft-plain", "peft-norm", "peft-rslora-vision", "peft-dora", "peft-embedding"])
def test_transformers_loads_the_folder_and_gives_pefts_merged_logits(fused, model, tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    folder = fused(name)
    ids = torch.from_numpy(goldens.TOKENS.astype(np.int64))[None]

    def load(path: Path):
        return transformers.Qwen3_5ForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )

    ours, info = load(folder)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        plain = load(model)[0]
        if name == "peft-embedding":  # merged by PEFT the tied head would change too, which was not trained
            plain.config.tie_word_embeddings = plain.config.text_config.tie_word_embeddings = False
            plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.clone())
        before = plain(input_ids=ids).logits
        merged = peft.PeftModel.from_pretrained(plain, tmp_path / name).merge_and_unload()
        theirs, own = merged(input_ids=ids).logits, ours(input_ids=ids).logits
    states, expected = ours.state_dict(), merged.state_dict()
    for key, tensor in expected.items():
        step = 2**-8 * tensor.abs().max()  # bfloat16 has 8 digits
        assert (states[key] - tensor).abs().max() <= step, key
    assert (own - theirs).abs().max() < 0.1 < (theirs - before).abs().max() / 4


@pytest.mark.full
@pytest.mark.parametrize("name", ["peft-plain", "mlx-lora"])
def test_mlx_lm_loads_the_folder_in_4_bit_and_gives_our_logits(fused, name):
    pytest.importorskip("mlx_lm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_lm.utils import load_model as load
    folder = fused(name, recipe="4bit", dtype="float32")
    theirs = load(folder)[0](mx.array(goldens.TOKENS)[None])[0]
    assert np.abs(np.array(theirs) - by_us(folder)).max() < TOLERANCE
