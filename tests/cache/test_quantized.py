"""Quantized keys and values: their bytes, and that chunks, rows, drafts and branches leave the same columns."""

import re

import mlx.core as mx
import numpy as np
import pytest
from engine.schedules import check
from geometries import changed
from mtp.drafting import SMALL, Case, cycle, force, load_small, prompt, run, step_by_step
from refusing import refused

from mlx_qwen35 import batch_generate, generate, load
from mlx_qwen35.backend import backend
from mlx_qwen35.budget.plan import kv_bytes
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.kv_format import FORMS, UNQUANTIZED, Columns, KVFormat
from mlx_qwen35.cache.layer import KVCache
from mlx_qwen35.checkpoint.config import FULL, LINEAR, parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.commands.generate import parser
from mlx_qwen35.convert.__main__ import main as converter
from mlx_qwen35.engine import generation
from mlx_qwen35.model.model import Model

FORMATS = [KVFormat.of(form) for form in FORMS] + [KVFormat.of(form, rotate=True) for form in FORMS[1:]]
BYTES = {"16": 32_768, "8": 17_408, "8/4": 13_312, "4": 9_216}  # of a token of the 4B in 16 bit
NAMED = r"([\d,]+) with kv_bits='([\d/]+)'"  # tokens and form in a refusal
every_format = pytest.mark.parametrize("kv", FORMATS, ids=lambda kv: kv.name)


def normal(seed: int, *shape: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def extended(layer: KVCache, keys: mx.array, values: mx.array) -> Columns:
    """All columns of a layer of one row after these."""
    counts = [keys.shape[2]]
    layer.reserve(counts)
    return layer.append(keys, values, counts)[0]


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 255, 256, 257, pytest.param(5000, marks=pytest.mark.full)])
@pytest.mark.parametrize("kv", [UNQUANTIZED, *FORMATS[:3]], ids=lambda kv: kv.name)
def test_a_cache_has_the_bytes_that_are_planned(kv, columns):
    layer = KVCache.empty(1, 4, 256, mx.float16, kv)
    keys = mx.ones((1, 4, columns, 256), mx.float16)
    extended(layer, keys, keys)
    mx.eval(layer.arrays())
    capacity = -(-columns // 256) * 256
    assert 8 * layer.nbytes == capacity * BYTES[kv.name]
    assert 8 * layer.nbytes == kv_bytes(parse_config(geometry("4b")).text, columns, 2, kv=kv)


# --- attention over them ---------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("count", [130, pytest.param(600, marks=pytest.mark.full)])
def test_attention_is_the_same_whatever_the_chunk(kv, count):
    """A chunk attends to its own columns as they are stored, as later ones do."""
    keys, values, q = (normal(i, 1, heads, count, 64) for i, heads in enumerate((2, 2, 4)))

    def outputs(chunk: int) -> tuple[np.ndarray, list[dict[str, mx.array]]]:
        layer, parts = KVCache.empty(1, 2, 64, mx.float32, kv), []
        for at in (slice(start, start + chunk) for start in range(0, count, chunk)):
            seen = extended(layer, keys[:, :, at], values[:, :, at])
            parts.append(kv.attend(q[:, :, at], seen, 0.125, causal=True))
            mx.eval(parts[-1])
        return np.array(mx.concatenate(parts, axis=2)), layer.state()

    whole, [columns] = outputs(512)
    for chunk in (1, 7, 64):
        out, [own] = outputs(chunk)
        assert np.abs(out - whole).max() < 1e-5
        assert all(mx.array_equal(own[name], columns[name]) for name in columns)


def test_a_rotation_halves_what_single_elements_of_keys_cost():
    """Four elements of each key are ten times the others; scores have a standard deviation of 2."""
    large = mx.where(mx.arange(256) % 64 == 5, 10.0, 1.0)
    keys, values, q = normal(0, 1, 1, 2048, 256) * large, normal(1, 1, 1, 2048, 256), normal(2, 1, 1, 8, 256)
    scale = 2 / float(mx.sqrt((large * large).sum()))

    def error(kv: KVFormat) -> float:
        out, exact = (own.attend(q, Columns(own.encode(keys, values), 2048), scale, False) for own in (kv, UNQUANTIZED))
        return float(mx.sqrt(mx.square(out - exact).sum() / mx.square(exact).sum()))

    assert error(KVFormat.of("4", rotate=True)) < 0.6 * error(KVFormat.of("4"))


# --- a model with them -----------------------------------------------------------------------------------------------


def packed_model(folder, layer_types: list[str], checkpoint_folder, kv: KVFormat) -> Model:
    """With weights in 4 bit: on the CPU products of few rows are those of single rows, to the bit."""
    model = load_small(checkpoint_folder(changed(SMALL, layer_types=layer_types), vision=False), folder, bits=4)
    model.kv = kv
    return model


@pytest.fixture(
    scope="module",
    params=[FORMATS[3], *(pytest.param(FORMATS[i], marks=pytest.mark.full) for i in (0, 1, 2, 4))],
    ids=lambda kv: kv.name,
)
def model(request, checkpoint_folder, tmp_path_factory) -> Model:
    """Attention comes first, so that its keys and values are the same to the bit however tokens are fed."""
    folder = tmp_path_factory.mktemp("first") / "model"
    return packed_model(folder, [FULL, LINEAR, LINEAR], checkpoint_folder, request.param)


def logits(model: Model, tokens: mx.array, chunk: int) -> mx.array:
    cache = model.make_cache()
    out = mx.concatenate([model(tokens[:, at : at + chunk], cache) for at in range(0, tokens.shape[1], chunk)], axis=1)
    return out - mx.logsumexp(out, axis=-1, keepdims=True)


@pytest.mark.skipif(not backend().unpacks_for_many_rows, reason="products go row by row on the CPU alone")
def test_a_text_has_the_same_logprobs_in_chunks_and_beside_other_rows(model):
    rows = [mx.array([prompt(seed, count)]) for seed, count in enumerate((22, 2, 9))]
    alone = [logits(model, row, 1) for row in rows]
    assert float(mx.abs(logits(model, rows[0], 7) - alone[0]).max()) < 1e-4
    cache, outputs = model.make_cache(3), [[], [], []]
    for start in range(0, 22, 3):
        lengths = [min(max(row.shape[1] - start, 0), 3) for row in rows]
        tokens = mx.full((3, max(lengths)), 7)
        for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            tokens[i, :n] = row[0, start : start + n]
        out = model.logits(model.hidden(tokens, cache, lengths))
        for i, n in enumerate(lengths):
            outputs[i].append(out[i, :n])
    for own, expected in zip(outputs, alone, strict=True):
        together = mx.concatenate(own)
        together = together - mx.logsumexp(together, axis=-1, keepdims=True)
        assert float(mx.abs(together - expected[0]).max()) < 1e-4


def test_chunks_of_many_tokens_round_few_elements_otherwise(model):
    """Products of other shapes sum in another order, so an element between two steps may fall on the other one."""
    tokens = mx.array([prompt(0, 200)])
    caches = [model.make_cache() for _ in range(2)]
    outputs = [mx.concatenate([model(tokens[:, at : at + chunk], cache) for at in range(0, 200, chunk)], axis=1)
               for cache, chunk in zip(caches, (200, 64), strict=True)]  # fmt: skip
    assert float(mx.abs(outputs[0] - outputs[1]).max()) < 0.02
    for name in caches[0].arrays():
        if name.endswith("words"):
            bits = model.kv.value_bits if "values" in name else model.kv.key_bits
            one, other = (unpacked(cache.arrays()[name], bits) for cache in caches)
            assert np.abs(one - other).max() <= 1 and (one != other).mean() < 1e-3


def unpacked(words: mx.array, bits: int) -> np.ndarray:
    """The quantized elements."""
    shifted = np.array(words)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)
    return (shifted & (2**bits - 1)).astype(np.int32)


