"""What ranks must have in common."""

import json
from dataclasses import replace

import pytest
from refusing import refused

from mlx_qwen35.checkpoint.adapter_choice import choose
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.distributed.handshake import Facts, agree

HOSTS = ["big.local", "mini.local", "old.local"]


@pytest.fixture
def facts(checkpoint_folder) -> Facts:
    checkpoint = open_checkpoint(checkpoint_folder())
    return Facts.of(checkpoint, choose(None, 1.0, checkpoint), limit=8_000)


def test_facts_pass_the_channel_unchanged(facts):
    assert Facts.from_json(json.loads(json.dumps(facts.as_json()))) == facts


def test_ranks_that_differ_in_memory_and_folder_agree(facts):
    others = [replace(facts, memory=5, folder="/models/x"), replace(facts, memory=9)]
    agree([facts, *others], HOSTS)


@pytest.mark.parametrize("field, value, told", [
    ("versions", {"mlx-qwen35": "0.0.1"}, ["mlx-qwen35", "0.0.1", "old.local"]),
    ("code", "0123456789abcdef", ["code", "0123456789ab", "different commits"]),
    ("versions", {"mlx": "0.31.0"}, ["mlx", "0.31.0", "pip install mlx=="]),
    ("device", "metal", ["device", "'cpu'", "'metal'"]),
    ("config", {"hidden_size": 77}, ["config hidden_size", "256", "77"]),
    ("config", {"rope": {"theta": 5}}, ["config rope", "5"]),
    ("quantization", {"bits": 4}, ["quantization bits", "none", "4"]),
    ("weights", "0123456789abcdef", ["weights", "0123456789ab", "rsync -aL --delete"]),
    ("adapters", {"tone": "fedcba9876543210"}, ["adapters tone", "none", "fedcba987654", "adapter's folder"]),
])  # fmt: skip
def test_ranks_that_differ_are_refused_with_both_values(facts, field, value, told):
    own = getattr(facts, field)
    other = replace(facts, folder="/models/other", **{field: own | value if isinstance(value, dict) else value})
    with refused("ranks_differ", "rank 0 (big.local)", "rank 2 (old.local)", *told):
        agree([facts, facts, other], HOSTS)


def test_facts_of_a_version_that_has_other_fields_are_refused_by_its_version(facts):
    values = facts.as_json() | {"new": 1, "versions": facts.versions | {"mlx-qwen35": "9.9"}}
    del values["quantization"]
    with refused("ranks_differ", "mlx-qwen35", "9.9"):
        agree([facts, Facts.from_json(values)], HOSTS)


def test_another_model_of_the_same_shape_is_told_by_its_weights(facts, checkpoint_folder):
    checkpoint = open_checkpoint(checkpoint_folder(seed=1))
    other = Facts.of(checkpoint, choose(None, 1.0, checkpoint))
    with refused("ranks_differ", "weights", facts.weights[:12], other.weights[:12], f"mini.local:{checkpoint.folder}/"):
        agree([facts, other], HOSTS)
