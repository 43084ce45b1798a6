"""The memory plan: what it counts, what it refuses, and that MLX's own count of a run agrees with it."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from image_memory import noise, prompt  # of examples
from refusing import refused

from mlx_qwen35 import generate, load
from mlx_qwen35.backend import backend
from mlx_qwen35.budget.chunk import prefill_bytes, unpacked_bytes
from mlx_qwen35.budget.encoding import at_once, working_bytes
from mlx_qwen35.budget.plan import kv_bytes, longest_context, mac, most_tokens, plan_memory, state_bytes, this_machine
from mlx_qwen35.cache.kv_format import FORMS, Columns, KVFormat
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.config import parse_config
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.shapes import mtp_shapes, text_shapes, vision_shapes
from mlx_qwen35.checkpoint.tensors import Entry
from mlx_qwen35.convert.recipes import RECIPES
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.load import load_model, load_vision_encoder
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.quantization import Quantization


def headers(name: str, recipe: str | None) -> Checkpoint:
    """A checkpoint of this geometry and recipe that exists only as headers."""
    config = parse_config(geometry(name) | ({} if recipe is None else {"quantization": {"group_size": 64, "bits": 4}}))
    stored = recipe and RECIPES[recipe]
    entries, hows = {}, {}
    shapes = text_shapes(config.text) | vision_shapes(config.vision) | mtp_shapes(config.text)
    for tensor, shape in shapes.items():
        how: Quantization | None = stored.quantization(tensor, shape) if stored else None
        parts = {tensor: (shape, "BF16")}
        if how:
            stem = tensor.removesuffix("weight")
            hows[stem] = how
            parts = {stem + s: (size, "U32" if s == "weight" else "BF16") for s, size in how.parts(shape).items()}
        for part, (size, dtype) in parts.items():
            count = 1
            for side in size:
                count *= side
            entries[part] = Entry(Path("none"), part, dtype, size, 0, count * (4 if dtype == "U32" else 2))
    checkpoint = Checkpoint(Path("none"), config, entries, {}, True)
    checkpoint.__dict__["_quantization"] = hows
    return checkpoint


@pytest.mark.parametrize(("context", "most"), [(4096, 2.9e9), (8192, 3.05e9)])
def test_the_4b_in_4_bit_reads_text_on_a_mac_of_8_gb_in_about_3(context, most):
    plan = plan_memory(headers("4b", "4bit"), mac(8), context)
    assert plan.text <= most and plan.fits


def test_a_turn_with_an_image_on_a_mac_of_8_gb_takes_at_most_3_2_and_then_what_text_takes():
    plan = plan_memory(headers("4b", "4bit"), mac(8), 2048, pixels=1 << 20)
    assert plan.text < plan.image <= 3.2e9
    assert plan.text == plan_memory(headers("4b", "4bit"), mac(8), 2048).text


def test_a_larger_mac_reads_more_at_a_time_and_a_longer_context_takes_its_keys_and_values():
    checkpoint = headers("4b", "4bit")
    chunks = [plan_memory(checkpoint, mac(gigabytes), 8192).chunk for gigabytes in (8, 16, 32)]
    assert chunks == sorted(set(chunks))
    short, long = (plan_memory(checkpoint, mac(8), context) for context in (4096, 8192))
    assert long.kv - short.kv == 4096 * 8 * 2 * 4 * 256 * 2
    assert long.state == 2 * 24 * (4 * 32 * 128 * 128 + 3 * 8192 * 2)


def test_the_draft_head_counts_where_it_is_on():
    checkpoint = headers("4b", "4bit")
    off, on, three = (plan_memory(checkpoint, mac(8), 4096, mtp=mtp) for mtp in (0, 1, 3))
    assert off.drafts == 0 and on.kv == off.kv * 9 // 8
    assert (on.state, three.state) == (2 * off.state, 4 * off.state)
    assert on.text - off.text == on.drafts + on.kv - off.kv + on.state - off.state
    matrices = [shape for shape in mtp_shapes(checkpoint.config.text).values() if len(shape) == 2]
    packed = sum(rows * columns for rows, columns in matrices) * 4.5 / 8
    assert abs(on.drafts / packed - 1) < 0.01


def test_on_a_mac_of_8_gb_131072_tokens_fit_in_8_bit_and_not_in_16():
    checkpoint, context = headers("4b", "4bit"), 1 << 17
    plans = {form: plan_memory(checkpoint, mac(8, kv=KVFormat.of(form)), context) for form in (None, *FORMS)}
    assert [plan.kv // context for plan in plans.values()] == [32_768, 17_408, 13_312, 9_216]
    assert [plan.fits for plan in plans.values()] == [False, True, True, True]
    assert plans["8"].prefill - plans[None].prefill == 2 * 4 * 256 * 2 * context  # a layer, dequantized
    assert [plan.growth for plan in plans.values()] == [context * 4 * 256 * n // 8 for n in (16, 8, 8, 4)]
    assert len({plan.chunk for plan in plans.values()}) == 1
    longest = [longest_context(checkpoint, plans[None], KVFormat.of(form)) for form in (None, *FORMS)]
    assert longest == sorted(longest) and longest[0] < context < longest[1]
    for form, tokens in zip((None, *FORMS), longest, strict=True):
        machine = mac(8, kv=KVFormat.of(form))
        fits = [plan_memory(checkpoint, machine, n, chunk=plans[None].chunk).fits for n in (tokens, tokens + 1024)]
        assert fits == [True, False]


def test_the_4b_in_16_bit_does_not_fit_a_mac_of_8_gb_and_does_one_of_16():
    checkpoint = headers("4b", None)
    assert not plan_memory(checkpoint, mac(8), 4096).fits and plan_memory(checkpoint, mac(16), 4096).fits


# --- against MLX's count ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mid(checkpoint_folder) -> Checkpoint:
    return open_checkpoint(checkpoint_folder(geometry("mid")))


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("tokens", "image", "kv_bits"),
    [
        (60, None, None),
        (0, (256, 256), None),
        *(pytest.param(n, None, None, marks=pytest.mark.full) for n in (256, 1100, 4000)),
        *(pytest.param(0, (n, n), None, marks=pytest.mark.full) for n in (1024, 2048)),
        *(pytest.param(4000, None, form, marks=pytest.mark.full) for form in FORMS),
    ],
    ids=str,
)
def test_a_run_takes_what_the_plan_says_within_a_tenth(mid, tokens, image, kv_bits):
    mx.clear_cache()
    before = mx.get_active_memory()
    model = load_model(mid, mx.float32, "mid", kv=KVFormat.of(kv_bits))
    mx.reset_peak_memory()
    row = PromptRow([5] * tokens)
    if image:
        media = noise(mid.config.vision, 1, *image)
        embeddings = model.vision.part.encode(media)
        mx.eval(embeddings)
        model.vision.unload()
        row = PromptRow(*prompt(media.grid, mid.config.vision.spatial_merge_size), embeddings)
        del embeddings
    pixels = image[0] * image[1] if image else 0
    machine = this_machine(model.config, mx.float32, model.memory_limit, model.kv)
    plan = plan_memory(mid, machine, len(row.tokens) + 4, pixels=pixels)
    cache = model.make_cache()
    prefill(model, cache, row._replace(tokens=row.tokens[:-1]), plan.chunk)
    last = Prompt(tuple(row.tokens[-1:]), thinking=False)
    sampler = Sampler(Sampling(), 0, len(row.tokens), model.config.vocab_size)
    engine = Engine(model)
    engine.add(Sequence(last, sampler, 4, prefill_step_size=plan.chunk, cache=cache))
    while not engine.idle:
        engine.step()
    measured = mx.get_peak_memory() - before
    assert abs((plan.image if image else plan.text) / measured - 1) < 0.1


@pytest.mark.core(2)
@pytest.mark.skipif(backend().device != "the CPU", reason="what a CPU takes")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [9, 64])
def test_dequantized_keys_and_values_take_at_most_what_is_planned(form, T):
    """Of several key heads, in a length that is no multiple of 256."""
    config, S, kv = parse_config(geometry("4b")).text, 3900, KVFormat.of(form)
    _, Hk, size, _ = config.attention_heads
    keys = mx.random.normal((1, Hk, 4096, size), key=mx.random.key(0))
    columns, q = kv.encode(keys, keys), mx.random.normal((1, config.num_attention_heads, T, size), key=mx.random.key(1))
    mx.eval(q, columns)
    del keys
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(kv.attend(q, Columns(columns, S), size**-0.5, causal=True))
    measured = mx.get_peak_memory() - before
    unpacked = 4096 * unpacked_bytes(config, 4, kv, "cpu")
    assert unpacked < 1.05 * measured and measured <= unpacked + prefill_bytes(config, T, S, 4, "cpu")


@pytest.mark.parametrize(
    "size", [(256, 512), *(pytest.param((n, n), marks=pytest.mark.full) for n in (512, 1024))], ids=str
)
def test_encoding_an_image_takes_at_most_its_budget(mid, size):
    encoder, media = load_vision_encoder(mid, mx.float32), noise(mid.config.vision, 1, *size)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    embeddings = encoder.encode(media)
    taken = mx.get_peak_memory() - before - embeddings.nbytes
    budget = working_bytes(mid.config.vision, mx.float32, at_once(media.grid), "cpu")
    assert taken <= budget < 1.25 * taken


def test_weights_state_and_keys_are_counted_to_the_byte(mid):
    before = mx.get_active_memory()
    model = load_model(mid, mx.float32, "mid")
    plan = plan_memory(mid, this_machine(model.config, mx.float32, model.memory_limit), 40)
    assert abs(mx.get_active_memory() - before - plan.weights) < 200_000  # tables of rotary embedding, and the like
    cache = model.make_cache()
    prefill(model, cache, PromptRow([5] * 40), 40)
    assert cache.nbytes == kv_bytes(model.config, 40, 4) + state_bytes(model.config, 4)
    assert plan.kv + plan.state // 2 == cache.nbytes


# --- the guard -------------------------------------------------------------------------------------------------------


def test_a_model_too_big_is_refused_with_the_command_that_makes_it_smaller(checkpoint_folder):
    checkpoint = open_checkpoint(checkpoint_folder())
    with refused("memory_exceeded") as caught:
        load_model(checkpoint, mx.float32, "Qwen/Qwen3.5-4B", memory_limit=24_000_000)
    said = str(caught.value)
    assert all(figure in said for figure in ("0.0283 GB", "0.0136 GB", "0.0240 GB"))
    assert "mlx_qwen35.generate --model Qwen/Qwen3.5-4B --recipe 4bit" in said
    assert "convert_cached('Qwen/Qwen3.5-4B', recipe='4bit')" in said


def test_a_packed_model_too_big_is_not_sent_to_the_converter(checkpoint_folder, tmp_path):
    from mlx_qwen35.convert import convert

    folder = convert(checkpoint_folder(), tmp_path / "packed", recipe="4bit")
    with refused("memory_exceeded"):
        load_model(open_checkpoint(folder), mx.float32, "packed", memory_limit=1_000_000)


def test_memory_is_reckoned_in_the_dtype_of_the_model(checkpoint_folder):
    checkpoint = open_checkpoint(checkpoint_folder())
    machines = [this_machine(checkpoint.config.text, dtype, 10**9) for dtype in (mx.float16, mx.float32)]
    between = sum(plan_memory(checkpoint, machine, 256).text for machine in machines) // 2
    load_model(checkpoint, mx.float16, "tiny", memory_limit=between)
    with refused("memory_exceeded"):
        load_model(checkpoint, mx.float32, "tiny", memory_limit=between)


def test_a_prompt_without_room_is_refused_before_anything_is_read():
    model, processor = load("nano")
    model.memory_limit = mx.get_active_memory() + 3_000_000
    room = most_tokens(model.config, this_machine(model.config, model.dtype, model.memory_limit), 32, [0])
    with refused("memory_exceeded", f"{room:,}"):
        generate(model, processor, list(range(5, 400)) * 10)


def test_an_answer_as_long_as_asked_for_must_have_room():
    model, processor = load("nano")
    model.memory_limit = mx.get_active_memory() + 4_000_000
    with refused("memory_exceeded", "max_tokens"):
        generate(model, processor, "What is 34 + 58?", max_tokens=20_000)


def test_an_answer_of_no_stated_length_is_as_long_as_there_is_room():
    model, processor = load("nano")
    model.memory_limit = mx.get_active_memory() + 4_000_000
    assert generate(model, processor, "What is 34 + 58?").text == "92"


@pytest.mark.parametrize("wrong", [0, -1, float("inf"), float("nan")])
def test_a_limit_that_is_none_is_refused(wrong):
    with refused("option_invalid", "memory_limit", "0", wrong):
        load("nano", memory_limit=wrong)


def test_the_wired_limit_is_never_touched(monkeypatch):
    monkeypatch.setattr(mx, "set_wired_limit", lambda *_: pytest.fail("the wired limit was set"))
    model, processor = load("nano")
    generate(model, processor, "What is 1 + 1?", max_tokens=2)


# --- the command -----------------------------------------------------------------------------------------------------


def planned(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mlx_qwen35.doctor", *arguments], capture_output=True, text=True)


def test_the_command_shows_this_machine_and_three_macs(checkpoint_folder):
    folder = checkpoint_folder()
    done = planned("--plan", str(folder), "--context", "5000")
    assert done.returncode == 0, done.stderr
    for part in ("5,000", "this machine", "M1, 8 GB", "M1, 16 GB", "M1 Pro, 32 GB"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--plan", "nano", "--model", "nano"), "option_conflict"),
        (("--plan", "nano", "--context", "0"), "option_invalid"),
        (("--context", "5"), "option_no_effect"),
    ],
)
def test_options_without_effect_are_refused(arguments, code):
    done = planned(*arguments)
    assert done.returncode == 2 and f"[{code}]" in done.stderr
