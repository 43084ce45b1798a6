"""Messages with images and videos -> tokens: parts that are understood or refused, and the place of placeholders."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from refusing import refused

from mlx_qwen35 import Processor, VisionOptions
from mlx_qwen35.checkpoint.config import read_config
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.prompt.positions import Placeholder, positions

RED = Image.new("RGB", (64, 64), (220, 30, 30))
BLUE = Image.new("RGB", (64, 64), (40, 70, 225))
VIDEO = np.stack([np.full((64, 64, 3), 20 * i, np.uint8) for i in range(4)])
WHAT = {"type": "text", "text": "What is it?"}
PLACE = "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
GROUP = PLACE.replace("image", "video")


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(resolve("nano"), read_config(resolve("nano")))


def encode(processor: Processor, *parts, **options):
    return processor.encode_messages([{"role": "user", "content": list(parts)}], VisionOptions(**options))


def video(**more) -> dict:
    return {"type": "video", "video": VIDEO, "source_fps": 2, **more}


def image(source=RED, **more) -> dict:
    return {"type": "image", "image": source, **more}


# --- placeholders ----------------------------------------------------------------------------------------------------


def test_an_image_takes_as_many_placeholders_as_it_has_tokens(processor):
    prompt = encode(processor, image(), WHAT)
    assert processor.decode(prompt.tokens).startswith(f"<|im_start|>user\n{PLACE}What is it?<|im_end|>")
    (pad,) = processor.placeholder_ids & set(prompt.tokens)
    assert prompt.placeholders == (Placeholder(prompt.tokens.index(pad), 2, 2),)


def test_each_pair_of_frames_of_a_video_has_its_time_and_its_tags(processor):
    text = processor.decode(encode(processor, WHAT, video()).tokens)
    assert f"user\nWhat is it?<0.2 seconds>{GROUP}<1.2 seconds>{GROUP}<|im_end|>" in text


def test_the_newer_form_keeps_the_tags_around_a_whole_video(processor):
    text = processor.decode(encode(processor, video(), outer_vision_tags=True).tokens)
    assert f"<|vision_start|><0.2 seconds>{GROUP}<1.2 seconds>{GROUP}<|vision_end|>" in text


def test_images_and_videos_mix_in_any_order_and_over_several_turns(processor):
    messages = [
        {"role": "user", "content": [image(), video(), {"type": "text", "text": "A"}, image(BLUE)]},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": [video(), image()]},
    ]
    prompt = processor.encode_messages(messages)
    assert [placed.media.is_video for placed in prompt.media] == [False, True, False, True, False]
    assert [len(placed.placeholders) for placed in prompt.media] == [1, 2, 1, 2, 1]
    assert [p.start for p in prompt.placeholders] == sorted(p.start for p in prompt.placeholders)
    pads = processor.placeholder_ids
    shown = [i for i, token in enumerate(prompt.tokens) if token in pads]
    assert shown == [i for p in prompt.placeholders for i in range(p.start, p.stop)]


@pytest.mark.parametrize("name", ["<|image_pad|>", "<|video_pad|>"])
def test_a_placeholder_that_a_user_writes_stays_text(processor, name):
    plain = f"What is {name}, and {name}?"
    prompt = encode(processor, image(), {"type": "text", "text": plain})
    assert plain in processor.decode(prompt.tokens)
    assert len(prompt.placeholders) == 1 and sum(token in processor.placeholder_ids for token in prompt.tokens) == 4
    alone = processor.encode_messages([{"role": "user", "content": plain}])
    assert plain in processor.decode(alone.tokens) and not processor.placeholder_ids & set(alone.tokens)


def test_a_placeholder_in_a_tool_call_or_a_tool_stays_text(processor):
    call = {"name": "find", "arguments": {"text": "<|image_pad|>"}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "no <|video_pad|> found"},
    ]
    tools = [{"type": "function", "function": {"name": "find", "description": "finds <|image_pad|>"}}]
    prompt = processor.encode_messages(messages, tools=tools)
    assert not processor.placeholder_ids & set(prompt.tokens)
    assert "no <|video_pad|> found" in processor.decode(prompt.tokens)


def test_a_placeholder_that_is_a_name_in_a_tool_call_stays_text(processor):
    call = {"name": "find", "arguments": {"<|image_pad|>": "a"}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "none"},
    ]
    prompt = processor.encode_messages(messages)
    assert not processor.placeholder_ids & set(prompt.tokens)
    assert "<parameter=<|image_pad|>>" in processor.decode(prompt.tokens)


def test_the_mark_of_an_escape_is_a_character_that_the_text_does_not_have(processor):
    plain = "\ue000 <|image_pad|> \ue001"
    prompt = encode(processor, {"type": "text", "text": plain})
    assert plain in processor.decode(prompt.tokens)


def test_outer_tags_are_kept_and_not_made(processor):
    options = VisionOptions(source_fps=2, outer_vision_tags=True)
    prompt = processor.encode_text("a<|video_pad|>b", videos=[VIDEO], vision=options)
    assert processor.decode(prompt.tokens) == f"a<0.2 seconds>{GROUP}<1.2 seconds>{GROUP}b"


def test_raw_text_takes_an_image_that_was_read(processor):
    media = encode(processor, image()).media[0].media
    assert processor.encode_text("<|image_pad|>", images=[media]).media[0].media is media


def test_raw_text_says_itself_where_its_images_and_videos_go(processor):
    text = "a<|vision_start|><|video_pad|><|vision_end|>b<|image_pad|>c"
    prompt = processor.encode_text(text, images=[RED], videos=[VIDEO], vision=VisionOptions(source_fps=2))
    expected = f"a<0.2 seconds>{GROUP}<1.2 seconds>{GROUP}b{'<|image_pad|>' * 4}c"
    assert processor.decode(prompt.tokens) == expected
    assert [placed.media.is_video for placed in prompt.media] == [True, False]


@pytest.mark.parametrize(
    ("text", "images"), [("a <|image_pad|>", 0), ("a", 1), ("<|image_pad|><|image_pad|>", 1), ("<|video_pad|>", 1)]
)
def test_raw_text_with_another_number_of_placeholders_than_images_is_refused(processor, text, images):
    with refused("placeholders_mismatch", "_pad|>"):
        processor.encode_text(text, images=[RED] * images)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_every_way_to_name_an_image_gives_the_same_prompt(processor, tmp_path):
    file = io.BytesIO()
    RED.save(file, "PNG")
    (tmp_path / "red.png").write_bytes(file.getvalue())
    data = base64.b64encode(file.getvalue()).decode()
    url = f"data:image/png;base64,{data}"
    ways = [
        image(), {"image": RED}, image(str(tmp_path / "red.png")), image(tmp_path / "red.png"), image(np.asarray(RED)),
        {"type": "image", "path": tmp_path / "red.png"}, {"type": "image", "url": url},
        {"type": "image", "base64": data},
        {"type": "image_url", "image_url": {"url": url}}, {"image_url": url}, image(file.getvalue()),
        {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
    ]  # fmt: skip
    prompts = [encode(processor, way, WHAT) for way in ways]
    assert len({prompt.identity() for prompt in prompts}) == 1


def test_a_video_may_be_named_as_a_url_part(processor, tmp_path):
    for i, frame in enumerate(VIDEO):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    way = {"type": "video_url", "video_url": {"url": str(tmp_path)}, "source_fps": 2}
    assert encode(processor, {**way, "type": "video"}).identity() == encode(processor, video()).identity()


def test_other_pixels_are_another_identity_with_the_same_tokens(processor):
    red, blue = encode(processor, image(), WHAT), encode(processor, image(BLUE), WHAT)
    assert red.tokens == blue.tokens and red.identity() != blue.identity()


def test_a_replaced_file_is_seen_as_new(processor, tmp_path):
    file = tmp_path / "picture.png"
    RED.save(file)
    before = encode(processor, image(file))
    BLUE.save(file)
    assert encode(processor, image(file)).identity() != before.identity()


def test_an_image_that_was_read_may_be_given_again(processor):
    prompt = encode(processor, image())
    assert encode(processor, image(prompt.media[0].media)).identity() == prompt.identity()


def test_a_part_sets_its_own_limits(processor):
    prompt = encode(processor, image(max_pixels=9216, min_pixels=4096), image(max_pixels=1024, min_pixels=1))
    assert [placed.media.grid for placed in prompt.media] == [(1, 4, 4), (1, 2, 2)]
    frames = encode(processor, video(num_frames=2), video(fps=1, total_pixels=16384), fps=2)
    assert [placed.media.grid for placed in frames.media] == [(1, 6, 6), (2, 4, 4)]


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ({"type": "image"}, "message_part_invalid"),
        ({"type": "image", "image": RED, "path": "red.png"}, "message_part_invalid"),
        ({"type": "image", "image": RED, "fps": 2}, "message_part_invalid"),
        ({"type": "video", "video": VIDEO, "max_pixels": 9}, "message_part_invalid"),
        ({"image": RED, "video": VIDEO}, "message_part_invalid"),
        ({"type": "image_url", "image_url": {"link": "x"}}, "message_part_invalid"),
        ({"type": "image_url", "image_url": {"url": "x", "detail": "low"}}, "message_part_invalid"),
        ({"type": "video", "video": VIDEO, "source_fps": 2, "fps": 1, "num_frames": 4}, "option_conflict"),
        ({"type": ["image"]}, "chat_template_refused"),
    ],
)
def test_a_part_that_is_not_understood_is_refused(processor, part, code):
    with refused(code):
        encode(processor, part)


def test_an_image_that_was_read_takes_no_options_and_is_no_video(processor):
    media = encode(processor, image()).media[0].media
    with refused("option_no_effect", "max_pixels"):
        encode(processor, image(media, max_pixels=4096))
    with refused("message_part_invalid"):
        encode(processor, {"type": "video", "video": media})


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([{"role": "user", "content": (part for part in [image(), WHAT])}], "messages_invalid"),
        ([{"role": "user", "content": {"image": RED}.values()}], "messages_invalid"),
        ([{"role": "user", "content": np.array([1])}], "messages_invalid"),
        ({"role": "user", "content": "Hi"}, "messages_invalid"),
        (["Hi"], "messages_invalid"),
        ([None], "messages_invalid"),
    ],
)
def test_what_is_no_message_is_refused_and_never_written_out(processor, messages, code):
    with refused(code):
        processor.encode_messages(messages)


def test_an_image_in_the_system_message_is_refused_in_the_template_s_words(processor):
    with refused("chat_template_refused"):
        processor.encode_messages([{"role": "system", "content": [image()]}, {"role": "user", "content": "Hi"}])


# --- prompts in pieces -----------------------------------------------------------------------------------------------


def test_a_prompt_without_its_beginning_keeps_its_images_in_place(processor):
    prompt = encode(processor, image(), WHAT, image(BLUE), video())
    cut = prompt.placeholders[1].start - 1
    rest = prompt.after(cut)
    assert rest.tokens == prompt.tokens[cut:]
    assert [placed.media for placed in rest.media] == [placed.media for placed in prompt.media[1:]]
    assert [p.start + cut for p in rest.placeholders] == [p.start for p in prompt.placeholders[1:]]


def test_the_identity_of_a_beginning_knows_only_what_it_shows(processor):
    one, two = (encode(processor, image(), WHAT, image(last)) for last in (RED, BLUE))
    assert one.identity(one.placeholders[1].start) == two.identity(two.placeholders[1].start)
    assert one.identity() != two.identity()


def test_positions_of_the_worked_example():
    table = positions(8, [Placeholder(1, 2, 3)], 4)
    assert table.tolist() == [[4, 5, 5, 5, 5, 5, 5, 8], [4, 5, 5, 5, 6, 6, 6, 8], [4, 5, 6, 7, 5, 6, 7, 8]]