@pytest.mark.parametrize("depth", [3, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 2))])
@pytest.mark.skipif(not backend().unpacks_for_many_rows, reason="products go row by row on the CPU alone")
def test_drafts_leave_the_columns_of_a_clean_run(depth, model, monkeypatch):
    case = Case(prompt(3, 9), seed=5)
    text = run(model, [case], 20).tokens[0]
    clean = step_by_step(model, case, text)
    force(monkeypatch, [case], [text], cycle(3, 0, 2, 1))
    result = run(model, [case], 20, depth)
    assert result.tokens == [text]
    own, expected = result.cache.arrays(), clean[result.cache.length]
    columns = [name for name in own if name.startswith("layers.0.")]
    assert len(columns) == 6
    for name in columns:
        assert np.array(own[name][0]).tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 40))])
def test_a_sequence_in_any_schedule_gets_what_it_gets_alone(model, seed):
    check(model, seed)


def test_a_cache_goes_through_its_arrays_and_keeps_its_form(model):
    cache = model.make_cache()
    model(mx.array([prompt(1, 30)]), cache)
    again = model.make_cache()
    again.layers, again.position = [type(own).from_state(own.state()) for own in cache.layers], cache.position
    assert again.layers[0].format == model.kv
    assert mx.array_equal(model(mx.array([[5]]), cache), model(mx.array([[5]]), again))


def test_a_snapshot_of_another_form_is_refused(model):
    snapshot = model.make_cache().snapshot()
    with refused("snapshot_foreign", model.kv.name):
        Cache(model.config, model.dtype).restore(snapshot)


def test_a_cache_of_another_form_is_refused_alone_and_in_a_batch():
    (plain, processor), (packed, _) = load("nano"), load("nano", kv_bits="8/4")
    for caches in ([packed.make_cache()], [plain.make_cache(), packed.make_cache()]):
        with refused("option_invalid", "make_cache()", plain.kv.name, "8/4"):
            batch_generate(plain, processor, ["Who are you?"] * len(caches), cache=caches, max_tokens=1)


