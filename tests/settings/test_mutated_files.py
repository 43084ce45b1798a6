"""Every field of every settings file exchanged for what it should not be: a sentence or a value, nothing else."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from mutations import bare, mutants

from mlx_qwen35 import InputError, VisionOptions
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.config import read_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.shapes import mtp_shapes, text_shapes, vision_shapes
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.media.preprocessor_files import read_preprocessor
from mlx_qwen35.prompt.processor import Processor

NANO = Path(str(resources.files("mlx_qwen35") / "nano"))
# Fields that nano's files do not have, for the checkpoints that have them.
SETTINGS = {
    "do_resize": True, "do_rescale": True, "resample": 3, "rescale_factor": 1 / 255, "fps": 2, "min_frames": 4,
    "max_frames": 768,
}  # fmt: skip
MORE = {
    "preprocessor_config": SETTINGS, "video_preprocessor_config": SETTINGS,
    "config": {
        "quantization": {"group_size": 64, "bits": 4, "mode": "affine", "model.layers.0.mlp.up_proj": {"bits": 8}},
        "mlx_lm_extra_tensors": {"mtp_file": "mtp.safetensors"}, "mtp_norm_encoding": "delta",
        "mtplx_mtp_quantization": {"bits": 4, "group_size": 64, "norm_encoding": "delta", "modules": {"fc": {}}},
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "tokenizer_config": {
        "added_tokens_decoder": {"993": {"content": "<|im_end|>", "special": True, "lstrip": False}},
        "additional_special_tokens": ["<|im_start|>"], "extra_special_tokens": {"image_token": "<|image_pad|>"},
        "tool_parser_type": None, "chat_template_type": None, "processor_class": "Qwen3VLProcessor",
    },
}  # fmt: skip


def config(folder: Path) -> None:
    found = read_config(folder)
    text_shapes(found.text), mtp_shapes(found.text)
    if found.vision:
        vision_shapes(found.vision)


def checkpoint(folder: Path) -> None:
    open_checkpoint(folder)
    plan = make_plan(folder)
    json.dumps([plan.config, plan.generation])


def image(folder: Path) -> None:
    settings = read_preprocessor(folder, "image", read_config(NANO).vision)
    assert np.isfinite(settings.image(np.full((64, 96, 3), 90, np.uint8), VisionOptions()).patches()).all()


def clip(folder: Path) -> None:
    settings = read_preprocessor(folder, "video", read_config(NANO).vision)
    frames = [np.full((64, 96, 3), 90, np.uint8)] * 6
    assert np.isfinite(settings.video(frames, VisionOptions(source_fps=4.0)).patches()).all()


def tokenizer(folder: Path) -> None:
    settings = read_config(NANO)
    processor = Processor.from_folder(folder, settings)
    prompt = processor.encode_messages([{"role": "user", "content": "What is 34 + 58?"}])
    processor.decode(prompt.tokens)
    assert max(prompt.tokens) < settings.text.vocab_size


# File, what is read of it, and every how manieth mutant is among the fast ones.
CASES = [
    ("config.json", config, 19), ("config.json", checkpoint, 211), ("generation_config.json", config, 19),
    ("preprocessor_config.json", image, 29), ("video_preprocessor_config.json", clip, 29),
    ("tokenizer_config.json", tokenizer, 97), ("tokenizer.json", tokenizer, 499), ("tokenizer.json", checkpoint, 997),
    ("tokenizer_config.json", checkpoint, 97),
]  # fmt: skip


def faults(folder: Path, name: str, read: Callable[[Path], None], contents: Iterable[tuple[str, str | bytes]]) -> list:
    """What went wrong with which content of a file."""
    wrong = []
    for label, content in contents:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            read(folder)
        except InputError as error:
            if len(str(error).encode()) > 1500:
                wrong.append((label, f"a message of {len(str(error))} characters"))
        except BaseException as error:  # what Rust calls a panic is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong.append((label, repr(error)[:200]))
    return wrong


@pytest.fixture
def folder(tmp_path):
    for file in NANO.iterdir():
        if file.suffix in (".json", ".jinja", ".safetensors"):
            shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def contents(name: str, step: int = 1) -> Iterable[tuple[str, str | bytes]]:
    values = json.loads((NANO / name).read_text()) | MORE.get(name.removesuffix(".json"), {})
    return itertools.chain(mutants(values, step), itertools.islice(bare(), 0, None, step))


@pytest.mark.parametrize(("name", "read", "step"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_some_wrong_values_of_every_file_give_a_sentence(name, read, step, folder):
    assert faults(folder, name, read, contents(name, step)) == []


@pytest.mark.full
@pytest.mark.parametrize(("name", "read"), [case[:2] for case in CASES])
def test_every_wrong_value_of_every_file_gives_a_sentence(name, read, folder):
    assert faults(folder, name, read, contents(name)) == []


@pytest.mark.full
def test_every_wrong_value_of_a_published_config_gives_a_sentence(tmp_path):
    assert faults(tmp_path, "config.json", config, mutants(geometry("4b"))) == []
