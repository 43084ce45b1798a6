"""The text model against transformers: logits in float32, in whole prompts, in chunks, and step by step; scores."""

import mlx.core as mx
import numpy as np
import pytest
from parity import cases

from mlx_qwen35.kernels.gated_delta import gates
from mlx_qwen35.measure.score import predict

# Logits have a standard deviation of 0.2 to 0.3. Two float32 programs that sum in another order differ by 1e-6 to 2e-5.
TOLERANCE = 1e-4

LENGTHS = (1, 2, 5, 33, 64, 130)  # and 600, which decoding goes on from
CHUNKS = {1: 66, 7: 130, 64: 200}  # of this many tokens; the first case reads its whole prompt so

CASES = [
    pytest.param(case, marks=pytest.mark.full if case.name in cases.MORE_DRAWS else (), id=case.name)
    for case in cases.CASES
]
every_case = pytest.mark.parametrize("case", CASES)


def prompt(case: cases.Case, length: int = cases.PROMPT + cases.DECODED) -> mx.array:
    return mx.array(cases.tokens(case, cases.PROMPT + cases.DECODED)[:length])[None]


@pytest.fixture(scope="module", params=CASES)
def long_prompt(request, parity_model):
    """A case, the logits of its 600 tokens read at once, and the cache that holds them."""
    model = parity_model(request.param)
    cache = model.make_cache()
    logits = model(prompt(request.param, cases.PROMPT), cache)[0]
    mx.eval(logits)
    return request.param, logits, cache


def read_in_chunks(model, ids: mx.array, chunk: int, cache) -> mx.array:
    parts = []
    for start in range(0, ids.shape[1], chunk):
        parts.append(model(ids[:, start : start + chunk], cache)[0])
        mx.eval(parts[-1])
    return mx.concatenate(parts)


@every_case
def test_half_of_the_heads_remember_for_hundreds_of_tokens(case, parity_model):
    model = parity_model(case)
    for layer in model.layers:
        if layer.mixer_name == "linear_attn":
            mixer = layer.linear_attn
            still = mx.zeros((1, 1, mixer.A_log.size))  # the decay without input, which the input moves around
            decay = mx.exp(gates(still, still, mixer, None)[0])
            assert (decay >= 0.99).sum().item() * 2 >= decay.size
            assert decay.min().item() < 0.99


@pytest.mark.core(11)
@every_case
@pytest.mark.parametrize("length", LENGTHS)
def test_logits_of_whole_prompts_equal_transformers(case, length, parity_model, reference):
    logits = parity_model(case)(prompt(case, length))[0]
    assert reference(case).error("logits", logits) < TOLERANCE


@pytest.mark.core(5)
@every_case
@pytest.mark.parametrize("chunk", CHUNKS)
def test_logits_of_chunked_prompts_equal_transformers(case, chunk, parity_model, reference):
    length = cases.PROMPT if case.name == "tiny-0" and chunk > 1 else CHUNKS[chunk]
    model = parity_model(case)
    logits = read_in_chunks(model, prompt(case, length), chunk, model.make_cache())
    assert reference(case).error("logits", logits) < TOLERANCE


@pytest.mark.core(2)
def test_logits_of_a_prompt_of_600_tokens_equal_transformers(long_prompt, reference):
    case, logits, _ = long_prompt
    assert len(logits) == 600
    assert reference(case).error("logits", logits) < TOLERANCE


@pytest.mark.core(2)
def test_logits_of_32_decoded_tokens_equal_transformers(long_prompt, parity_model, reference):
    case, _, cache = long_prompt
    logits = read_in_chunks(parity_model(case), prompt(case)[:, cases.PROMPT :], 1, cache)
    assert len(logits) == 32
    assert reference(case).error("logits", logits, start=cases.PROMPT) < TOLERANCE


@every_case
@pytest.mark.parametrize("length", [66, pytest.param(cases.PROMPT + cases.DECODED, marks=pytest.mark.full)])
def test_scores_equal_transformers(case, length, parity_model, reference):
    found = predict(parity_model(case), prompt(case, length)[0].tolist(), first=1, chunk=50)
    assert len(found.logprobs) == length - 1
    assert reference(case).error("logprobs", found.logprobs[:, None]) < TOLERANCE


def test_a_reference_notices_one_wrong_row_and_nan(reference):
    case = cases.CASES[0]
    held = reference(case)
    good = np.zeros(held.shapes["logits"], np.float32)
    rows, columns = cases.kept(good.shape)
    good[np.ix_(rows, columns)] = held.arrays["logits"][np.ix_(rows, columns)] if held.live else held.arrays["logits"]
    if not held.live:
        assert held.error("logits", good) == 0
    good[33] += 1
    assert held.error("logits", good[33:34], start=33) > 0.5
    good[33] = np.nan
    assert held.error("logits", good[33:34], start=33) > 1e30


def test_a_changed_checkpoint_writer_is_told_from_a_wrong_model():
    case = cases.CASES[0]
    with pytest.raises(AssertionError, match=r"not the one that tiny-0.npz was made with.*make_golden.py"):
        cases.read(case, "another fingerprint")