def test_a_column_that_is_not_finite_is_found(model):
    cache = model.make_cache()
    model(mx.array([prompt(1, 5)]), cache)
    layer = cache.layers[0]
    assert cache.first_not_finite(0) is None
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    bad = mx.full((1, heads, 1, dim), mx.nan)
    extended(layer, bad, mx.zeros_like(bad))
    assert cache.first_not_finite(0) == 0


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}, {"kv_bits": "8"}])
def test_a_rotation_without_4_bits_is_refused(options):
    with refused("option_no_effect", "kv_rotate", "8/4"):
        load("nano", kv_rotate=True, **options)


@pytest.mark.parametrize(
    ("dim", "options", "fault"),
    [(96, {"kv_bits": 8}, ("kv_bits", "64")), (192, {"kv_bits": 4, "kv_rotate": True}, ("kv_rotate", "two"))],
)
def test_heads_that_cannot_be_packed_are_refused(dim, options, fault, checkpoint_folder):
    rope = geometry("tiny")["text_config"]["rope_parameters"] | {"mrope_section": [dim // 24] * 3}
    folder = checkpoint_folder(changed(geometry("tiny"), head_dim=dim, rope_parameters=rope), vision=False)
    with refused("option_invalid", *fault, dim):
        load(folder, **options)


@pytest.mark.parametrize(
    ("name", "why"),
    [("max_kv_size", "DeltaNet"), ("quantized_kv_start", "first token"), ("kv_group_size", "64"), ("kv_bits", "load")],
)
def test_options_of_other_programs_are_declined_with_the_reason(name, why):
    with refused("option_unknown", name, why):
        generate(*load("nano"), "What is 1 + 1?", **{name: 4})


def test_the_converter_names_the_commands_that_take_kv_bits(capsys):
    with pytest.raises(SystemExit, match="2"):
        converter(["--hf-path", "nano", "--mlx-path", "out", "--kv-bits", "8"])
    said = capsys.readouterr().err
    assert "[option_unknown]" in said and "mlx_qwen35.generate" in said and "load(" not in said


@pytest.mark.parametrize(("flag", "why"), [("--max-kv-size", "DeltaNet"), ("--quantized-kv-start", "first token")])
def test_commands_decline_them_too(flag, why):
    with refused("option_unknown", flag, why):
        parser().parse(["--model", "nano", "--prompt", "a", flag, "5"])


@pytest.mark.full
def test_a_context_without_room_names_the_forms_with_fewer_bits():
    model, processor = load("nano")
    model.memory_limit = mx.get_active_memory() + 4_000_000
    with refused("memory_exceeded") as caught:
        generate(model, processor, list(range(5, 400)) * 10)
    said = re.findall(NAMED, str(caught.value))
    forms = [form for _, form in said]
    assert "4" in forms and forms == [form for form in FORMS if form in forms]  # a CPU dequantizes through more memory
    room, *_ = re.findall(r"a context of ([\d,]+) tokens", str(caught.value))
    tokens = [int(count.replace(",", "")) for count in (room, *(count for count, _ in said))]
    assert tokens == sorted(tokens) and tokens[0] < tokens[1]
    model.kv, wide = KVFormat.of("4"), [5] * (tokens[-1] - 1)
    assert len(generate(model, processor, wide, max_tokens=1).tokens) == 1
    with refused("memory_exceeded") as caught:
        generate(model, processor, wide * 3)
    assert "with kv_bits" not in str(caught.value)


@pytest.mark.parametrize("form", [None, *FORMS])
def test_forms_are_named_that_are_smaller_and_have_more_room_with_the_same_drafts(form):
    model, processor = load("nano", kv_bits=form)
    model.memory_limit = mx.get_active_memory() + 12_000_000
    drafted = {"mtp": "on", "mtp_depth": 3, "max_tokens": 1}
    with refused("memory_exceeded") as caught:
        generate(model, processor, [5] * 32_000, **drafted)
    said = [(name, int(count.replace(",", ""))) for count, name in re.findall(NAMED, str(caught.value))]
    assert {name for name, _ in said} <= set(FORMS[FORMS.index(form) + 1 :] if form else FORMS)
    for name, tokens in said:
        model.kv = KVFormat.of(name)
        generation.start(model, processor, [[5] * (tokens - 1)], **drafted)
        if tokens < 32_767:
            with refused("memory_exceeded"):
                generation.start(model, processor, [[5] * tokens], **drafted)


def test_smaller_forms_are_those_that_the_heads_fit_into():
    forms = [KVFormat.of(form) for form in (None, *FORMS)]
    assert [kv.smaller(256) for kv in forms] == [list(FORMS[i:]) for i in range(4)]
    assert UNQUANTIZED.smaller(96) == []
