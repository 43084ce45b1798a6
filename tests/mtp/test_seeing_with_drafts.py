"""Images and clips with drafts: the same tokens as without, in fewer steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlx_qwen35 import Model, Processor, Result, batch_generate, generate, load

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
SHAPES, TRIANGLE, MOVING = (PICTURES / name for name in ("shapes.png", "triangle.png", "moving.mp4"))


def shown(question: str, *media: Path) -> list[dict[str, Any]]:
    kinds = {file: "video" if file.suffix == ".mp4" else "image" for file in media}
    parts = [{"type": kind, kind: file} for file, kind in kinds.items()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


IMAGE = shown("What do you see?", SHAPES)
OTHER = shown("What shape is it?", TRIANGLE)
CLIP = shown("Which way does the circle move?", MOVING)
BOTH = shown("Which way does the circle move?", TRIANGLE, MOVING)
TWO = shown("Are they the same?", TRIANGLE, SHAPES)
TEXT = [{"role": "user", "content": "What is 34 + 58?"}]
PROMPTS = {"image": IMAGE, "clip": CLIP, "both": BOTH, "two images": TWO}
SAMPLED = {"temp": 1.0, "seed": 4, "max_tokens": 14}

OTHERS = [(1, 512), (2, 9), (2, 512), (3, 9)]
OTHER_CHUNKS = [(IMAGE, 7), (BOTH, 1)]
GREEDY = {"temp": 0.0, "max_tokens": 14}


@pytest.fixture(scope="module")
def nano() -> tuple[Model, Processor]:
    return load("nano")


def tokens(results: Sequence[Result]) -> list[tuple[int, ...]]:
    return [result.tokens for result in results]


@pytest.mark.parametrize("options", [SAMPLED, pytest.param(GREEDY, marks=pytest.mark.full)], ids=["sampled", "greedy"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_what_is_shown_is_answered_alike_with_drafts(nano, prompt, options):
    plain = generate(*nano, messages=prompt, mtp="off", **options)
    for depth in (1, 2, 3):
        drafted = generate(*nano, messages=prompt, mtp="on", mtp_depth=depth, **options)
        assert drafted.tokens == plain.tokens and drafted.mtp.drafted


@pytest.mark.parametrize(
    ("prompt", "step"), [(IMAGE, 1), (BOTH, 7), *(pytest.param(*case, marks=pytest.mark.full) for case in OTHER_CHUNKS)]
)
def test_chunks_of_the_prompt_change_neither_tokens_nor_drafts(nano, prompt, step):
    whole = generate(*nano, messages=prompt, mtp="on", mtp_depth=3, **SAMPLED)
    parts = generate(*nano, messages=prompt, mtp="on", mtp_depth=3, prefill_step_size=step, **SAMPLED)
    plain = generate(*nano, messages=prompt, mtp="off", **SAMPLED)
    assert parts.tokens == whole.tokens == plain.tokens and parts.mtp == whole.mtp


@pytest.mark.parametrize(
    ("depth", "step"), [(1, 9), (3, 512), *(pytest.param(*case, marks=pytest.mark.full) for case in OTHERS)]
)
def test_a_batch_of_images_a_clip_and_text_is_answered_alike_with_drafts(nano, depth, step):
    prompts = [IMAGE, TEXT, BOTH, OTHER]
    plain = batch_generate(*nano, prompts, mtp="off", prefill_step_size=step, **SAMPLED)
    drafted = batch_generate(*nano, prompts, mtp="on", mtp_depth=depth, prefill_step_size=step, **SAMPLED)
    assert tokens(drafted) == tokens(plain) and len(set(map(len, tokens(plain)))) > 1
    result = drafted[2]
    alone = generate(*nano, messages=BOTH, mtp="on", mtp_depth=depth, **SAMPLED | {"seed": result.seed})
    assert (alone.mtp.drafted, alone.mtp.accepted) == (result.mtp.drafted, result.mtp.accepted)


def test_most_drafts_about_what_is_shown_are_right(nano):
    """All were when this was written; a head whose inputs are in the wrong order has none or few."""
    drafted = accepted = 0
    for prompt in (*PROMPTS.values(), OTHER):
        result = generate(*nano, messages=prompt, mtp="on", mtp_depth=1, temp=0)
        drafted, accepted = drafted + result.mtp.drafted, accepted + result.mtp.accepted
    assert drafted > 25 and accepted > 0.8 * drafted


def test_right_drafts_save_steps(nano):
    plain = generate(*nano, messages=IMAGE, mtp="off", temp=0)
    drafted = generate(*nano, messages=IMAGE, mtp="on", mtp_depth=3, temp=0)
    assert len(plain.tokens) > 15 and drafted.mtp.steps < len(plain.tokens) / 2
