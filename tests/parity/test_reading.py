"""What transformers makes of folders whose names, files or tie are not the published ones; needs torch."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_text_model
from geometries import changed

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.folder import INDEX
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.full

SMALL = changed(
    geometry("tiny"), num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], intermediate_size=128
)
TEXT = "model.language_model."
EMBEDDING = f"{TEXT}embed_tokens.weight"
IDS = [[1, 5, 9, 200, 3]]


def head(name: str, change=lambda array: array):
    return lambda arrays: {**arrays, name: change(arrays[EMBEDDING])}


def renamed(rename):
    return lambda arrays: {rename(name): array for name, array in arrays.items()}


def only_head(arrays):
    return {"lm_head.weight" if name == EMBEDDING else name: array for name, array in arrays.items()}


CASES = {
    "a head that differs": head("lm_head.weight", lambda array: array * 2),
    "one under another name": head("model.lm_head.weight", lambda array: array * 2),
    "a head that repeats the embedding": head("lm_head.weight"),
    "one in float32": head("lm_head.weight", lambda array: array.astype(mx.float32)),
    "a head alone": only_head,
    "AutoModel": renamed(lambda name: name.removeprefix("model.")),
    "one prefix more": renamed(lambda name: name.replace(TEXT, f"{TEXT}model.")),
    "model.model": renamed(lambda name: f"model.{name}"),
    "spare tensors": lambda arrays: {
        **arrays, f"{TEXT}rotary_emb.inv_freq": mx.ones(8), f"{TEXT}layers.1.self_attn.k_scale": mx.ones(1)
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "inner"), [*((case, True) for case in CASES), ("a head that differs", False), ("spare tensors", False)]
)
def test_logits_and_tie_are_those_of_transformers(case, inner, tmp_path):
    folder = write_random_checkpoint(tmp_path / "model", SMALL, mtp=False)
    (file,) = folder.glob("*.safetensors")
    arrays = CASES[case](mx.load(str(file)))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    file.unlink()  # the index stays, and names it
    assert (folder / INDEX).is_file()
    config = json.loads(json.dumps(SMALL))
    config["text_config"]["tie_word_embeddings"] = inner
    Path(folder / "config.json").write_text(json.dumps(config))

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(IDS)).logits.numpy()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert open_checkpoint(folder).config.text.tie_word_embeddings is tied
    assert np.abs(np.array(load_text_model(folder)(mx.array(IDS))) - expected).max() < 1e-4
