"""What is wrong with an adapter's folder is one InputError, before weights of the model are read."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from adapters import golden_adapters as goldens
from adapters.editing import CONFIG, MLX, PEFT, edited, tensors_file
from parity.cases import Case
from refusing import refused

from mlx_qwen35.checkpoint import adapter_patterns
from mlx_qwen35.checkpoint.adapter import read_adapter
from mlx_qwen35.checkpoint.adapter_choice import check_adapter, choose
from mlx_qwen35.checkpoint.adapter_patterns import Patterns
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint

UP = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_"
UP_A, UP_B = f"{UP}A.weight", f"{UP}B.weight"
VISION_A = "base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight"
MLX_A = "language_model.model.layers.2.mlp.up_proj.lora_a"


@pytest.fixture(scope="module")
def checkpoint(parity_folder: Callable[[Case], Path], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(parity_folder(goldens.MODEL))


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: goldens.write(name, tmp_path / "adapter", checkpoint.folder)


# --- what is there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "  ", "a\0b", 3, None, "~nobody-of-this-name/adapter", "a" * 5000])
def test_a_path_that_is_none_is_refused(path: Any, checkpoint: Checkpoint) -> None:
    with refused("adapter_not_found"):
        read_adapter(path, checkpoint)


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-this-name/adapter", "a" * 5000, "loop"])
@pytest.mark.parametrize("of_command", [False, True])
def test_a_path_that_is_none_has_no_name_either(
    path: str, of_command: bool, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with refused("adapter_not_found"):
        choose(check_adapter("adapter", [path] if of_command else path), 1.0, checkpoint)


def test_a_path_with_a_name_may_be_longer_than_any(checkpoint: Checkpoint) -> None:
    with refused("adapter_not_found"):
        choose(check_adapter("adapter", ["own=" + "a" * 5000]), 1.0, checkpoint)


def test_folders_without_an_adapter_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with refused("adapter_not_found", tmp_path / "none"):
        read_adapter(tmp_path / "none", checkpoint)
    with refused("adapter_not_found", tmp_path):
        read_adapter(tmp_path, checkpoint)
    with refused("adapter_not_found", checkpoint.folder, "holds a model"):
        read_adapter(checkpoint.folder, checkpoint)
    (tmp_path / "file").touch()
    with refused("adapter_not_found", "a file"):
        read_adapter(tmp_path / "file", checkpoint)


@pytest.mark.parametrize(("name", "file"), [("peft-plain", PEFT), ("mlx-lora", MLX)])
def test_folders_that_lack_a_file_are_refused(
    name: str, file: str, folder: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    path = folder(name)
    (path / file).rename(path / "other.safetensors")
    with refused("adapter_not_found", file, "other.safetensors"):
        read_adapter(path, checkpoint)
    (path / "other.safetensors").rename(path / file)
    (path / CONFIG).unlink()
    with refused("adapter_invalid", file, CONFIG):
        read_adapter(path, checkpoint)


def test_pickled_tensors_are_refused_with_advice(folder: Callable[[str], Path], checkpoint: Checkpoint) -> None:
    path = folder("peft-plain")
    (path / PEFT).rename(path / "adapter_model.bin")
    with refused("adapter_unsupported", "adapter_model.bin", "safe_serialization"):
        read_adapter(path, checkpoint)


@pytest.mark.parametrize(
    "config",
    [b"", b"[1]", b"{", b"\xff", b'{"a": 1}', b'{"peft_type": "LORA"}', b'{"peft_type": "LORA", "r": 2}',
     b'{"r": 2, "r": 2, "peft_type": "LORA"}', b'{"rank": "two"}', b'{"lora_parameters": {"rank": 6}}',
     b'{"lora_parameters": 3, "rank": 3}'],
)  # fmt: skip
def test_a_damaged_configuration_is_refused(
    config: bytes, folder: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    path = folder("mlx-lora" if b"rank" in config else "peft-plain")
    (path / CONFIG).write_bytes(config)
    with refused("adapter_invalid", path):
        read_adapter(path, checkpoint)


@pytest.mark.parametrize("cut", [0, 7, 300, -4, None])
def test_a_damaged_file_of_tensors_is_refused(
    cut: int | None, folder: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    path = folder("peft-plain")
    data = (path / PEFT).read_bytes()
    (path / PEFT).write_bytes(data + b"more" if cut is None else data[:cut])
    with refused("adapter_invalid", path):
        read_adapter(path, checkpoint)


# --- kinds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"), ("peft_type", None), ("bias", "all"), ("bias", "lora_only"), ("fan_in_fan_out", True),
        ("layer_replication", [[0, 4], [2, 4]]), ("alora_invocation_tokens", [1, 2]), ("lora_bias", True),
        ("use_qalora", True), ("trainable_token_indices", [5]), ("target_parameters", ["a"]), ("use_bdlora", {"n": 1}),
        ("arrow_config", {"top_k": 3}), ("kasa_config", {"beta": 1}), ("monteclora_config", {"n": 1}),
        ("megatron_config", {"n": 1}), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"),
        ("a_field_of_a_newer_peft", 0.5),
    ],
)  # fmt: skip
def test_what_is_not_plain_lora_is_refused_by_name(
    field: str, value: Any, folder: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    path = edited(folder("peft-plain"), **{field: value})
    with refused("adapter_unsupported", field):
        read_adapter(path, checkpoint)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_dropout": 0.5}, {"init_lora_weights": "eva", "eva_config": {"rho": 2}}, {"loftq_config": {"bits": 4}},
        {"corda_config": {"verbose": True}}, {"layers_to_transform": [0]}, {"exclude_modules": ["x"]},
        {"peft_version": "9.9"}, {"a_field_of_a_newer_peft": None}, {"lorap_emb_lr": 1e-6}, {"velora_config": {"a": 1}},
    ],
)  # fmt: skip
def test_how_an_adapter_was_trained_does_not_matter(
    config: dict[str, Any], folder: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    assert read_adapter(edited(folder("peft-plain"), **config), checkpoint).pairs


def test_kinds_of_mlx_lm_that_are_not_known_are_refused(folder: Callable[[str], Path], checkpoint: Checkpoint) -> None:
    with refused("adapter_unsupported", "fine_tune_type"):
        read_adapter(edited(folder("mlx-lora"), fine_tune_type="prefix"), checkpoint)


def test_a_low_rank_part_of_what_is_no_map_is_refused(folder: Callable[[str], Path], checkpoint: Checkpoint) -> None:
    conv = "base_model.model.model.language_model.layers.0.linear_attn.conv1d.lora_"
    tensors = {f"{conv}A.weight": mx.zeros((2, 1, 4)), f"{conv}B.weight": mx.zeros((1152, 2, 1))}
    with refused("adapter_unsupported", "conv1d"):
        read_adapter(edited(folder("peft-plain"), tensors), checkpoint)


def test_a_table_whose_columns_are_scaled_is_refused(folder: Callable[[str], Path], checkpoint: Checkpoint) -> None:
    key = "base_model.model.model.language_model.embed_tokens.lora_magnitude_vector"
    with refused("adapter_unsupported", "DoRA"):
        read_adapter(edited(folder("peft-embedding"), {key: mx.ones(256)}), checkpoint)


# --- names and shapes ------------------------------------------------------------------------------------------------

Tensors = dict[str, mx.array | None]
WRONG: dict[str, tuple[str, Tensors, str, str]] = {  # golden, changes, code, a fact of the message
    "unknown": ("peft-plain", {
        "base_model.model.model.language_model.layers.9.x.weight": mx.zeros(2)
    }, "adapter_mismatch", "layers.9.x"),
    "adapter's name in keys": ("peft-plain", {f"{UP}A.default.weight": mx.zeros((2, 256))}, "adapter_mismatch", "def"),
    "in": ("peft-plain", {UP_A: mx.zeros((2, 255))}, "adapter_mismatch", "[2, 256]"),
    "out": ("peft-plain", {UP_B: mx.zeros((449, 2))}, "adapter_mismatch", "[448, 2]"),
    "transposed": ("peft-plain", {UP_A: mx.zeros((256, 2))}, "adapter_mismatch", "[2, 256]"),
    "rank of A": ("peft-plain", {UP_A: mx.zeros((3, 256))}, "adapter_invalid", "[3, 256]"),
    "rank of both": (
        "peft-plain", {UP_A: mx.zeros((3, 256)), UP_B: mx.zeros((448, 3))}, "adapter_invalid", "[2, 256]"
    ),
    "no B": ("peft-plain", {UP_B: None}, "adapter_invalid", "no B"),
    "no A": ("peft-plain", {UP_A: None}, "adapter_invalid", "no A"),
    "magnitude alone": ("peft-dora", {
        "base_model.model.model.language_model.layers.3.self_attn.o_proj.lora_magnitude_vector": mx.zeros(256)
    }, "adapter_invalid", "o_proj"),
    "twice": ("peft-plain", {
        "base_model.model.language_model.layers.0.mlp.up_proj.lora_A.weight": mx.zeros((2, 256))
    }, "adapter_invalid", "mixes"),
    "two classes": ("peft-causal", {
        UP_A: mx.zeros((3, 256)), UP_B: mx.zeros((448, 3))
    }, "adapter_invalid", "mixes"),
    "whole and low-rank": ("peft-plain", {
        "base_model.model.model.language_model.layers.0.mlp.up_proj.weight": mx.zeros((448, 256))
    }, "adapter_invalid", "up_proj"),
    "integers": ("peft-plain", {UP_A: mx.zeros((2, 256), mx.int32)}, "dtype_unsupported", "I32"),
    "nan": ("peft-plain", {UP_A: mx.full((2, 256), float("nan"))}, "weights_not_finite", "up_proj"),
    "inf": ("peft-dora", {UP_A.replace("up_proj.lora_A.weight", "down_proj.lora_magnitude_vector"):
                          mx.full((256,), float("inf"), mx.bfloat16)}, "weights_not_finite", "down_proj"),
    "nan in a whole tensor": ("peft-norm", {
        "base_model.model.model.language_model.norm.weight": mx.full((256,), float("nan"))
    }, "weights_not_finite", "norm"),
    "mlx: not transposed": ("mlx-lora", {MLX_A: mx.zeros((6, 256))}, "adapter_mismatch", "[256, 6]"),
    "mlx: rank": ("mlx-lora", {MLX_A: mx.zeros((256, 4))}, "adapter_invalid", "[256, 6]"),
    "mlx: no magnitude": ("mlx-dora", {
        "language_model.model.layers.3.mlp.down_proj.m": None
    }, "adapter_invalid", "DoRA"),
    "no magnitude": ("peft-dora", {
        UP_A.replace("up_proj.lora_A.weight", "down_proj.lora_magnitude_vector"): None
    }, "adapter_invalid", "DoRA"),
    "a magnitude": ("peft-plain", {
        UP_A.replace("lora_A.weight", "lora_magnitude_vector"): mx.ones(448)
    }, "adapter_invalid", "DoRA"),
    "mlx: half": ("mlx-lora", {MLX_A: None}, "adapter_invalid", "no A"),
    "mlx: another layer": ("mlx-lora", {
        MLX_A.replace("layers.2", "layers.1"): mx.zeros((256, 6))
    }, "adapter_invalid", "layers.1"),
    "mlx: another module": ("mlx-dora", {
        "language_model.model.layers.3.mlp.up_proj.lora_a": mx.zeros((256, 2))
    }, "adapter_invalid", "up_proj"),
    "mlx: raw convolution": ("mlx-full", {
        "language_model.model.layers.2.linear_attn.conv1d.weight": mx.zeros((768, 1, 4))
    }, "adapter_mismatch", "conv1d"),
    "mlx: packed": ("mlx-full", {
        "language_model.model.layers.2.mlp.up_proj.scales": mx.zeros((448, 4))
    }, "adapter_mismatch", "scales"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit_are_refused(
    case: str, folder: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    name, tensors, code, fact = WRONG[case]
    with refused(code, fact):
        read_adapter(edited(folder(name), tensors), checkpoint)


def test_float8_is_refused(folder: Callable[[str], Path], checkpoint: Checkpoint) -> None:
    path = folder("peft-plain")
    header = {UP_A: {"dtype": "F8_E4M3", "shape": [2, 256], "data_offsets": [0, 512]}}
    header[UP_B] = {"dtype": "F32", "shape": [448, 2], "data_offsets": [512, 512 + 448 * 8]}
    text = json.dumps(header).encode()
    (path / PEFT).write_bytes(struct.pack("<Q", len(text)) + text + bytes(512 + 448 * 8))
    with refused("dtype_unsupported", "F8_E4M3"):
        read_adapter(path, checkpoint)


def test_float64_is_read(folder: Callable[[str], Path], checkpoint: Checkpoint) -> None:
    path = folder("peft-plain")
    header = {UP_A: {"dtype": "F64", "shape": [2, 256], "data_offsets": [0, 4096]}}
    header[UP_B] = {"dtype": "F32", "shape": [448, 2], "data_offsets": [4096, 4096 + 448 * 8]}
    text = json.dumps(header).encode()
    numbers = struct.pack("<512d", *range(512))
    (path / PEFT).write_bytes(struct.pack("<Q", len(text)) + text + numbers + bytes(448 * 8))
    ((_, pair),) = read_adapter(path, checkpoint).pairs.items()
    assert pair.a.dtype == mx.float32 and pair.a[1, 255].item() == 511


@pytest.mark.parametrize(
    "pattern", ["(", "[", "a)|(b", "a" * 2000, "(" * 30 + ")" * 30, "a(?=b)", "(?!a).*", r".*\bq_proj"]
)
def test_patterns_that_are_no_expression_are_refused(
    pattern: str, folder: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    path = edited(folder("peft-plain"), alpha_pattern={pattern: 3})
    with refused("adapter_invalid", "alpha_pattern"):
        read_adapter(path, checkpoint)


@pytest.mark.parametrize("pattern", ["([a-z_.0-9]+)+!", "(.|.)*" * 99 + "!", "((((.?){99}){99}){99}){99}!"])
def test_a_pattern_that_fits_in_many_ways_takes_no_longer(
    pattern: str, folder: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    path = folder("peft-plain")
    same = {name: pair.scale for name, pair in read_adapter(path, checkpoint).pairs.items()}
    found = read_adapter(edited(path, alpha_pattern={pattern: 3}), checkpoint)
    assert {name: pair.scale for name, pair in found.pairs.items()} == same


def test_patterns_that_take_too_many_steps_are_refused(
    folder: Callable[[str], Path], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_patterns, "STEPS", 1000)
    with refused("adapter_invalid", "alpha_pattern"):
        read_adapter(edited(folder("peft-plain"), alpha_pattern={f"{i}.*": 3 for i in range(99)}), checkpoint)


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", "q.proj", ".*", ".*q_proj", "layers.*.q_proj", "^model", "^model.*", "(q|k)_proj", "proj$", "x{}", "a{1",
     r"layers\.([0-3]|1\d)\..*", r"layers\.\d+\.self_attn\.[qk]_proj", "(?:a|self)_attn.q_proj", "q?q?q_proj", "",
     "|q_proj", "[^a-p]_proj", "[]q]_proj", ".*?[.]q_p{1}ro{0,2}j", "q_p{2,}roj", "(q_|p|r|o|j){,9}", "(q_|p|r|o|j){5}",
     "(|x)+q_proj", "(q_proj)*", r"\w+", r"\w+(\.\w+)*", "(^m|o|d|e|l|.)+", "(a?){70}q_proj", "((.?){9}){9}", r".*\.$",
     "q_proj|(.*x)"],
)  # fmt: skip
def test_a_pattern_fits_what_re_fits(pattern: str) -> None:
    fits = Patterns().compiled(pattern)
    names = ["model.layers.1.self_attn.q_proj", "model.layers.12.self_attn.k_proj", "q_proj", "x{}", "a{1", "model."]
    assert [fits(name) for name in names] == [bool(re.match(rf"(.*\.)?({pattern})$", name)) for name in names]


@pytest.mark.parametrize(
    "config", [{"r": 0}, {"r": 2.5}, {"r": "2"}, {"lora_alpha": None}, {"lora_alpha": "x"}, {"use_rslora": 1},
               {"rank_pattern": [1]}, {"rank_pattern": {"up_proj": 0}}, {"alpha_pattern": {"up_proj": "a"}}]
)  # fmt: skip
def test_fields_of_the_wrong_kind_are_refused(
    config: dict[str, Any], folder: Callable[[str], Path], checkpoint: Checkpoint
) -> None:
    with refused("adapter_invalid", *config):
        read_adapter(edited(folder("peft-plain"), **config), checkpoint)


# --- parts that a checkpoint lacks -----------------------------------------------------------------------------------


def test_parts_for_a_vision_encoder_need_one(
    folder: Callable[[str], Path], checkpoint_folder: Callable[..., Path]
) -> None:
    with refused("vision_missing", "model.visual."):
        read_adapter(folder("peft-rslora-vision"), open_checkpoint(checkpoint_folder(vision=False)))


@pytest.fixture
def with_head(folder: Callable[[str], Path]) -> Callable[..., Path]:
    """(metadata, tensors) -> an adapter's folder with low-rank parts for the draft head."""

    def write(metadata: dict[str, str], tensors: dict[str, mx.array]) -> Path:
        path = folder("mlx-lora")
        mx.save_safetensors(str(path / "mtp_adapter.safetensors"), tensors, metadata)
        return path

    return write


