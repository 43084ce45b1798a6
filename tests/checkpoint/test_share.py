"""The parts of a model that several machines hold: all of them are the whole, and together they answer as it does."""

import os
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from dividing import FOURS, SAME, SIZES, difference, divided, loaded, of_pipeline, of_sums, piped, prompt
from geometries import changed
from mlx.utils import tree_flatten
from refusing import refused
from safetensors.numpy import save_file

from mlx_qwen35.budget.plan import loaded_bytes, names
from mlx_qwen35.checkpoint.arrays import lazy_arrays
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.config import TextConfig, parse_config
from mlx_qwen35.checkpoint.cut import cut
from mlx_qwen35.checkpoint.names import MTP, TABLE, TEXT, VISION, is_zero_centred
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.shapes import text_shapes
from mlx_qwen35.checkpoint.share import Share
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import RECIPES, StorageOptions
from mlx_qwen35.convert.stream import write
from mlx_qwen35.convert.target import appearing_whole
from mlx_qwen35.model.model import Model

UNTIED = changed(FOURS, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def folders(checkpoint_folder, tmp_path_factory) -> Callable[[str], Path]:
    """A folder of each form, by its name."""
    made: dict[str, Path] = {}

    def folder(form: str) -> Path:
        if form not in made:
            config, dtype = UNTIED if form in ("untied", "8bit") else FOURS, getattr(mx, form, mx.bfloat16)
            raw = checkpoint_folder(config, dtype=mx.float32 if form == "float64" else dtype)
            made[form] = in_form(form, raw, tmp_path_factory.mktemp("form") / form)
        return made[form]

    return folder


def in_form(form: str, raw: Path, target: Path) -> Path:
    """A raw checkpoint as a program stores it."""
    if form in RECIPES:
        with appearing_whole(target, False) as folder:
            write(make_plan(raw, StorageOptions(recipe=form, rounding="nearest")), folder, verify=False)
        return target
    change = {"mlx": in_mlx_layout, "float64": in_float64}.get(form)
    if change is None:
        return raw
    target.mkdir()
    shutil.copyfile(raw / "config.json", target / "config.json")
    arrays = {name: array for file in raw.glob("*.safetensors") for name, array in mx.load(str(file)).items()}
    change(arrays, target / "model.safetensors")
    return target


def in_mlx_layout(arrays: dict[str, mx.array], file: Path) -> None:
    """conv1d [C, K, 1], and norms to which one was added."""
    for name, array in arrays.items():
        if name.endswith("conv1d.weight"):
            arrays[name] = mx.contiguous(array.swapaxes(1, 2))
        elif name.endswith("patch_embed.proj.weight"):
            arrays[name] = mx.contiguous(mx.moveaxis(array, 1, 4))
        elif is_zero_centred(name):
            arrays[name] = array.astype(mx.float32) + 1.0
    mx.save_safetensors(str(file), arrays)


def in_float64(arrays: dict[str, mx.array], file: Path) -> None:
    """Some of what is cut by rows and by columns in float64."""
    wide = ("in_proj_qkv.weight", "down_proj.weight", "A_log")
    save_file({n: np.array(a).astype(np.float64 if n.endswith(wide) else np.float32) for n, a in arrays.items()}, file)


FORMS = ["bfloat16", "4bit", "float32", "untied", "8bit", "mxfp4", "mlx", "float64"]


@pytest.fixture(scope="module")
def opened(folders) -> Callable[[str], Checkpoint]:
    return lambda form: open_checkpoint(folders(form))


def numbers(array: mx.array) -> np.ndarray:
    return np.array(array if array.dtype in (mx.uint32, mx.uint8) else array.astype(mx.float32))


# --- what each machine has of each tensor -----------------------------------------------------------------------------


def heads(owned: range, width: int, before: int = 0) -> list[int]:
    """The rows of these heads, of `width` each, behind `before` others."""
    return [before + head * width + i for head in owned for i in range(width)]


def own(count: int, rank: int, size: int) -> range:
    return range(count * rank // size, count * (rank + 1) // size)


def held(name: str, whole: np.ndarray, c: TextConfig, rank: int, size: int) -> np.ndarray:
    """What machine `rank` of `size` must have of a tensor, written down head by head."""
    key, value = own(c.linear_num_key_heads, rank, size), own(c.linear_num_value_heads, rank, size)
    query, kv = own(c.num_attention_heads, rank, size), own(c.num_key_value_heads, rank, size)
    Dk, Dv = c.linear_key_head_dim, c.linear_value_head_dim
    mixed = heads(key, Dk) + heads(key, Dk, c.key_dim) + heads(value, Dv, 2 * c.key_dim)
    rows = {
        "in_proj_qkv": mixed, "conv1d": mixed, "in_proj_z": heads(value, Dv), "in_proj_a": [*value],
        "in_proj_b": [*value], "A_log": [*value], "dt_bias": [*value],
        "q_proj": heads(query, 2 * c.head_dim), "k_proj": heads(kv, c.head_dim), "v_proj": heads(kv, c.head_dim),
        "gate_proj": [*own(c.intermediate_size, rank, size)], "up_proj": [*own(c.intermediate_size, rank, size)],
    }  # fmt: skip
    for module, owned in rows.items():
        if f".{module}" in name:
            return whole[owned]
    if any(f".{module}." in name for module in ("out_proj", "o_proj", "down_proj")):
        return np.split(whole, size, axis=1)[rank]
    if "embed_tokens" in name or "lm_head" in name:
        block = -(-len(whole) // size)
        return whole[rank * block : (rank + 1) * block]
    assert "norm" in name, name
    return whole


@pytest.mark.core(2)
@pytest.mark.parametrize("form", FORMS)
def test_each_machine_has_its_heads_and_rows_and_columns_of_every_tensor(form, opened):
    checkpoint = opened(form)
    config, stored = checkpoint.config.text, [name for name, _ in checkpoint.part(text_shapes(checkpoint.config.text))]
    whole = {name: numbers(array) for name, array in lazy_arrays(checkpoint, stored).items()}
    for size in SIZES:
        for rank in range(size):
            part = Share.tensor(config, rank, size).of(checkpoint)
            arrays = lazy_arrays(part, stored)
            for name, array in arrays.items():
                assert np.array_equal(numbers(array), held(name, whole[name], config, rank, size)), (name, rank, size)


@pytest.mark.core(2)
@pytest.mark.parametrize("form", FORMS)
def test_a_part_is_a_checkpoint_as_its_smaller_configuration_says(form, opened):
    checkpoint = opened(form)
    for share in shares(checkpoint.config.text):
        part = share.of(checkpoint)
        expected = dict(part.part(text_shapes(part.config.text)))
        entries = {name: e for name, e in part.entries.items() if not name.startswith((VISION, MTP))}
        assert {name: entry.shape for name, entry in entries.items()} == expected
        assert {name: numbers(array).shape for name, array in lazy_arrays(part, [*expected]).items()} == {
            name: (shape[0], 1, shape[1]) if "conv1d" in name and not part.raw else shape
            for name, shape in expected.items()
        }
        assert all(part.entries[name].shape == entry.shape for name, entry in part.fp32_original.items())


def shares(config: TextConfig) -> list[Share]:
    return [Share.tensor(config, 1, 4), *Share.pipelines(config, [range(3), range(3, 4)])]


def test_a_machine_of_a_pipeline_has_its_layers_from_0_on_with_their_own_quantization(opened):
    checkpoint = opened("4bit")
    text, whole = checkpoint.config.text, checkpoint.config.quantization
    packed = [name for name in checkpoint.entries if name.endswith(".scales")]
    for layers in (range(1), range(1, 4)):
        part = Share.pipeline(text, layers).of(checkpoint)
        for name in (name for name in part.entries if name.startswith(f"{TEXT}layers.")):
            number, _, rest = name.removeprefix(f"{TEXT}layers.").partition(".")
            old = f"{TEXT}layers.{int(number) + layers.start}.{rest}"
            assert part.entries[name] == checkpoint.entries[old]
            assert part.quantization(name) == checkpoint.quantization(old)
    assert len({str(checkpoint.quantization(name.replace("scales", "weight"))) for name in packed}) > 1, whole


def test_vision_encoder_and_draft_head_stay_as_they_are(opened):
    checkpoint = opened("bfloat16")
    for share in shares(checkpoint.config.text):
        part = share.of(checkpoint)
        for prefix in (VISION, MTP):
            kept = [{n: e for n, e in own.entries.items() if n.startswith(prefix)} for own in (checkpoint, part)]
            assert kept[0] and kept[0] == kept[1]


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(opened) -> Callable[[str], mx.array]:
    """The whole model's logits."""
    known: dict[str, mx.array] = {}

    def answer(form: str) -> mx.array:
        if form not in known:
            known[form] = loaded(opened(form))(prompt())
            mx.eval(known[form])
        return known[form]

    return answer


@pytest.mark.core(3)
@pytest.mark.parametrize(("form", "size"), [(form, size) for size in SIZES for form in FORMS])
def test_the_parts_added_up_answer_as_the_whole_does(form, size, opened, answers):
    assert difference(of_sums(divided(opened(form), size), prompt()), answers(form)) < SAME


@pytest.mark.core(2)
@pytest.mark.parametrize(("form", "ends"), [(form, ends) for ends in ((1, 4), (1, 3, 4)) for form in FORMS])
def test_a_pipeline_answers_as_the_whole_does_to_the_bit(form, ends, opened, answers):
    assert mx.array_equal(of_pipeline(piped(opened(form), *ends), prompt()), answers(form)).item()


@pytest.mark.full
@pytest.mark.parametrize("end", [1, 3, 7])
def test_a_pipeline_of_a_larger_model_answers_to_the_bit(end, checkpoint_folder):
    checkpoint = open_checkpoint(checkpoint_folder(geometry("mid")))
    tokens = prompt(vocabulary=32000)
    assert mx.array_equal(of_pipeline(piped(checkpoint, end, 8), tokens), loaded(checkpoint)(tokens)).item()


@pytest.mark.full
def test_the_halves_of_a_larger_model_answer_as_the_whole_does(checkpoint_folder):
    """With the reference BLAS of MLX's wheel, logits of transformers in float64 are 2.9e-5 from those of one process at
    most, and 3.1e-5 from those of the halves; the root mean square of both is 3.7e-6. The two are 1.2e-5 apart, with
    OpenBLAS 8.6e-6: what one process is off by itself, and no more.
    """
    checkpoint = open_checkpoint(checkpoint_folder(geometry("mid")))
    tokens = prompt(vocabulary=32000)
    assert difference(of_sums(divided(checkpoint, 2), tokens), loaded(checkpoint)(tokens)) < 3 * SAME


@pytest.mark.core(1)
@pytest.mark.parametrize("order", [(1, 0, 2), None], ids=["k before q", "one range of all rows"])
def test_wrong_segments_of_q_and_k_and_v_do_not_answer_as_the_whole_does(order, opened, answers):
    checkpoint = opened("bfloat16")

    def wrong(share: Share) -> Model:
        part = share.of(checkpoint)
        entries = dict(part.entries)
        for name in [name for name in entries if "in_proj_qkv" in name or "conv1d" in name]:
            whole, ranges = checkpoint.entries[name], entries[name].ranges
            step = whole.shape[0] // share.parts
            ranges = [ranges[i] for i in order] if order else [range(share.part * step, (share.part + 1) * step)]
            entries[name] = cut(whole, 0, ranges)
        return loaded(replace(part, entries=entries))

    ranks = [wrong(Share.tensor(checkpoint.config.text, rank, 2)) for rank in range(2)]
    assert difference(of_sums(ranks, prompt()), answers("bfloat16")) > 1000 * SAME


def test_the_whole_checkpoint_serves_the_parts_that_are_loaded_later(opened):
    checkpoint = opened("bfloat16")
    whole, part = loaded(checkpoint), loaded(checkpoint, Share.tensor(checkpoint.config.text, 0, 2))
    assert part.fingerprint() == whole.fingerprint()
    for own, other in ((part.mtp, whole.mtp), (part.vision, whole.vision)):
        assert own.nbytes == other.nbytes
        pairs = zip(tree_flatten(own.part.parameters()), tree_flatten(other.part.parameters()), strict=True)
        assert all(mx.array_equal(a[1], b[1]).item() for a, b in pairs)


# --- bytes ------------------------------------------------------------------------------------------------------------


def memory(model: Model) -> int:
    return sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())


@pytest.mark.core(2)
@pytest.mark.filterwarnings("ignore:.*kept in float32")
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_part_takes_the_memory_that_the_plan_says(form, dtype, opened):
    checkpoint = opened(form)
    for share in shares(checkpoint.config.text)[: 1 if form == "float64" else 3]:  # float64 is planned as float32
        part = share.of(checkpoint)
        planned = loaded_bytes(part, names(part, text_shapes(part.config.text)), dtype)
        assert abs(memory(loaded(checkpoint, share, dtype)) - planned) < 0.01 * planned


class Reads:
    """What is read of files by os.pread: bytes of each range."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.ranges: set[tuple[int, int]] = set()
        pread = os.pread

        def counted(file: int, nbytes: int, start: int) -> bytes:
            self.ranges.add((start, start + nbytes))
            return pread(file, nbytes, start)

        monkeypatch.setattr(os, "pread", counted)


@pytest.mark.parametrize("form", ["bfloat16", "4bit"])
def test_rows_are_read_alone_and_columns_out_of_blocks_of_rows(form, opened, monkeypatch):
    checkpoint = opened(form)
    part = Share.tensor(checkpoint.config.text, 1, 4).of(checkpoint)
    reads = Reads(monkeypatch)
    for name, entry in part.entries.items():
        if entry.partial:
            reads.ranges.clear()
            lazy_arrays(part, [name])
            read, columns = sum(stop - start for start, stop in reads.ranges), entry.shape[0] == entry.tensor.shape[0]
            assert read == (4 * entry.nbytes if columns else entry.nbytes), name


def test_of_a_table_without_rows_nothing_is_read(opened, monkeypatch):
    checkpoint = opened("4bit")
    part = Share.pipeline(checkpoint.config.text, range(1, 4)).of(checkpoint)
    reads = Reads(monkeypatch)
    arrays = lazy_arrays(part, [TABLE, TABLE.replace("weight", "scales")])
    assert not reads.ranges
    assert [len(array) for array in arrays.values()] == [0, 0]


def test_loading_a_part_takes_little_more_memory_than_the_part(checkpoint_folder):
    checkpoint = open_checkpoint(checkpoint_folder(changed(FOURS, vocab_size=16384), dtype=mx.float32))
    share = Share.tensor(checkpoint.config.text, 0, 2)
    largest = max(entry.nbytes for entry in share.of(checkpoint).entries.values() if entry.partial)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    model = loaded(checkpoint, share, mx.bfloat16)
    _, beside = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert beside < 2 * largest + 2e6  # the numbers of one tensor, and a piece of them
    assert mx.get_peak_memory() - before < memory(model) + largest + 2e6  # in float32 all of it would be twice as much


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "size"),
    [({"num_key_value_heads": 2}, 4), ({"linear_num_key_heads": 6, "linear_num_value_heads": 12}, 4),
     ({"intermediate_size": 514}, 4), ({"num_attention_heads": 6, "num_key_value_heads": 2}, 4), ({}, 3)],
    ids=str,
)  # fmt: skip
def test_heads_and_widths_that_do_not_divide_are_refused_with_the_sizes_that_do(fields, size):
    config = parse_config(changed(FOURS, **fields)).text
    odd = {name: number for name, number in fields.items() if number % size} or {"num_key_value_heads": 4}
    with refused("split_unfit", *odd, *odd.values(), size, "2 machines" if fields else "2 or 4 machines", "pipeline"):
        Share.tensor(config, 0, size)


def test_a_model_that_cannot_be_divided_by_any_number_says_so():
    with refused("split_unfit", "num_key_value_heads 1", "No number of machines", "pipeline"):
        Share.tensor(parse_config(geometry("tiny")).text, 0, 2)


def test_columns_are_not_cut_within_a_group(checkpoint_folder, tmp_path):
    """448 columns are 7 groups of 64."""
    raw = checkpoint_folder(changed(FOURS, intermediate_size=448))
    Share.tensor(open_checkpoint(raw).config.text, 0, 2).of(open_checkpoint(raw))
    packed = open_checkpoint(in_form("4bit", raw, tmp_path / "packed"))
    with refused("split_unfit", "layers.0.mlp.down_proj.scales 7", "which is 2", "No number of machines", "pipeline"):
        Share.tensor(packed.config.text, 0, 2).of(packed)
    Share.pipeline(packed.config.text, range(2)).of(packed)


def test_the_sizes_that_divide_the_groups_are_named(checkpoint_folder, tmp_path):
    packed = open_checkpoint(in_form("4bit", checkpoint_folder(changed(FOURS, intermediate_size=640)), tmp_path / "p"))
    share = Share.tensor(packed.config.text, 0, 4)
    with refused("split_unfit", "down_proj.scales 10", "which is 4", "2 machines would do"):
        share.of(packed)


@pytest.mark.parametrize("layers", [range(0), range(2, 2), range(3, 5), range(-1, 2), range(0, 4, 2), range(3, 1)])
def test_a_range_of_no_layers_or_of_others_than_the_models_is_refused(layers):
    with refused("split_unfit", "0 to 3", layers):
        Share.pipeline(parse_config(FOURS).text, layers)


@pytest.mark.parametrize(
    ("ranges", "told"),
    [([range(2), range(1, 4)], "0 to 1, 1 to 3"), ([range(1), range(2, 4)], "0 to 0, 2 to 3"),
     ([range(3)], "0 to 2"), ([range(2, 4), range(2)], "2 to 3, 0 to 1"), ([range(1)] * 5, "5 machines"),
     ([], "got none")],
    ids=str,
)  # fmt: skip
def test_machines_that_do_not_hold_each_layer_once_are_refused(ranges, told):
    with refused("split_unfit", told):
        Share.pipelines(parse_config(FOURS).text, ranges)
