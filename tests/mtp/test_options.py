"""Who gets drafts, what is told about it, and what is refused."""

import mlx.core as mx
import pytest
from geometries import changed
from refusing import refused

from mlx_qwen35 import Model, Processor, generate, load
from mlx_qwen35.budget.plan import most_depth
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.config import FULL, LINEAR
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.engine.drafts.speculate import LEAST_TOKENS, DraftPolicy, choose_drafts, head_record
from mlx_qwen35.load import load_model

TINY = changed(geometry("tiny"), num_hidden_layers=2, layer_types=[LINEAR, FULL])
ASK = "What is 34 + 58?"


@pytest.fixture(scope="module")
def nano() -> tuple[Model, Processor]:
    return load("nano")


@pytest.fixture
def model(checkpoint_folder) -> Model:
    """With a head that is not loaded."""
    return load_model(open_checkpoint(checkpoint_folder(TINY, vision=False)), mx.float32, "tiny")


@pytest.fixture(scope="module")
def headless(checkpoint_folder) -> Model:
    return load_model(open_checkpoint(checkpoint_folder(TINY, mtp=False, vision=False)), mx.float32, "tiny")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sometimes", "", True, 1])
def test_another_mode_is_refused(mode, nano):
    with refused("option_invalid", repr(mode)):
        generate(*nano, ASK, mtp=mode)


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
@pytest.mark.parametrize("depth", [0, 4, -1, 1.0, "2", True])
def test_another_depth_is_refused(depth, mode, nano):
    with refused("option_invalid", "mtp_depth", "1", "3", depth):
        generate(*nano, ASK, mtp=mode, mtp_depth=depth)


def test_a_depth_with_off_is_refused(nano):
    with refused("option_no_effect", "mtp_depth"):
        generate(*nano, ASK, mtp="off", mtp_depth=2)


@pytest.mark.parametrize("options", [{"mtp": "on"}, {"mtp_depth": 1}, {"mtp": "auto", "mtp_depth": 3}], ids=str)
def test_drafts_of_a_checkpoint_without_a_head_are_refused(options, nano, headless):
    with refused("draft_head_missing"):
        generate(headless, nano[1], ASK, **options)


def allow(model: Model, depth: int, rows: int) -> None:
    """Leave memory for so many drafts at a time and no more."""
    low, high = 0.0, 1e9
    while high - low > 1e4:  # the most that has no room for one more
        middle = (low + high) / 2
        model.memory_limit = int(mx.get_active_memory() + middle)
        fits = most_depth(model.config, model.dtype, model.memory_limit, model.mtp.nbytes, rows, 4) > depth
        low, high = (low, middle) if fits else (middle, high)
    model.memory_limit = int(mx.get_active_memory() + low)
    assert most_depth(model.config, model.dtype, model.memory_limit, model.mtp.nbytes, rows, 4) == depth


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("most", "told"), [(2, "only for 2: lower mtp_depth, or"), (1, "only for 1: lower mtp_depth")])
def test_more_drafts_than_memory_has_room_for_are_refused(most, told, rows, model):
    allow(model, most, rows)
    with refused("memory_exceeded", "3", told):
        choose_drafts(model, "on", 3, rows, 100)
    assert choose_drafts(model, "on", most, rows, 100) == DraftPolicy(most, fixed=True, head_bytes=model.mtp.nbytes)
    assert choose_drafts(model, "auto", None, rows, 100) == DraftPolicy(most, head_bytes=model.mtp.nbytes, short=True)


def test_a_head_that_memory_has_no_room_for_is_refused_or_left_out(model):
    allow(model, 0, 1)
    with refused("memory_exceeded", "2"):
        choose_drafts(model, "on", None, 1, 100)
    left_out = DraftPolicy(0, reason="memory has no room for the draft head", short=True)
    assert choose_drafts(model, "auto", None, 1, 100) == left_out
    assert not model.mtp.loaded


# --- what is chosen, and told ----------------------------------------------------------------------------------------


