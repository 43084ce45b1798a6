"""generate, stream_generate, batch_generate on the bundled model."""

import threading
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from refusing import refused

from mlx_qwen35 import Model, Processor, batch_generate, generate, load, stream_generate
from mlx_qwen35.budget.plan import kv_bytes
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.generation import start
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.engine.sampling import Sampler
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.prompt.prompt import Prompt

ASK = "What is 34 + 58?"


@pytest.fixture(scope="module")
def nano() -> tuple[Model, Processor]:
    return load("nano")


@pytest.fixture
def calls(nano, monkeypatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what the head was asked for."""
    seen = []
    logits = Model.logits

    def spy(self, hidden, *adapters):
        seen.append(hidden.shape)
        return logits(self, hidden, *adapters)

    monkeypatch.setattr(Model, "logits", spy)
    return seen


def test_the_result_is_its_answer_and_says_the_rest(nano):
    result = generate(*nano, prompt=ASK)
    assert str(result) == result.text
    assert result.prompt_tokens == len(nano[1].encode_messages([{"role": "user", "content": ASK}]).tokens)
    assert result.generation_tokens == len(result.tokens)
    assert result.tokens[-1] in nano[1].stop_ids
    assert result.finish_reason == "stop"
    assert result.prompt_tps > 0 and result.generation_tps > 0 and result.peak_memory > 0


def test_messages_and_prompt_mean_the_same(nano):
    assert generate(*nano, messages=[{"role": "user", "content": ASK}]).tokens == generate(*nano, ASK).tokens


def test_token_ids_are_taken_as_they_are(nano):
    tokens = nano[1].encode_messages([{"role": "user", "content": ASK}]).tokens
    result = generate(*nano, tokens)
    assert (result.tokens, result.reasoning) == (generate(*nano, ASK).tokens, generate(*nano, ASK).reasoning)


def test_the_stream_adds_up_to_the_result(nano):
    pieces = list(stream_generate(*nano, ASK))
    result = generate(*nano, ASK)
    assert "".join(piece.text for piece in pieces if not piece.reasoning) == result.text
    assert "".join(piece.text for piece in pieces if piece.reasoning).strip() == result.reasoning


def test_thinking_on_and_off(nano):
    assert generate(*nano, ASK, enable_thinking=True).reasoning
    assert not generate(*nano, ASK, enable_thinking=False).reasoning


def test_the_same_seed_gives_the_same_text_and_another_seed_another(nano):
    options = {"temp": 8.0, "top_p": 1.0, "top_k": 0, "max_tokens": 30}  # hot: nano is very sure of itself
    first, again, other = (generate(*nano, ASK, seed=seed, **options).tokens for seed in (1, 1, 2))
    assert first == again != other


def test_a_random_seed_is_reported_and_reproduces(nano):
    result = generate(*nano, ASK, temp=8.0, max_tokens=20)
    assert generate(*nano, ASK, temp=8.0, max_tokens=20, seed=result.seed).tokens == result.tokens


@pytest.mark.parametrize("step", [1, 7, 64])
def test_the_prompt_may_be_read_in_chunks_of_any_length(nano, step):
    assert generate(*nano, ASK, prefill_step_size=step).tokens == generate(*nano, ASK).tokens


def test_progress_counts_every_prompt_token(nano):
    told = []
    result = generate(*nano, ASK, prefill_step_size=4, progress=lambda done, total: told.append((done, total)))
    total = result.prompt_tokens
    assert told == [(min(done, total), total) for done in range(4, total + 4, 4)]


def test_max_tokens_ends_with_length_and_exactly_there(nano):
    result = generate(*nano, ASK, max_tokens=3)
    assert (len(result.tokens), result.finish_reason) == (3, "length")


def test_a_stop_string_ends_the_answer(nano):
    whole = generate(*nano, ASK, enable_thinking=False)
    cut = generate(*nano, ASK, enable_thinking=False, stop=[whole.text[1:]])
    assert (cut.text, cut.finish_reason) == (whole.text[:1], "stop")


def test_the_system_prompt_is_the_system_message(nano):
    asked = start(*nano, [ASK], system_prompt="Be brief.").requests[0].prompt.tokens
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}]
    assert asked == nano[1].encode_messages(messages).tokens


def test_raw_completion_takes_the_text_as_it_is(nano):
    asked = start(*nano, ["2 + 2 ="], ignore_chat_template=True).requests[0].prompt.tokens
    assert asked == nano[1].encode_text("2 + 2 =").tokens


def test_the_head_sees_one_row_a_token(nano, calls):
    generate(*nano, ASK, max_tokens=4, prefill_step_size=5)
    assert [np.prod(shape[:-1]) for shape in calls] == [1] * 4


def test_no_forward_pass_is_made_for_the_token_after_the_last(nano, calls):
    generate(*nano, ASK, max_tokens=1)
    assert len(calls) == 1


# --- batches ---------------------------------------------------------------------------------------------------------

PROMPTS = [
    ASK,
    "Hello",
    "Who are you?",
    "The list says tom: 42, anna: 17, ben: 5, lena: 88. Which number has anna?",
    "7+5=?",
]


@pytest.mark.core(1)
@pytest.mark.parametrize(
    "options", [{}, {"temp": 6.0, "seed": 5, "top_k": 20, "presence_penalty": 0.5}], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("step", [pytest.param(1024, marks=pytest.mark.full), 6])
def test_a_batch_of_unequal_prompts_equals_the_single_runs(nano, options, step):
    options = options | {"max_tokens": 40, "prefill_step_size": step}
    together = batch_generate(*nano, PROMPTS, **options)
    for prompt, result in zip(PROMPTS, together, strict=True):
        alone = generate(*nano, prompt, **options | {"seed": result.seed})
        assert (result.tokens, result.text, result.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)


def test_rows_of_both_modes_get_the_preset_of_their_own_mode(nano, monkeypatch):
    monkeypatch.setattr(nano[1], "greedy", False)
    message = [{"role": "user", "content": ASK}]
    prompts = [nano[1].encode_messages(message, enable_thinking=mode).tokens for mode in (True, False)]
    for order in (prompts, prompts[::-1]):
        together = batch_generate(*nano, order, seed=[5, 5])
        assert [r.tokens for r in together] == [generate(*nano, prompt, seed=5).tokens for prompt in order]
    assert [request.sampler.sampling.temp for request in start(*nano, prompts).requests] == [1.0, 0.7]


@pytest.mark.full
def test_row_i_of_a_batch_has_seed_plus_i_or_its_own(nano):
    options = {"temp": 8.0, "max_tokens": 12}
    for given, seeds in ((7, [7, 8, 9]), (2**32 - 2, [2**32 - 2, 2**32 - 1, 0]), ([4, 4, 2], [4, 4, 2])):
        together = batch_generate(*nano, [ASK] * 3, seed=given, **options)
        assert [result.seed for result in together] == seeds
        for seed, result in zip(seeds, together, strict=True):
            assert generate(*nano, ASK, seed=seed, **options).tokens == result.tokens


def test_rows_of_a_batch_get_different_texts_without_a_seed(nano):
    together = batch_generate(*nano, [ASK] * 3, temp=8.0, max_tokens=12)
    assert len({result.tokens for result in together}) == 3


def test_seeds_must_be_as_many_as_prompts(nano):
    with refused("option_invalid", "2", "3"):
        batch_generate(*nano, [ASK] * 2, seed=[1, 2, 3])


def test_a_string_is_no_batch(nano):
    with pytest.raises(TypeError, match="prompts must be a list"):
        batch_generate(*nano, ASK)


def test_a_model_works_in_another_thread_than_the_one_that_loaded_it(nano):
    fresh = load("nano")
    answers = []
    thread = threading.Thread(target=lambda: answers.append(generate(*fresh, ASK).text))
    thread.start()
    thread.join()
    assert answers == ["92"]


def test_a_batch_takes_text_messages_and_ids(nano):
    prompts = [
        ASK,
        [{"role": "user", "content": ASK}],
        nano[1].encode_messages([{"role": "user", "content": ASK}]).tokens,
    ]
    assert len({result.tokens for result in batch_generate(*nano, prompts)}) == 1


def test_a_row_that_has_ended_reads_nothing_more(nano):
    caches = [nano[0].make_cache() for _ in PROMPTS]
    results = batch_generate(*nano, PROMPTS, cache=caches)
    assert [cache.row_lengths for cache in caches] == [[r.prompt_tokens + r.generation_tokens] for r in results]
    assert len({result.generation_tokens for result in results}) > 1


def test_an_empty_batch_is_empty(nano):
    assert batch_generate(*nano, []) == []


# --- conversations' caches -------------------------------------------------------------------------------------------


def test_a_cache_continues_a_conversation(nano):
    model, processor = nano
    messages = [{"role": "user", "content": ASK}]
    whole = processor.encode_messages(messages).tokens
    cache = model.make_cache()
    prefill(model, cache, PromptRow(whole[:5]), 1024)
    assert generate(model, processor, whole[5:], cache=cache).tokens == generate(model, processor, whole).tokens


def test_the_noise_of_a_continued_conversation_is_that_of_the_whole(nano):
    model, processor = nano
    whole = processor.encode_messages([{"role": "user", "content": ASK}]).tokens
    cache = model.make_cache()
    prefill(model, cache, PromptRow(whole[:5]), 1024)
    options = {"temp": 8.0, "seed": 8, "max_tokens": 20}
    assert (
        generate(model, processor, whole[5:], cache=cache, **options).tokens == generate(*nano, whole, **options).tokens
    )


def test_two_generations_interleave_on_one_model(nano):
    expected = [generate(*nano, prompt).tokens for prompt in PROMPTS[:2]]
    running = [start(*nano, [prompt]) for prompt in PROMPTS[:2]]
    streams = [iter(generation) for generation in running]
    while streams:
        streams = [stream for stream in streams if next(stream, None) is not None]
    assert [generation.results()[0].tokens for generation in running] == expected


def test_a_generation_runs_once(nano):
    generation = start(*nano, [ASK], max_tokens=2)
    list(generation)
    with refused("generation_spent"):
        iter(generation)
    assert len(generation.results()[0].tokens) == 2


def test_stopping_early_keeps_what_was_written(nano):
    generation = start(*nano, [ASK])
    for _ in generation:
        break
    (result,) = generation.results()
    assert result.finish_reason == "interrupted"
    assert len(result.tokens) >= 1


@pytest.mark.full
def test_memory_stays_flat_over_a_long_generation(nano):
    """Apart from the KV cache, whose bytes the memory plan knows, nothing may pile up over 1,100 steps."""
    model, processor = nano
    tokens = processor.encode_text(ASK).tokens
    sampler = Sampler(Sampling(), 0, len(tokens), processor.vocabulary)
    sequence = Sequence(Prompt(tokens, thinking=False), sampler, 1100, prefill_step_size=1024)
    engine, held = Engine(model), []
    engine.add(sequence)
    while not sequence.finished:
        engine.step()
        if len(sequence.tokens) in (201, 1099):
            mx.synchronize()  # the next pass is under way
            held.append(mx.get_active_memory() - kv_bytes(model.config, len(tokens) + len(sequence.tokens), 4))
    assert abs(held[1] - held[0]) < 1e5


# --- the caller's own sampler -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.uint32, mx.int64, pytest.param(mx.int32, marks=pytest.mark.full)], ids=str)
def test_a_sampler_may_choose_in_any_integer_dtype(nano, dtype):
    options = {"sampler": lambda logprobs: mx.argmax(logprobs, axis=-1).astype(dtype)}
    assert generate(*nano, ASK, **options).tokens == generate(*nano, ASK, temp=0).tokens
    alone = generate(*nano, "Hello", temp=0).tokens
    assert [r.tokens for r in batch_generate(*nano, ["Hello"] * 2, **options)] == [alone] * 2


@pytest.mark.parametrize("token", [-1, 1024, 10**6])
def test_a_sampler_that_chooses_no_token_is_refused(nano, token):
    with refused("option_invalid", "sampler", "1023"):
        generate(*nano, ASK, sampler=lambda logprobs: mx.array([token]))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "  \n", []])
def test_an_empty_prompt_is_refused(nano, prompt):
    with refused("prompt_empty"):
        generate(*nano, prompt)


def test_a_prompt_longer_than_the_context_is_refused(nano):
    context = nano[0].config.max_position_embeddings
    with refused("context_length_exceeded", f"{context:,}"):
        generate(*nano, [5] * context)


def test_the_space_left_bounds_the_answer(nano):
    model, processor = nano
    context = model.config.max_position_embeddings
    assert start(model, processor, [[5] * (context - 4)], max_tokens=100).requests[0].limit == 4
    assert start(model, processor, [[5] * 10]).requests[0].limit == min(32768, context - 10)


def test_both_or_neither_of_prompt_and_messages_is_a_type_error(nano):
    for given in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}):
        with pytest.raises(TypeError, match="either prompt or messages"):
            generate(*nano, **given)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"max_tokens": 0}, "option_invalid"),
        ({"preset": "fast"}, "option_invalid"),
        ({"prefill_step_size": 0}, "option_invalid"),
        ({"stop": "END"}, "option_invalid"),
        ({"temp": -1}, "option_invalid"),
        ({"seed": -4}, "option_invalid"),
        ({"max_tokens": 1.5}, "option_invalid"),
        ({"logit_bias": {10**6: 1.0}}, "option_invalid"),
        (
            {"ignore_chat_template": True, "system_prompt": "S"},
            "option_no_effect",
        ),
        (
            {"ignore_chat_template": True, "enable_thinking": False},
            "option_no_effect",
        ),
    ],
)
def test_a_bad_option_is_refused(nano, options, code):
    with refused(code):
        generate(*nano, ASK, **options)


def test_text_that_is_no_unicode_is_refused(nano):
    with refused("text_invalid"):
        generate(*nano, "\ud800 hi")


@pytest.mark.parametrize("tokens", [[5, -1], [5, 10**6], [5, "x"]])
def test_bad_token_ids_are_refused(nano, tokens):
    with refused("tokens_invalid", "0"):
        generate(*nano, tokens)


def test_a_cache_for_another_number_of_rows_is_refused(nano):
    with refused("cache_batch_mismatch", "3", "1"):
        generate(*nano, ASK, cache=nano[0].make_cache(3))


@pytest.mark.parametrize("count", [1, 3])
def test_several_prompts_need_a_cache_each(nano, count):
    with refused("cache_batch_mismatch", "2"):
        batch_generate(*nano, [ASK, "Hello"], cache=[nano[0].make_cache() for _ in range(count)])


def test_a_cache_of_two_prompts_is_refused(nano):
    cache = nano[0].make_cache()
    with refused("cache_batch_mismatch", "2"):
        batch_generate(*nano, [ASK, "Hello"], cache=[cache, cache])


def test_logits_that_are_not_finite_stop_with_advice(nano, monkeypatch):
    monkeypatch.setattr(Model, "logits", lambda self, hidden, *_: mx.full((*hidden.shape[:-1], 1024), mx.nan))
    with refused("logits_not_finite", "dtype='bfloat16'"):
        generate(*nano, ASK)


# --- defaults --------------------------------------------------------------------------------------------------------


def sampling(nano, **options):
    return start(*nano, [ASK], **options).requests[0].sampler.sampling


def test_the_preset_follows_the_mode_where_the_checkpoint_has_no_wish_of_its_own(nano, monkeypatch):
    monkeypatch.setattr(nano[1], "greedy", False)
    assert (sampling(nano).temp, sampling(nano).top_p) == (1.0, 0.95)
    assert (sampling(nano, enable_thinking=False).temp, sampling(nano, enable_thinking=False).top_p) == (0.7, 0.8)


def test_each_value_of_a_preset_can_be_overridden(nano):
    chosen = sampling(nano, preset="coding", top_p=0.5)
    assert (chosen.temp, chosen.top_k, chosen.top_p) == (0.6, 20, 0.5)


def test_temperature_zero_is_plain_greedy_without_the_preset_s_penalties(nano, monkeypatch):
    monkeypatch.setattr(nano[1], "greedy", False)
    assert sampling(nano, temp=0).presence_penalty == 0
    assert sampling(nano, temp=0, presence_penalty=0.5).presence_penalty == 0.5


def test_a_checkpoint_whose_generation_config_says_so_is_greedy_by_default(nano):
    assert nano[1].greedy and sampling(nano).temp == 0
    assert sampling(nano, preset="thinking").temp == 1.0