HEAD = {
    "base_model.model.mtp.fc.lora_A.weight": mx.ones((3, 512)),
    "base_model.model.mtp.fc.lora_B.weight": mx.ones((256, 3)),
}


def test_parts_for_a_draft_head_stand_beside_any_adapter_and_need_one(
    with_head: Callable[..., Path], checkpoint: Checkpoint, checkpoint_folder: Callable[..., Path]
) -> None:
    path = with_head({"rank": "3", "alpha": "6"}, HEAD)
    found = read_adapter(path, open_checkpoint(checkpoint_folder()))
    assert found.format == "mlx-lm" and found.pairs["mtp.fc.weight"].scale == 2.0
    with refused("draft_head_missing", "mtp_adapter.safetensors"):
        read_adapter(path, checkpoint)


@pytest.mark.parametrize(
    ("metadata", "tensors", "code"),
    [
        ({}, HEAD, "adapter_invalid"),
        ({"rank": "3", "alpha": "nan"}, HEAD, "adapter_invalid"),
        ({"rank": "x", "alpha": "6"}, HEAD, "adapter_invalid"),
        ({"rank": "0", "alpha": "6"}, HEAD, "adapter_invalid"),
        ({"rank": "4", "alpha": "6"}, HEAD, "adapter_invalid"),
        ({"rank": "3", "alpha": "6"}, dict(list(HEAD.items())[:1]), "adapter_invalid"),
        ({"rank": "3", "alpha": "6"}, {"base_model.model.mtp.fc.weight": mx.zeros((256, 512))}, "adapter_invalid"),
        ({"rank": "2", "alpha": "6"}, {UP_A: mx.zeros((2, 256))}, "adapter_invalid"),
        ({"rank": "3", "alpha": "6"}, {"base_model.model.mtp.x.lora_A.weight": mx.zeros((3, 2))}, "adapter_mismatch"),
    ],
)
def test_a_damaged_file_for_the_draft_head_is_refused(
    metadata: dict[str, str], tensors: dict[str, mx.array], code: str, with_head: Callable[..., Path],
    checkpoint_folder: Callable[..., Path],
) -> None:  # fmt: skip
    with refused(code):
        read_adapter(with_head(metadata, tensors), open_checkpoint(checkpoint_folder()))


# --- scale and order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, True, 1e9])
def test_a_scale_must_be_a_number(scale: Any, folder: Callable[[str], Path], checkpoint: Checkpoint) -> None:
    with refused("option_invalid", "adapter_scale"):
        read_adapter(folder("peft-plain"), checkpoint, scale)


@pytest.mark.parametrize("name", ["peft-norm", "mlx-full"])
def test_whole_tensors_have_no_scale(name: str, folder: Callable[[str], Path], checkpoint: Checkpoint) -> None:
    with refused("option_no_effect", "adapter_scale"):
        read_adapter(folder(name), checkpoint, 0.5)


def test_no_weight_of_the_model_is_read(folder: Callable[[str], Path], checkpoint: Checkpoint, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint.folder, copy)
    opened = open_checkpoint(copy)
    for file in copy.glob("*.safetensors"):
        file.unlink()
    assert read_adapter(folder("peft-plain"), opened).pairs
    path = folder("peft-plain")
    with refused("adapter_mismatch", "trained on (tiny)"):
        read_adapter(edited(path, {UP_A: mx.zeros((1, 1))}), opened)
    assert tensors_file(path).is_file()