def test_on_drafts_two_tokens_and_auto_up_to_three(model):
    assert choose_drafts(model, "on", None, 1, 5) == DraftPolicy(2, fixed=True, head_bytes=model.mtp.nbytes)
    assert choose_drafts(model, "auto", None, 1, LEAST_TOKENS) == DraftPolicy(3, head_bytes=model.mtp.nbytes)
    assert choose_drafts(model, "auto", 1, 1, LEAST_TOKENS) == DraftPolicy(1, head_bytes=model.mtp.nbytes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mtp": "off"}, "off"),
        ({"max_tokens": LEAST_TOKENS - 1}, f"not for answers of fewer than {LEAST_TOKENS} tokens"),
        ({"mtp": "auto", "max_tokens": 1}, f"not for answers of fewer than {LEAST_TOKENS} tokens"),
    ],
)
def test_the_result_says_why_there_were_no_drafts(options, reason, nano, model):
    result = generate(model, nano[1], [5, 6, 7], **{"max_tokens": 2, **options})
    assert (result.mtp.reason, result.mtp.drafted, result.mtp.depths) == (reason, 0, ())
    assert str(result.mtp) == f"none; {reason}"
    assert not model.mtp.loaded


def test_auto_without_a_head_says_so(nano, headless):
    assert generate(headless, nano[1], ASK, max_tokens=40).mtp.reason.startswith("the checkpoint has no draft head")


def test_auto_leaves_drafts_alone_where_none_could_pay(nano, model):
    costs = head_record(model.mtp).costs[1]
    for depth in (1, 2, 3):
        for _ in range(3):
            costs.add(depth, 2.0 + 2 * depth)
    result = generate(model, nano[1], [5, 6, 7], max_tokens=40)
    assert result.mtp.reason.startswith("disabled: on this machine drafts would not pay even if")
    assert not model.mtp.loaded
    assert choose_drafts(model, "on", None, 1, 40).depth == 2


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_statistics_count_drafts_and_steps(depth, nano):
    result = generate(*nano, ASK, mtp="on", mtp_depth=depth)
    told = result.mtp
    assert told.reason == f"fixed at depth {depth}" and told.depths[0] == (0, depth)
    assert 0 <= 1 + told.steps + told.accepted - result.generation_tokens <= depth, "those behind the end are counted"
    assert 0 < told.accepted <= told.drafted <= depth * told.steps
    assert f"{told.accepted} of {told.drafted} tokens accepted" in str(told)


# --- without ---------------------------------------------------------------------------------------------------------


def test_without_drafts_the_head_stays_on_disk(nano, checkpoint_copy):
    """A head that is damaged is told of when it is read."""
    folder = checkpoint_copy(TINY, vision=False)
    (file,) = folder.glob("*.safetensors")
    arrays = dict(mx.load(str(file)))
    mx.eval(arrays)
    arrays["mtp.norm.weight"] = mx.full(arrays["mtp.norm.weight"].shape, mx.nan, arrays["mtp.norm.weight"].dtype)
    mx.save_safetensors(str(file), arrays, metadata={"format": "pt"})
    model = load_model(open_checkpoint(folder), mx.float32, "tiny")
    for options in ({"mtp": "off"}, {"mtp": "auto"}):
        generate(model, nano[1], [5, 6, 7], max_tokens=3, **options)  # a warning would be an error
    assert not model.mtp.loaded
    with refused("draft_head_unusable", "mtp.norm.weight"):
        generate(model, nano[1], [5, 6, 7], max_tokens=3, mtp="on")


def test_without_drafts_there_are_as_many_passes_as_for_a_checkpoint_without_a_head(nano, model, headless, monkeypatch):
    passes, hidden = [], Model.hidden

    def spy(self, tokens, *args, **options):
        passes.append(tokens.shape)
        return hidden(self, tokens, *args, **options)

    monkeypatch.setattr(Model, "hidden", spy)
    counts = []
    never = {token: -100 for token in nano[1].stop_ids}
    for own in (model, headless):
        passes.clear()
        generate(own, nano[1], [5, 6, 7], max_tokens=6, mtp="off", logit_bias=never)
        counts.append(list(passes))
    assert counts[0] == counts[1] == [(1, 3)] + [(1, 1)] * 5
