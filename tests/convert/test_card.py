"""The model card, quality.json and the plot: what they tell is what the folder holds and what was measured."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.card import CARD, PLOT, QUALITY, Facts, card, quality, sizes, write_card
from mlx_qwen35.convert.files import find_license
from mlx_qwen35.convert.verify import Difference
from mlx_qwen35.measure.divergence import Evaluation

TEXT = "model.language_model."
EVALUATION = Evaluation(
    sequences=8, positions=4088, source_perplexity=7.1, perplexity=7.34567, kl=0.0456789, kl_error=0.00123, kl_99=0.5,
    top1=0.912345, top1_error=0.0045, layers=(0.01, 0.02, 0.04, 0.08),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(raw, tmp_path_factory) -> Path:
    return convert(raw, tmp_path_factory.mktemp("card") / "tiny-4bit", quantize=True)


@pytest.fixture(scope="module")
def facts(folder) -> Facts:
    """A conversion with errors and an evaluation."""
    names = [name for name in open_checkpoint(folder).entries if name.endswith(".weight")]
    return Facts(
        "tiny-4bit", "Qwen/Qwen3.5-4B", "4bit", ("4 bit in bulk",), "searched",
        dict.fromkeys(names, Difference(0.0064, 1.0, 0.5)), EVALUATION, "a novel", "apache-2.0",
    )  # fmt: skip


BARE = Facts("tiny-4bit", "/home/someone/models/tiny", "--quantize")


@pytest.fixture
def written(folder, facts, tmp_path) -> Path:
    target = shutil.copytree(folder, tmp_path / "out")
    write_card(target, facts)
    return target


def front(folder: Path, facts: Facts) -> dict:
    """The front matter, read as Hugging Face reads it."""
    import yaml

    return yaml.safe_load(card(open_checkpoint(folder), facts).split("---\n")[1])


def test_front_matter_is_what_hugging_face_reads(folder, facts):
    assert front(folder, facts) == {
        "license": "apache-2.0",
        "base_model": "Qwen/Qwen3.5-4B",
        "base_model_relation": "quantized",
        "library_name": "mlx",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mlx", "qwen3_5", "4-bit"],
    }


def test_what_is_not_known_is_left_out(folder):
    assert front(folder, BARE) == {
        "library_name": "mlx", "pipeline_tag": "image-text-to-text", "tags": ["mlx", "qwen3_5", "4-bit"],
    }  # fmt: skip
    text = card(open_checkpoint(folder), BARE)
    assert "## Measured" not in text and PLOT not in text and "error" not in text


def test_a_text_model_is_tagged_as_one(tmp_path):
    source = write_random_checkpoint(tmp_path, geometry("tiny"), vision=False)
    assert front(source, BARE) == {"library_name": "mlx", "pipeline_tag": "text-generation", "tags": ["mlx", "qwen3_5"]}
    assert "mlx_vlm" not in card(open_checkpoint(source), BARE)


def test_no_path_of_this_machine_is_told(folder):
    checkpoint = open_checkpoint(folder)
    told = card(checkpoint, BARE) + json.dumps(quality(checkpoint, BARE))
    assert "tiny for MLX" in told and "/home" not in told and str(folder.parent) not in told


def test_parts_add_up_to_everything_in_the_files(raw, folder):
    for checkpoint in map(open_checkpoint, (raw, folder)):
        found = sizes(checkpoint)
        tensors = [*checkpoint.entries.values(), *checkpoint.fp32_original.values()]
        assert set(found) == {"all", "text", "vision", "MTP"}
        assert found["all"].nbytes == sum(entry.nbytes for entry in tensors)
    assert sizes(open_checkpoint(raw))["all"].parameters == found["all"].parameters
    assert 4.5 < found["text"].bits < 4.7 and found["vision"].bits > 8.5


def test_the_card_tells_what_was_measured(folder, facts):
    text = card(open_checkpoint(folder), facts)
    for line in (
        "4088 tokens of a novel in 8 pieces, against the source; ± is one standard error.",
        "| perplexity of the source | 7.1000 |",
        "| perplexity | 7.3457 |",
        "| KL divergence from the source, mean, nats | 0.04568 ± 0.00123 |",
        "| KL divergence, 99th percentile | 0.50000 |",
        "| same most likely token | 91.23 % ± 0.45 |",
        "Qwen/Qwen3.5-4B for MLX",
        "recipe `4bit`, rounding `searched`.",
        "- 4 bit in bulk",
    ):
        assert line in text


def test_one_sequence_has_no_standard_error_in_the_card(folder, facts):
    alone = replace(facts, evaluation=replace(EVALUATION, sequences=1, kl_error=None, top1_error=None))
    text = card(open_checkpoint(folder), alone)
    assert "±" not in text and "| same most likely token | 91.23 % |" in text


def test_matrices_alike_stand_in_one_row_with_their_error(folder, facts):
    text = card(open_checkpoint(folder), facts)
    assert f"| `{TEXT}layers.N.mlp.down_proj` | all | 4 bit, groups of 64 | 4 | 8.00 % |" in text
    assert f"| `{TEXT}embed_tokens` |  | 4 bit, groups of 64 | 1 | 8.00 % |" in text


def test_matrices_not_alike_stand_in_rows_with_their_layers(folder):
    checkpoint = open_checkpoint(folder)
    other = {"vision_tower.blocks.1.attn.proj": {"group_size": 32, "bits": 4, "mode": "affine"}}
    config = replace(checkpoint.config, quantization=checkpoint.config.quantization | other)
    text = card(replace(checkpoint, config=config), BARE)
    assert "| `model.visual.blocks.N.attn.proj` | 0 | 8 bit, groups of 64 | 1 |" in text
    assert "| `model.visual.blocks.N.attn.proj` | 1 | 4 bit, groups of 32 | 1 |" in text


def test_unpacked_matrices_are_told_by_their_dtype(raw):
    assert "| `mtp.fc` |  | bfloat16 | 1 |" in card(open_checkpoint(raw), BARE)


def test_quality_json_holds_every_matrix_and_the_evaluation(written):
    values = json.loads((written / QUALITY).read_text())
    checkpoint = open_checkpoint(written)
    packed = {name for name in checkpoint.entries if checkpoint.quantization(name) and name.endswith("weight")}
    assert packed <= set(values["tensors"])
    assert values["tensors"][f"{TEXT}layers.0.mlp.down_proj.weight"] == {
        "quantization": {"group_size": 64, "bits": 4, "mode": "affine"},
        "relative_squared_error": 0.0064,
        "largest_error": 0.5,
    }
    assert values["evaluation"]["kl"] == EVALUATION.kl and values["evaluation"]["text"] == "a novel"
    assert values["sizes"]["all"]["nbytes"] == sizes(checkpoint)["all"].nbytes


def test_the_same_facts_give_the_same_bytes(written, facts):
    first = {name: (written / name).read_bytes() for name in (CARD, QUALITY, PLOT)}
    write_card(written, facts)
    assert {name: (written / name).read_bytes() for name in first} == first


def test_without_measurements_there_is_no_plot(folder, tmp_path):
    target = shutil.copytree(folder, tmp_path / "out", ignore=shutil.ignore_patterns(PLOT))
    write_card(target, BARE)
    assert (target / CARD).is_file() and not (target / PLOT).exists()


def test_commands_name_the_folder_and_each_program(folder, facts):
    commands = re.search(r"## Use\n\n```\n(.*)\n```", card(open_checkpoint(folder), facts), re.DOTALL)[1]
    programs = ["mlx_qwen35.generate", "mlx_lm.generate", "mlx_vlm.generate"]
    assert [line.split()[:3] for line in commands.splitlines()] == [[p, "--model", "tiny-4bit"] for p in programs]


# --- licence ---------------------------------------------------------------------------------------------------------


def test_the_licence_is_that_of_the_sources_card(tmp_path):
    (tmp_path / CARD).write_text("---\nlibrary_name: x\nlicense: cc-by-4.0\n---\nlicense: mit\n")
    (tmp_path / "LICENSE").write_text("MIT License\nPermission is hereby granted")
    assert find_license(tmp_path) == "cc-by-4.0"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Apache License\nVersion 2.0, January 2004", "apache-2.0"),
        ("MIT License\n\nPermission is hereby granted, free of charge", "mit"),
        ("All rights reserved", None),
    ],
)
def test_without_a_card_the_licence_is_read_from_its_text(tmp_path, text, found):
    (tmp_path / CARD).write_text("no front matter\nlicense: mit\n")
    (tmp_path / "LICENSE").write_text(text)
    assert find_license(tmp_path) == found


def test_a_source_that_says_nothing_has_no_licence(tmp_path):
    assert find_license(tmp_path) is None
