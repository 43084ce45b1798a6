"""Adapters beside the weights: they give what their product gives in the weights, in the bytes that are planned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapters import golden_adapters as goldens
from adapters.random_adapters import dequantized, every_map, fused_into, made
from image_memory import noise  # of examples
from memory_use import active
from mlx.utils import tree_flatten
from parity import vision_cases
from refusing import refused

from mlx_qwen35 import generate, load
from mlx_qwen35.backend import CPU, assume
from mlx_qwen35.budget.plan import mac, plan_memory, this_machine
from mlx_qwen35.checkpoint.adapter import Adapter, whole_arrays
from mlx_qwen35.checkpoint.adapter_choice import Chosen, choose
from mlx_qwen35.checkpoint.adapter_write import write_adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.names import HEAD, MTP, TABLE, TEXT, VISION
from mlx_qwen35.checkpoint.tensors import open_header
from mlx_qwen35.load import load_model
from mlx_qwen35.model.model import Model, Visual
from mlx_qwen35.prompt.positions import positions

TOKENS = mx.array([[5, 190, 77, 3, 251, 18, 9, 64, 130, 2, 41]])
JOINING = replace(CPU, joins_projections=True)  # products are joined and add in one launch, as on a GPU
CLOSE = 3e-5  # logits of deviation 0.4, which these adapters move by 2: as far as sums in another order go
PLACES = pytest.mark.parametrize("place", [JOINING, CPU], ids=["joined", "cpu"])


@pytest.fixture(scope="module")
def tiny(checkpoint_folder) -> Checkpoint:
    return open_checkpoint(checkpoint_folder())


@pytest.fixture(scope="module")
def packed(checkpoint_folder, tmp_path_factory) -> Checkpoint:
    from mlx_qwen35.convert import convert

    return open_checkpoint(convert(checkpoint_folder(), tmp_path_factory.mktemp("beside") / "packed", recipe="4bit"))


def loaded(checkpoint: Checkpoint, *adapters: Adapter, dtype: mx.Dtype = mx.float32, limit: int | None = None) -> Model:
    """The model with these adapters; a single one is the default."""
    chosen = Chosen({f"a{i}": adapter for i, adapter in enumerate(adapters)}, "a0" if len(adapters) == 1 else "")
    return load_model(checkpoint, dtype, "it", memory_limit=limit, adapters=chosen)


def apart(a: mx.array, b: mx.array) -> float:
    return mx.abs(a - b).max().item()


# --- the programs that make adapters ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_model(parity_folder) -> Path:
    return parity_folder(goldens.MODEL)


def golden(name: str, folder: Path, target: Path, scale: float = 1.0) -> tuple[Checkpoint, Model]:
    """The model of a golden adapter, which is loaded as `load` does."""
    checkpoint = open_checkpoint(folder)
    chosen = choose(goldens.write(name, target / name, folder), scale, checkpoint)
    return checkpoint, load_model(checkpoint, mx.float32, "it", adapters=chosen)


@pytest.mark.core(3)
@pytest.mark.parametrize("name", [name for name in (*goldens.PEFT, *goldens.MLX) if "dora" not in name])
def test_beside_the_weights_an_adapter_gives_the_logits_of_the_program_that_made_it(name, golden_model, tmp_path):
    _, model = golden(name, golden_model, tmp_path)
    found = np.array(model(mx.array(goldens.TOKENS)[None])[0])
    assert goldens.answers(name).error("logits", found) < 1e-5


@pytest.mark.parametrize("name", goldens.OF_VISION)
def test_peft_sees_and_says_of_an_image_what_is_seen_and_said_here(name, golden_model, tmp_path):
    _, model = golden(name, golden_model, tmp_path)
    answers, cache = goldens.answers(name), model.make_cache()
    adapters, encoder = model.active(cache), model.vision.part
    tower = encoder.encode(vision_cases.media(goldens.MODEL, "adapted", goldens.GRID), adapters)
    assert answers.error("tower", np.array(tower)) < 8e-4  # of a deviation of 40
    prompt = goldens.SCENE.prompt
    columns = [column for place in prompt.placeholders for column in range(place.start, place.stop)]
    seen = mx.concatenate([encoder.encode(placed.media, adapters) for placed in prompt.media])
    visual = Visual(mx.zeros(len(columns), mx.int32), mx.array(columns), seen)
    table = positions(len(prompt.tokens), prompt.placeholders)[:, None]
    hidden = model.hidden(mx.array([list(prompt.tokens)]), cache, None, visual, table)
    assert answers.error("image logits", np.array(model.logits(hidden, adapters)[0])) < 2e-5


@pytest.mark.parametrize("name", [name for name in (*goldens.PEFT, *goldens.MLX) if "dora" in name])
def test_dora_beside_the_weights_is_refused(name, golden_model, tmp_path):
    with refused("adapter_unsupported", name, "--adapter"):
        golden(name, golden_model, tmp_path)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.core(1)
@PLACES
def test_beside_the_weights_is_as_inside_them(tiny, place):
    adapter = made(every_map(tiny), ranks=(4, 1, 7))
    with assume(place):
        ours, plain = loaded(tiny, adapter), loaded(tiny)
        assert apart(ours(TOKENS), loaded(fused_into(tiny, adapter))(TOKENS)) < CLOSE
        assert apart(ours(TOKENS), plain(TOKENS)) > 0.1
        assert mx.array_equal(ours(TOKENS, ours.make_cache(adapter="base")), plain(TOKENS))


@pytest.mark.core(1)
@PLACES
def test_an_adapter_of_some_maps_changes_these_alone(tiny, place):
    adapter = made(every_map(tiny), only=lambda name: name.endswith(("in_proj_b.weight", "k_proj.weight")))
    with assume(place):
        assert apart(loaded(tiny, adapter)(TOKENS), loaded(fused_into(tiny, adapter))(TOKENS)) < CLOSE


@pytest.mark.parametrize("name", [TABLE, HEAD])
def test_of_a_tied_table_and_its_head_each_has_a_part_of_its_own(tiny, name):
    adapter = made(every_map(tiny), only=lambda other: other == name)
    ours, plain = loaded(tiny, adapter), loaded(tiny)
    assert apart(ours(TOKENS), loaded(fused_into(tiny, adapter))(TOKENS)) < CLOSE
    active = ours.active(ours.make_cache())
    changed = apart(ours.embed(TOKENS, None, active), plain.embed(TOKENS)), apart(
        ours.logits(plain.hidden(TOKENS), active), plain.logits(plain.hidden(TOKENS))
    )
    assert [difference > 1e-3 for difference in changed] == [name != HEAD, name == HEAD]


@pytest.mark.core(1)
@PLACES
def test_beside_packed_weights_is_as_beside_the_same_numbers_unpacked(packed, place):
    adapter = made(every_map(packed))
    with assume(place):
        unpacked = {name: dequantized(packed, name) for name in every_map(packed) if name in packed.entries}
        assert apart(loaded(packed, adapter)(TOKENS), loaded(packed.replacing(unpacked), adapter)(TOKENS)) < 1e-4


@pytest.mark.full
def test_beside_packed_weights_an_adapter_loses_what_packing_loses(tmp_path):
    """Of nano by recipe 4bit, over 1,024 random tokens: KL to float32 is 0.10 with an adapter and without."""
    from mlx_qwen35.convert import convert

    nano = open_checkpoint(resolve("nano"))
    small = open_checkpoint(convert(resolve("nano"), tmp_path / "packed", recipe="4bit"))
    adapter = made(every_map(nano, f"{TEXT}layers."), 1, (16,), strength=0.2)
    tokens = mx.array(np.random.default_rng(0).integers(0, 1000, (4, 256)))

    def divergence(*given: Adapter) -> float:
        p, q = (nn.log_softmax(loaded(own, *given)(tokens)) for own in (nano, small))
        return (mx.exp(p) * (p - q)).sum(-1).mean().item()

    assert divergence(adapter) < 1.2 * divergence() < 0.2


def test_products_stay_joined_and_have_one_low_rank_part_each(packed):
    adapter = made(every_map(packed))
    with assume(JOINING):
        ours, plain = loaded(packed, adapter), loaded(packed)
    for layer, bare in zip(ours.layers, plain.layers, strict=True):
        joins = [("linear_attn", "in_proj"), ("self_attn", "qkv_proj"), ("mlp", "gate_up")]
        for mixer, joined in [own for own in joins if own[0] in layer]:
            products = layer[mixer][joined].products
            assert [p.weight.shape for p in products] == [p.weight.shape for p in bare[mixer][joined].products]
            assert len(products) == (2 if joined == "in_proj" else 1)  # gates are not packed
    products = sum(len(list(module.maps) and [1]) for _, module in ours.named_modules() if hasattr(module, "maps"))
    assert len(ours.adapters.arrays()) == 2 * (products + 1)  # the table has one and the head another


def test_images_are_seen_through_the_adapter_also_when_the_encoder_is_loaded_again(tiny):
    adapter = made(every_map(tiny, VISION))
    ours, plain, inside = loaded(tiny, adapter), loaded(tiny), loaded(fused_into(tiny, adapter))
    media = noise(tiny.config.vision, 1, 64, 96)
    for _ in range(2):
        seen = ours.vision.part.encode(media, ours.active(ours.make_cache()))
        assert apart(seen, inside.vision.part.encode(media)) < CLOSE
        assert mx.array_equal(ours.vision.part.encode(media), plain.vision.part.encode(media))
        ours.vision.unload()
    assert apart(seen, plain.vision.part.encode(media)) > 1e-2


def test_the_draft_head_has_its_parts(tiny):
    adapter = made(every_map(tiny, MTP))
    ours, inside = loaded(tiny, adapter), loaded(fused_into(tiny, adapter))
    found = []
    for model in (ours, inside):
        cache = model.make_cache()
        with cache.forward(TOKENS.shape[1], adapters=model.active(cache)) as context:
            head = model.mtp.part
            embeddings = model.embed(TOKENS)
            found.append(head(embeddings, embeddings[:, ::-1], model.rotary.table(context.positions), context,
                              [layer for layer in cache.layers if hasattr(layer, "rows")][:1]))  # fmt: skip
    assert apart(*found) < CLOSE


# --- whole tensors ---------------------------------------------------------------------------------------------------


def whole(checkpoint: Checkpoint, *ends: str) -> dict[str, mx.array]:
    """Other numbers for the tensors with these ends."""
    rng = np.random.default_rng(7)
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if name.endswith(ends)}
    return {name: mx.array(rng.normal(size=shape).astype(np.float32) * 0.1) for name, shape in shapes.items()}


def on_disk(folder: Path, checkpoint: Checkpoint, *ends: str) -> dict[str, Any]:
    """The same as an adapter has them, and where they are stored."""
    mx.save_safetensors(str(folder / "whole.safetensors"), whole(checkpoint, *ends))
    stored = open_header(folder / "whole.safetensors").entries
    return {"replaced": whole_arrays(stored, mlx=False), "stored": stored}


ENDS = ("input_layernorm.weight", "linear_attn.norm.weight", "k_proj.weight", "A_log", "merger.norm.weight")


@pytest.mark.core(1)
@PLACES
@pytest.mark.parametrize("stored", ["packed", "tiny"])
def test_whole_tensors_take_the_place_of_the_checkpoints_and_are_not_packed(stored, place, request, tmp_path):
    checkpoint = request.getfixturevalue(stored)
    adapter = made(
        every_map(checkpoint), only=lambda name: not name.endswith(ENDS), **on_disk(tmp_path, checkpoint, *ENDS)
    )
    with assume(place):
        model, inside = loaded(checkpoint, adapter), loaded(fused_into(checkpoint, adapter))
        assert apart(model(TOKENS), inside(TOKENS)) < CLOSE
        assert apart(model(TOKENS), loaded(checkpoint, replace(adapter, replaced={}))(TOKENS)) > 0.1
    media = noise(checkpoint.config.vision, 1, 64, 64)
    assert apart(model.vision.part.encode(media), inside.vision.part.encode(media)) == 0
    products = next(layer.self_attn for layer in model.layers if "self_attn" in layer).qkv_proj.products
    packings = [bool(product.quantization) for product in products]
    joined = {"tiny": [False], "packed": [True, False]}[stored]  # q and v stay one product
    assert packings == (joined if place is JOINING else {"tiny": [False] * 3, "packed": [True, False, True]}[stored])


def test_a_head_of_its_own_makes_a_tied_model_untied(tiny):
    adapter = Adapter(tiny.folder, "peft", {}, {HEAD: whole(tiny, TABLE)[TABLE]})
    model, plain = loaded(tiny, adapter), loaded(tiny)
    assert not model.config.tie_word_embeddings and mx.array_equal(model.embed(TOKENS), plain.embed(TOKENS))
    expected = plain.hidden(TOKENS) @ adapter.replaced.get(HEAD, model.lm_head.weight).T
    assert apart(model(TOKENS), expected) < CLOSE


def test_without_an_adapter_whose_whole_tensors_are_in_the_model_nothing_is_answered(tiny):
    model = loaded(tiny, made(every_map(tiny), replaced=whole(tiny, *ENDS)))
    assert model.adapters["a0"].whole and model.make_cache().adapters == ("a0",)
    with refused("adapter_unsupported", "a0"):
        model.make_cache(adapter="base")
    with refused("adapter_unsupported", "a0"):
        model.adapters.add("b", made(every_map(tiny)))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def exact(monkeypatch):
    """Arrays take their own bytes: a freed buffer, which may be larger, is not used again."""
    before = mx.set_cache_limit(0)
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: 0)
    yield
    monkeypatch.undo()
    mx.set_cache_limit(before)


@pytest.mark.core(1)
@PLACES
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_low_rank_parts_take_the_bytes_that_are_planned(packed, place, dtype, exact):
    maps = every_map(packed, TEXT, HEAD, VISION, MTP)

    def adapters() -> list[Adapter]:
        return [made(maps, 1, (4, 7)), made(maps, 2, (3,), only=lambda name: "mlp" in name)]

    def used(*given: Adapter) -> tuple[Model, int]:
        before = active()
        model = loaded(packed, *given, dtype=dtype)
        assert model.mtp.part and model.vision.part
        for part in (model.mtp, model.vision):
            part.unload()
        return model, active() - before

    with assume(place):
        model, bare = used()
        del model
        loose = active()
        given = adapters()
        loose = active() - loose
        model, held = used(*given)
        before = active()
        del given
        held -= before - active()
    assert held + loose - bare == model.adapters.nbytes
    machine = this_machine(model.config, dtype, model.memory_limit)
    machine = replace(machine, attention_impl="cpu" if place is CPU else "fused")
    plan = plan_memory(packed, machine, 256, adapters=adapters())
    assert plan.adapters == model.adapters.nbytes == sum(array.nbytes for array in model.adapters.arrays())
    assert plan.text - plan_memory(packed, machine, 256).text == plan.adapters


def test_what_was_read_of_an_adapter_is_let_go(tiny, exact):
    with assume(JOINING):
        model = loaded(tiny)
        before = active()
        model.adapters.add("a", made(every_map(tiny)))
        model.adapters.stack(model)
        assert active() - before == model.adapters.nbytes


def test_whole_tensors_of_what_is_unloaded_are_let_go(tiny, exact, tmp_path):
    model = loaded(tiny, made(every_map(tiny), **on_disk(tmp_path, tiny, "linear_fc1.weight", "mtp.fc.weight")))
    before = active()
    for part in (model.vision, model.mtp):
        weights = sum(array.nbytes for _, array in tree_flatten(part.part.parameters()))
        assert active() - before >= weights
        del weights
        part.unload()
        assert active() == before


def test_a_model_without_room_for_its_adapter_is_refused_before_it_is_read(tiny):
    adapter = made(every_map(tiny))
    machine = this_machine(tiny.config.text, mx.float32, 10**9)
    between = plan_memory(tiny, machine, 256, adapters=[adapter]).text - 1
    assert plan_memory(tiny, machine, 256).text < between
    loaded(tiny, limit=between)
    with refused("memory_exceeded", "adapters"):
        loaded(tiny, adapter, limit=between)


def test_whole_tensors_are_planned_unpacked(packed):
    tensors = whole(packed, "mlp.down_proj.weight")
    packed_bytes = sum(e.nbytes for name, e in packed.entries.items() if ".layers" in name and ".mlp.down" in name)
    more = plan_memory(packed.replacing(tensors), mac(8), 256).weights - plan_memory(packed, mac(8), 256).weights
    text = [array for name, array in tensors.items() if name.startswith(TEXT)]
    head = sum(e.nbytes for name, e in packed.entries.items() if name.startswith("mtp.layers.0.mlp.down"))
    assert more == sum(array.size for array in text) * 2 - (packed_bytes - head)


# --- load ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters for nano on disk."""
    nano, base = open_checkpoint(resolve("nano")), tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "other")):
        write_adapter(base / name, made(every_map(nano, f"{TEXT}layers."), seed).pairs)
    return base


