"""What quantized keys and values cost nano on held-out lessons: divergence within its budget, and the same answers."""

import mlx.core as mx
import pytest
from variants import Held, lessons

from mlx_qwen35 import batch_generate, load
from mlx_qwen35.cache.kv_format import UNQUANTIZED, KVFormat
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.measure.divergence import divergence
from mlx_qwen35.measure.layerwise import Layerwise

MILLINATS = {"8": 0.05, "8/4": 1.0, "4": 5.0}
FEW, ALL = Held(1, ("add_3", "recall")), Held(3)
lesson_sets = pytest.mark.parametrize("held", [FEW, pytest.param(ALL, marks=pytest.mark.full)], ids=("few", "all"))


@lesson_sets
@pytest.mark.parametrize(
    "kv",
    [
        KVFormat.of("8"),
        KVFormat.of("4"),
        *(pytest.param(kv, marks=pytest.mark.full) for kv in (KVFormat.of("8/4"), KVFormat.of("8/4", rotate=True))),
        pytest.param(KVFormat.of("4", rotate=True), marks=pytest.mark.full),
    ],
    ids=lambda kv: kv.name,
)
def test_the_divergence_is_within_its_budget(kv, held):
    checkpoint = open_checkpoint(resolve("nano"))
    plain, quantized = (Layerwise(checkpoint, mx.float32, kv=form) for form in (UNQUANTIZED, kv))
    found = divergence(plain, quantized, *lessons(held))
    assert 0 < 1000 * found.kl <= MILLINATS[kv.name.removesuffix(" rotated")]


@lesson_sets
def test_every_greedy_answer_is_the_same_in_8_bit(held):
    tokens, first = lessons(held)
    prompts = [row[:start] for row, start in zip(tokens, first, strict=True)]
    answers = []
    for form in (None, 8):
        model, processor = load("nano", kv_bits=form)
        found = batch_generate(model, processor, prompts, temp=0, max_tokens=96)
        answers.append([result.tokens for result in found])
    assert answers[0] == answers[1] and all(answers[0])
