"""A fingerprint tells models apart whose caches must not be mixed, and no others."""

import json

import mlx.core as mx
import pytest

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.fingerprint import fingerprint
from mlx_qwen35.checkpoint.tensors import read_header

NORM = "model.language_model.norm.weight"


def of(folder) -> str:
    return fingerprint(open_checkpoint(folder))


def test_copies_have_one_fingerprint_and_rotary_embedding_and_window_do_not_count(checkpoint_folder, checkpoint_copy):
    folder = checkpoint_copy()
    assert of(folder) == of(checkpoint_folder())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 5.0
    config["text_config"]["max_position_embeddings"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    assert of(folder) == of(checkpoint_folder())


@pytest.mark.full
def test_shards_and_the_draft_head_do_not_count(checkpoint_folder):
    assert of(checkpoint_folder(shard_bytes=4e6)) == of(checkpoint_folder(mtp=False)) == of(checkpoint_folder())


@pytest.mark.full
@pytest.mark.parametrize("other", [{"seed": 1}, {"dtype": mx.float16}, {"vision": False}])
def test_other_weights_dtypes_and_parts_have_others(checkpoint_folder, other):
    assert of(checkpoint_folder(**other)) != of(checkpoint_folder())


def test_one_changed_number_or_field_is_enough(checkpoint_folder, checkpoint_copy):
    folder = checkpoint_copy()
    (entry,) = [read_header(file)[NORM] for file in folder.glob("*.safetensors") if NORM in read_header(file)]
    with entry.file.open("r+b") as file:
        file.seek(entry.start)
        first = file.read(1)[0]
        file.seek(entry.start)
        file.write(bytes([first ^ 1]))
    assert of(folder) != of(checkpoint_folder())
    other = checkpoint_copy()
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (other / "config.json").write_text(json.dumps(config))
    assert of(other) != of(checkpoint_folder())