def test_one_adapter_is_the_default_and_has_the_folders_name(folders):
    model, processor = load("nano", adapter=folders / "one")
    own = model.adapters["one"]
    assert (model.adapters.names, model.adapters.default) == (["one"], "one")
    assert (own.path, own.format, own.rank, own.whole, own.sees, own.drafts) == (
        folders / "one", "peft", 4, False, False, False
    )  # fmt: skip
    plain = load("nano")[0]
    base = model.make_cache(adapter="base")
    assert mx.array_equal(model(TOKENS, base), plain(TOKENS)) and apart(model(TOKENS), plain(TOKENS)) > 0.1
    assert generate(model, processor, [5, 6, 7], max_tokens=3, temp=0).tokens


def test_of_several_none_is_the_default(folders):
    model, _ = load("nano", adapter={"x": folders / "one", "y": str(folders / "other")})
    assert (model.adapters.names, model.adapters.default) == (["x", "y"], "")
    assert mx.array_equal(model(TOKENS), load("nano")[0](TOKENS))
    x, y = (model(TOKENS, model.make_cache(adapter=name)) for name in "xy")
    assert apart(x, y) > 0.1
    with refused("adapter_unknown", "base, x, y", "one"):
        model.make_cache(adapter="one")


def test_a_scale_multiplies_the_adapters_own(folders):
    plain, once, twice = (
        load("nano", adapter=folders / "one", adapter_scale=scale)[0] for scale in (0, 1, 2)
    )  # fmt: skip
    logits = [model.logits(model.embed(TOKENS)) for model in (plain, once, twice)]
    assert all(mx.array_equal(logits[0], other) for other in logits)
    names = next(iter(once.adapters.arrays())), next(iter(twice.adapters.arrays()))
    assert mx.array_equal(*names)  # A
    assert mx.array_equal(2 * once.adapters.arrays()[1], twice.adapters.arrays()[1])
    assert mx.array_equal(plain(TOKENS), load("nano")[0](TOKENS))


