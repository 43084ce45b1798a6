"""What goes wrong with drafts alone does not touch the text: a damaged head, a guess that overflows, little memory."""

import gc
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from refusing import refused

import mlx_qwen35
from mlx_qwen35 import InputError, Model, Processor, batch_generate, generate, load
from mlx_qwen35.engine.conversation import Conversation
from mlx_qwen35.engine.drafts.depth import Costs
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.generation import request

NANO = Path(mlx_qwen35.__file__).with_name("nano")
ASKED = ["What is 34 + 58?", "The list says tom: 42, anna: 17, ben: 5, lena: 88. Which number has anna?"]
GREEDY = {"temp": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def nano() -> tuple[Model, Processor]:
    return load("nano")


def copied(target: Path, change) -> Path:
    """nano, its tensors changed."""
    shutil.copytree(NANO, target)
    arrays = dict(mx.load(str(NANO / "model.safetensors")))
    mx.eval(arrays)
    mx.save_safetensors(str(target / "model.safetensors"), change(arrays), metadata={"format": "pt"})
    return target


@pytest.fixture
def damaged(tmp_path) -> tuple[Model, Processor]:
    """nano with NaN in a norm of the head."""

    def spoil(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        norm = arrays["mtp.norm.weight"]
        return arrays | {"mtp.norm.weight": mx.full(norm.shape, mx.nan, norm.dtype)}

    return load(copied(tmp_path / "damaged", spoil))


# --- a head that cannot be used --------------------------------------------------------------------------------------


def test_a_damaged_head_is_told_of_once_and_the_text_comes_without_it(nano, damaged):
    want = generate(*nano, ASKED[0], mtp="off", **GREEDY)
    assert generate(*damaged, ASKED[0], mtp="off", **GREEDY).tokens == want.tokens
    with pytest.warns(RuntimeWarning, match="no tokens are drafted, for its draft head cannot be used: .*mtp.norm"):
        result = generate(*damaged, ASKED[0], **GREEDY)
    assert result.tokens == want.tokens and "mtp.norm" in result.mtp.reason
    assert "mtp.norm" in generate(*damaged, ASKED[0], **GREEDY).mtp.reason


def test_a_damaged_head_is_refused_where_drafts_are_wanted_always(damaged):
    for _ in range(2):  # when it is read, and when it is known
        with refused("draft_head_unusable", "mtp.norm.weight"):
            generate(*damaged, ASKED[0], mtp="on", **GREEDY)


def test_a_sidecar_that_is_no_head_leaves_the_text_as_it_is(nano, tmp_path):
    folder = copied(tmp_path / "other", lambda arrays: {n: a for n, a in arrays.items() if not n.startswith("mtp.")})
    mx.save_safetensors(str(folder / "mtp.safetensors"), {"layers.0.eh_proj.weight": mx.zeros((4, 4))})
    model, processor = load(folder)
    result = generate(model, processor, ASKED[0], **GREEDY)
    assert result.tokens == generate(*nano, ASKED[0], mtp="off", **GREEDY).tokens
    assert "mtp.safetensors" in result.mtp.reason
    with refused("draft_head_unusable", "mtp.safetensors"):
        generate(model, processor, ASKED[0], mtp="on")


# --- a guess that overflows ------------------------------------------------------------------------------------------


def poisoned(monkeypatch: pytest.MonkeyPatch, model: Model, value: float, step: int) -> None:
    """The embedding of token 777 becomes `value`, and the head guesses it for row 0, at a step."""
    look_up, propose, steps = type(model.embed_tokens).look_up, DraftFollower.propose, []

    def poison(self, tokens, *adapters):
        return mx.where((tokens == 777)[..., None], mx.array(value), look_up(self, tokens, *adapters))

    def guess(self, *arguments):
        steps.append(1)
        drafted = propose(self, *arguments)
        first = mx.arange(len(drafted))[:, None] == 0
        return mx.where(first, 777, drafted) if len(steps) == step else drafted

    monkeypatch.setattr(type(model.embed_tokens), "look_up", poison)
    monkeypatch.setattr(DraftFollower, "propose", guess)


@pytest.mark.core(3)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("prompts", [ASKED[:1], ASKED], ids=["one", "batch"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_guess_that_overflows_spoils_nothing(depth, prompts, value, nano, monkeypatch):
    want = [result.tokens for result in batch_generate(*nano, prompts, mtp="off", **GREEDY)]
    poisoned(monkeypatch, nano[0], value, step=3)
    caches = [nano[0].make_cache() for _ in prompts]
    results = batch_generate(*nano, prompts, mtp="on", mtp_depth=depth, cache=caches, **GREEDY)
    assert [result.tokens for result in results] == want
    assert all(cache.length and cache.first_not_finite(0) is None for cache in caches)


def test_a_text_that_overflows_by_itself_is_told_of_as_without_drafts(nano, monkeypatch):
    logits, calls = Model.logits, []

    def spoiled(self, *given):
        calls.append(1)
        return logits(self, *given) * (mx.nan if len(calls) > 6 else 1)

    monkeypatch.setattr(Model, "logits", spoiled)
    with refused("logits_not_finite"):
        generate(*nano, ASKED[0], mtp="on", **GREEDY)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_auto_gives_up_drafts_rather_than_context():
    model, processor = load("nano")
    prompt, found = [5] * 30000, set()
    for megabytes in range(60, 140):
        model.memory_limit = mx.get_active_memory() + megabytes * 1_000_000
        try:
            off = request(model, processor, prompt, max_tokens=500, mtp="off")
        except InputError:
            continue
        auto = request(model, processor, prompt, max_tokens=500)
        assert auto.limit == off.limit
        found.add(auto.drafts.policy.reason)
    assert found == {"memory has no room for drafts beside this context", ""}


def test_a_model_that_is_let_go_gives_its_memory_back_at_once():
    gc.collect()  # what tests before it have left, which would be freed while it counts
    mx.synchronize()
    before = mx.get_active_memory()
    model, processor = load("nano")
    generate(model, processor, ASKED[0], mtp="on", **GREEDY)
    assert mx.get_active_memory() > before + 5e6
    gc.disable()
    try:
        del model, processor
        mx.synchronize()  # a pass that was begun for a next token may be under way
        assert mx.get_active_memory() < before + 1e6
    finally:
        gc.enable()


def test_the_head_is_given_back_where_it_is_not_wanted(nano):
    model, processor = load("nano")
    generate(model, processor, ASKED[0], mtp="on", **GREEDY)
    assert model.mtp.loaded
    generate(model, processor, ASKED[0], mtp="off", **GREEDY)
    assert not model.mtp.loaded


def test_a_turn_of_a_conversation_decides_on_drafts_once(nano, monkeypatch):
    """Every now and then the answer of `never_pays` is another, for having asked."""
    asked, never_pays = [], Costs.never_pays
    conversation = Conversation(*nano, max_tokens=40)
    monkeypatch.setattr(Costs, "never_pays", lambda *given: asked.append(given) or never_pays(*given))
    list(conversation.send(ASKED[0]))
    assert len(asked) == 1 and conversation.cache.follower is not None
