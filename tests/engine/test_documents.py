"""PDFs through prompts, generation, conversations and sessions: pages in the prompt, and memory that stays flat."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pdfs import draws, filled, page, pdf, photographed
from PIL import Image
from refusing import refused

from mlx_qwen35 import Conversation, Model, Processor, Session, VisionOptions, generate, load
from mlx_qwen35.checkpoint.config import read_config
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.engine.media import encode_media

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
SHAPES, TRIANGLE = (np.array(Image.open(PICTURES / f"{name}.png").convert("RGB")) for name in ("shapes", "triangle"))
SEEN, ASK = "A red circle and a blue square.", "What do you see?"
PLACE = "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
pytestmark = draws


@pytest.fixture(scope="module")
def nano() -> tuple[Model, Processor]:
    return load("nano")


@pytest.fixture(scope="module")
def shapes() -> bytes:
    return photographed(SHAPES, TRIANGLE, SHAPES)


def part(source, **more) -> dict:
    return {"type": "pdf", "pdf": source, **more}


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_each_page_is_an_image_behind_its_number(nano, shapes):
    prompt = nano[1].encode_messages(user(part(shapes, pages="3,1"), {"type": "text", "text": ASK}))
    text = nano[1].decode(prompt.tokens)
    assert f"user\nPage 3 of 3:{PLACE}Page 1 of 3:{PLACE}{ASK}<|im_end|>" in text
    rendered = nano[1].render(user(part(shapes, pages="2")))
    assert "user\nPage 2 of 3:<|vision_start|><|image_pad|><|vision_end|><|im_end|>" in rendered


def test_a_part_has_a_resolution_of_its_own(nano):
    made = pdf(page(box="0 0 64 64"))
    (placed,) = nano[1].encode_messages(user(part(made, dpi=36, min_pixels=1))).media
    assert placed.media.size == (32, 32)
    (placed,) = nano[1].encode_messages(user(part(made)), VisionOptions(dpi=36, min_pixels=1)).media
    assert placed.media.size == (32, 32)
    with refused("option_invalid", "dpi"):
        nano[1].encode_messages(user(part(made, dpi=0)))
    with refused("message_part_invalid", "fps"):
        nano[1].encode_messages(user(part(made, fps=2)))
    with refused("message_part_invalid"):
        nano[1].encode_messages(user(part(made, image=made)))


def test_parts_are_read_into_texts_and_images(nano, shapes):
    told = []
    read = nano[1].read_parts(
        [part(shapes, pages="1-2"), {"type": "image", "image": SHAPES}], VisionOptions(), lambda *n: told.append(n)
    )
    assert [item["type"] for item in read] == ["text", "image", "text", "image", "image"]
    assert [item["text"] for item in read if item["type"] == "text"] == ["Page 1 of 3:", "Page 2 of 3:"]
    assert told == [(1, 3), (2, 3), (3, 3)]
    again = nano[1].read_parts(read, VisionOptions())
    assert all(one == other for one, other in zip(read, again, strict=True))


def test_pages_that_do_not_fit_into_the_context_are_refused_with_the_number_that_do(nano):
    folder = resolve("nano")
    config = read_config(folder)
    small = replace(config, text=replace(config.text, max_position_embeddings=64))
    processor = Processor.from_folder(folder, small)
    made = pdf(*[page(box="0 0 64 64")] * 40)
    per_page = 6 + len(processor.tokenizer.encode("Page 1 of 40:"))
    with refused("context_length_exceeded", "64", f" {63 // per_page} do"):
        processor.encode_messages(user(part(made)))


# --- generation ------------------------------------------------------------------------------------------------------


def test_a_page_is_answered_as_its_picture_is(nano, shapes):
    assert generate(*nano, ASK, pdfs=[shapes], pages="1", enable_thinking=False).text == SEEN
    assert generate(*nano, ASK, pdfs=[shapes], pages="2", enable_thinking=False).text == "A green triangle."


def test_progress_comes_page_by_page(nano, shapes):
    told = []
    pdfs = [shapes, photographed(255 - SHAPES)]
    generate(*nano, ASK, pdfs=pdfs, max_tokens=1, media_progress=lambda *n: told.append(n))
    assert [done for done, _ in told] == [0, 1, 3] and {total for _, total in told} == {4}  # page 3 looks as page 1


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"pages": "1"}, "option_no_effect"),
        ({"images": [SHAPES], "dpi": 72}, "option_no_effect"),
        ({"pdfs": [b""], "ignore_chat_template": True}, "option_no_effect"),
        ({"pdfs": "a.pdf"}, "option_invalid"),
        ({"pdfs": ["/no/such.pdf"]}, "media_not_found"),
    ],
)
def test_an_option_without_effect_is_refused(nano, options, code):
    with refused(code):
        generate(*nano, ASK, max_tokens=1, **options)


# --- conversations and sessions --------------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_pages_as_from_a_cold_start(nano, shapes):
    warm = Conversation(*nano, enable_thinking=False, temp=0, max_tokens=4)
    first = warm.send([part(shapes), {"type": "text", "text": ASK}]).text
    turn = warm.send("And now?")
    assert turn.text and turn.reused > 12
    cold = generate(
        *nano, messages=[*user(part(shapes), {"type": "text", "text": ASK}), {"role": "assistant", "content": first},
                         *user({"type": "text", "text": "And now?"})], enable_thinking=False, temp=0, max_tokens=4,
    )  # fmt: skip
    assert cold.tokens == turn.result.tokens


def test_a_session_goes_on_without_the_file(nano, shapes, tmp_path):
    file, saved = tmp_path / "a.pdf", tmp_path / "a.session"
    file.write_bytes(shapes)
    with Session.load(saved, *nano, enable_thinking=False, temp=0, max_tokens=4) as session:
        session.conversation.send([part(file), {"type": "text", "text": ASK}]).text  # noqa: B018
        file.write_bytes(b"another")
        session.save()
        expected = session.conversation.send("And now?").text
    with Session.load(saved, *nano, enable_thinking=False, temp=0, max_tokens=4) as session:
        turn = session.conversation.send("And now?")
        assert turn.text == expected and turn.reused > 12


# --- memory ----------------------------------------------------------------------------------------------------------


def peak(nano: tuple[Model, Processor], count: int, side: int) -> int:
    """Bytes that Python holds at most while so many pages of side x side pixels are read and encoded."""
    made = pdf(*[page(filled(f"0 {i % 7 / 7} 1"), box=f"0 0 {side // 2} {side // 2}") for i in range(count)])
    tracemalloc.start()
    try:
        prompt = nano[1].encode_messages(user(part(made)), VisionOptions(max_pixels=side * side))
        assert len(prompt.media) == count and prompt.media[0].media.size == (side, side)
        encode_media(nano[0], prompt)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.full
def test_memory_does_not_grow_with_the_pages(nano):
    few, many = peak(nano, 2, 192), peak(nano, 8, 192)
    assert many - few < 192 * 192 * 3  # less than the pixels of one page


@pytest.mark.full
def test_sixty_pages_take_no_more_memory_than_six(nano):
    few, many = peak(nano, 6, 512), peak(nano, 60, 512)
    print(f"6 pages: {few / 1e6:.1f} MB, 60 pages: {many / 1e6:.1f} MB; the pixels of a page: 0.8 MB")
    assert many - few < 512 * 512 * 3