WRONG = {
    "a list": (["x", 3], "option_invalid", "adapter"),
    "nothing": ("", "option_invalid", "adapter"),
    "no adapter at all": ({}, "option_invalid", "adapter"),
    "base": ({"base": "x"}, "option_invalid", "base"),
    "no name": ({"": "x"}, "option_invalid", "''"),
    "a blank": ({" x": "y"}, "option_invalid", "' x'"),
    "no path": ({"x": 3}, "option_invalid", "3"),
    "no such folder": ("nowhere/at/all", "adapter_not_found", "nowhere/at/all"),
}


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_what_names_no_adapter_is_refused(given):
    value, code, fact = given
    with refused(code, fact):
        load("nano", adapter=value)


def test_a_scale_without_an_adapter_is_refused():
    with refused("option_no_effect", "adapter_scale", "adapter"):
        load("nano", adapter_scale=2.0)


def test_what_cannot_stand_beside_the_weights_is_refused_with_the_way_to_fuse(tiny):
    dora = made(every_map(tiny), magnitudes={HEAD: mx.ones(4)})
    whole_one = made(every_map(tiny), replaced=whole(tiny, *ENDS))
    model = loaded(tiny)
    for adapter in (dora, whole_one):
        with refused("adapter_unsupported", "one", "convert --hf-path MODEL --adapter"):
            model.adapters.add("one", adapter)
    assert not model.adapters


def test_each_adapter_has_a_name_of_its_own(tiny):
    model = loaded(tiny, made(every_map(tiny)))
    for name in ("a0", "base", "", "a\n"):
        with refused("option_invalid", "name"):
            model.adapters.add(name, made(every_map(tiny), 1))
