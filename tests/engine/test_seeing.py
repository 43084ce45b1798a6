"""Images and videos through generation, conversation and the commands: when the tower is there, and what is refused."""

import io
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from refusing import refused

from mlx_qwen35 import Model, Processor, VisionOptions, batch_generate, generate, load, stream_generate
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.names import VISION
from mlx_qwen35.commands import chat as chat_command
from mlx_qwen35.commands import generate as generate_command
from mlx_qwen35.convert import convert
from mlx_qwen35.engine.conversation import Conversation
from mlx_qwen35.engine.engine import Engine
from mlx_qwen35.engine.generation import request
from mlx_qwen35.engine.media import encode_media
from mlx_qwen35.engine.prefill import prefill
from mlx_qwen35.load import load_vision_encoder
from mlx_qwen35.model.lazy import LazyPart
from mlx_qwen35.model.vision import VisionEncoder

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
TOOL = {"type": "function", "function": {"name": "f"}}
SHAPES, TRIANGLE, MOVING = (PICTURES / name for name in ("shapes.png", "triangle.png", "moving.mp4"))
SEEN, WHICH = "A red circle and a blue square.", "Which way does the circle move?"
ASK = "What do you see?"


@pytest.fixture
def nano() -> tuple[Model, Processor]:
    return load("nano")


@pytest.fixture
def encoded(monkeypatch) -> list:
    """Every image and video that a tower encodes."""
    done = []
    encode = VisionEncoder.encode
    monkeypatch.setattr(VisionEncoder, "encode", lambda self, *given: done.append(given[0]) or encode(self, *given))
    return done


def part(source) -> dict:
    return {"type": "image", "image": source}


# --- generation ------------------------------------------------------------------------------------------------------


def test_an_image_and_a_video_are_answered(nano):
    assert generate(*nano, ASK, images=[SHAPES], enable_thinking=False).text == SEEN
    assert generate(*nano, WHICH, videos=[MOVING], enable_thinking=False).text == "right"
    pieces = stream_generate(*nano, ASK, images=[TRIANGLE], enable_thinking=False)
    assert "".join(map(str, pieces)) == "A green triangle."


@pytest.mark.parametrize("step", [1, 7, *(pytest.param(n, marks=pytest.mark.full) for n in (5, 512))])
def test_an_image_may_straddle_chunks_of_the_prompt(nano, step):
    whole = generate(*nano, ASK, images=[SHAPES], temp=1.0, seed=4)
    assert generate(*nano, ASK, images=[SHAPES], temp=1.0, seed=4, prefill_step_size=step).tokens == whole.tokens


@pytest.mark.full
def test_a_batch_with_different_images_and_none_equals_single_runs(nano):
    prompts = [
        [{"role": "user", "content": [part(SHAPES), {"type": "text", "text": ASK}]}],
        [{"role": "user", "content": "What is 34 + 58?"}],
        [{"role": "user", "content": [{"type": "video", "video": MOVING}, {"type": "text", "text": WHICH}]}],
        [{"role": "user", "content": [part(SHAPES), part(TRIANGLE), {"type": "text", "text": "Are they the same?"}]}],
    ]
    together = batch_generate(*nano, prompts, seed=1, temp=0.8, prefill_step_size=9)
    for prompt, result in zip(prompts, together, strict=True):
        assert generate(*nano, messages=prompt, seed=result.seed, temp=0.8).tokens == result.tokens


def test_the_same_pixels_are_encoded_once(nano, encoded):
    generate(*nano, ASK, images=[SHAPES, TRIANGLE, SHAPES, np.asarray(Image.open(SHAPES).convert("RGB"))])
    assert len(encoded) == 2


def test_other_pixels_in_the_same_tokens_give_another_answer(nano):
    answers = [generate(*nano, ASK, images=[file], enable_thinking=False).text for file in (SHAPES, TRIANGLE)]
    assert answers == [SEEN, "A green triangle."]


def test_images_go_before_every_string_of_a_batch(nano):
    results = batch_generate(*nano, [ASK, "How many shapes are there?"], images=[SHAPES], enable_thinking=False)
    assert [result.text for result in results] == [SEEN, "2"]


def test_a_model_that_is_given_a_prompt_with_an_image_but_has_no_tower_says_so(nano):
    model, processor = nano
    model.vision = None
    with refused("vision_missing"):
        generate(model, processor, ASK, images=[SHAPES])


def test_embeddings_must_be_as_many_as_placeholders(nano):
    model, processor = nano
    prompt = processor.encode_messages([{"role": "user", "content": [part(SHAPES)]}])
    row = encode_media(model, prompt)
    for wrong in (row.embeddings[:3], mx.concatenate([row.embeddings] * 2), None):
        with refused("embeddings_mismatch"):
            prefill(model, model.make_cache(), row._replace(embeddings=wrong), 512)


def test_tokens_that_stand_for_an_image_are_refused_without_one(nano):
    tokens = nano[1].encode_messages([{"role": "user", "content": [part(SHAPES)]}]).tokens
    with refused("tokens_invalid"):
        generate(*nano, tokens)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"max_pixels": 4096}, "option_no_effect"),
        ({"fps": 1.0, "images": [SHAPES]}, "option_no_effect"),
        ({"min_pixels": 1, "videos": [MOVING]}, "option_no_effect"),
        ({"published_limits": True}, "option_no_effect"),
        ({"images": [SHAPES], "max_pixels": 1000}, "option_invalid"),
        ({"images": [SHAPES], "min_pixels": 1, "max_pixels": 1000}, "option_invalid"),
        ({"videos": [MOVING], "video_total_pixels": 1000}, "option_invalid"),
        ({"videos": [MOVING], "fps": 1, "video_num_frames": 4}, "option_conflict"),
        ({"videos": [MOVING], "fps": 0}, "option_invalid"),
        ({"videos": [MOVING], "fps": float("nan")}, "option_invalid"),
        ({"images": [SHAPES], "max_pixels": 4096.0}, "option_invalid"),
        ({"images": str(SHAPES)}, "option_invalid"),
        ({"images": np.zeros((64, 64, 3), np.uint8)}, "option_invalid"),
        ({"videos": MOVING}, "option_invalid"),
        ({"images": [SHAPES], "ignore_chat_template": True, "system_prompt": "x"}, "option_no_effect"),
        ({"images": [SHAPES], "ignore_chat_template": True, "tools": [TOOL]}, "option_no_effect"),
        ({"images": [PICTURES / "none.png"]}, "media_not_found"),
        ({"images": [np.zeros((1, 300, 3), np.uint8)]}, "aspect_ratio_exceeded"),
        ({"images": [SHAPES], "ignore_chat_template": True}, "placeholders_mismatch"),
    ],
)
def test_an_option_that_is_wrong_or_without_effect_is_refused(nano, options, code):

    with refused(code):
        generate(*nano, ASK, **options)


def test_options_at_their_defaults_and_empty_lists_are_none(nano):
    messages = [{"role": "user", "content": "What is 34 + 58?"}]
    options = {"images": [], "videos": (), "published_limits": False, "outer_vision_tags": False}
    assert generate(*nano, messages=messages, **options).text == "92"


@pytest.mark.parametrize("prompt", ["hello", 1.5, True, None])
def test_a_list_that_is_neither_messages_nor_tokens_is_refused(nano, prompt):
    with refused("tokens_invalid"):
        generate(*nano, [prompt])


@pytest.mark.parametrize("prompt", [np.array(1.5), {"role": "user"}, 5])
def test_a_prompt_of_another_kind_is_refused(nano, prompt):
    with refused("prompt_invalid"):
        generate(*nano, prompt)


def test_the_tower_s_time_is_told_and_is_none_without_an_image(nano):
    assert generate(*nano, ASK, images=[SHAPES], max_tokens=1).vision_seconds > 0
    assert generate(*nano, ASK, max_tokens=1).vision_seconds == 0


@pytest.mark.full
def test_embeddings_are_let_go_when_the_prompt_is_read(nano, monkeypatch):
    """They are larger than all else that a sequence of one token could hold."""
    large = np.zeros((1024, 1024, 3), np.uint8)
    sequence = request(*nano, ASK, images=[large], max_pixels=1 << 20, max_tokens=2)
    (image,) = sequence.prompt.placeholders
    text = request(*nano, [5] * len(sequence.prompt.tokens), max_tokens=2)
    engine, held = Engine(nano[0]), []
    for each in (text, sequence):
        mx.clear_cache()
        before = mx.get_active_memory()
        engine.add(each)
        while not each.tokens:
            engine.step()
        mx.synchronize()
        held.append(mx.get_active_memory() - before)
        while not engine.idle:
            engine.step()
    assert abs(held[1] - held[0]) < (image.stop - image.start) * nano[0].config.hidden_size * 4 / 2


@pytest.mark.parametrize("prompt", [[{"role": "user", "content": "Hi"}], [5, 6]])
def test_images_beside_messages_or_tokens_are_refused(nano, prompt):
    with refused("option_no_effect"):
        batch_generate(*nano, [prompt], images=[SHAPES])


# --- the tower's time in memory ---------------------------------------------------------------------------------------


def test_text_never_touches_the_tower():
    model, processor = load("nano", keep_vision=True)
    assert generate(model, processor, "What is 34 + 58?").text == "92"
    assert not model.vision.loaded


def test_the_tower_is_released_before_the_prompt_is_read_and_comes_again(nano):
    model, processor = nano
    loaded = []
    for _ in range(2):
        generate(model, processor, ASK, images=[SHAPES], progress=lambda *_: loaded.append(model.vision.loaded))
    assert loaded == [False] * len(loaded) and loaded


def test_its_memory_returns(nano):
    model, processor = nano
    generate(model, processor, ASK, enable_thinking=False, max_tokens=1)
    mx.clear_cache()
    before = mx.get_active_memory()
    generate(model, processor, ASK, images=[SHAPES], enable_thinking=False, max_tokens=1)
    mx.clear_cache()
    assert mx.get_active_memory() - before < 20_000  # the tower has 2.3 MB


def test_keep_vision_holds_it():
    model, processor = load("nano", keep_vision=True)
    assert not model.vision.loaded
    generate(model, processor, ASK, images=[SHAPES], max_tokens=1)
    assert model.vision.loaded


def test_the_tower_is_released_when_encoding_fails(nano, monkeypatch):
    model, processor = nano
    monkeypatch.setattr(VisionEncoder, "__call__", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, processor, ASK, images=[SHAPES])
    assert not model.vision.loaded


def test_a_tower_that_does_not_fit_is_refused():
    with refused("memory_exceeded", "vision encoder"):
        load_vision_encoder(open_checkpoint(resolve("nano")), mx.float32, None, mx.get_active_memory() + 500_000)


@pytest.mark.parametrize(("kind", "option"), [("image", "max_pixels"), ("video", "video_total_pixels")])
def test_what_cannot_be_encoded_in_this_memory_is_refused_with_the_option_that_helps(nano, kind, option):
    media = nano[1].read(kind, SHAPES if kind == "image" else MOVING, VisionOptions())
    encoder = load_vision_encoder(open_checkpoint(resolve("nano")), mx.float32)
    encoder.encode(media)
    encoder.memory_limit = mx.get_active_memory() + 50_000
    with refused("memory_exceeded", kind, "0.0", option):
        encoder.encode(media)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_whose_tower_was_left_out_refuses_images_and_reads_text(tmp_path):
    folder = shutil.copytree(resolve("nano"), tmp_path / "text")
    file = folder / "model.safetensors"
    tensors = {name: array for name, array in mx.load(str(file)).items() if not name.startswith(VISION)}
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors)
    model, processor = load(folder)
    assert generate(model, processor, "What is 34 + 58?").text == "92"
    with refused("vision_missing"):
        generate(model, processor, ASK, images=[SHAPES])
    with refused("vision_missing"):
        Conversation(model, processor, fps=2.0)
    with refused("vision_missing", "keep_vision"):
        load(folder, keep_vision=True)


@pytest.mark.core(1)
@pytest.mark.parametrize("bits", [None, 0, 8])
def test_a_converted_checkpoint_sees_the_same(tmp_path, bits):
    packing = {"recipe": "bf16"} if bits is None else {"quantize": True, "q_bits": 8, "q_vision_bits": bits}
    folder = convert("nano", tmp_path / "nano", **packing)
    packed = open_checkpoint(folder).quantization(f"{VISION}blocks.0.attn.qkv.weight")
    assert (packed is not None) == bool(bits)
    model, processor = load(folder)
    assert generate(model, processor, ASK, images=[SHAPES], enable_thinking=False).text == SEEN
    assert generate(model, processor, WHICH, videos=[MOVING], enable_thinking=False).text == "right"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_an_absent_preprocessor_file_is_named(tmp_path, kind):
    folder = shutil.copytree(resolve("nano"), tmp_path / "nano")
    name = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}[kind]
    (folder / name).unlink()
    both = {"image": {"images": [SHAPES]}, "video": {"videos": [MOVING]}}
    model, processor = load(folder)
    with refused("preprocessor_missing", kind, name):
        generate(model, processor, ASK, **both.pop(kind))
    assert generate(model, processor, ASK, **both.popitem()[1], max_tokens=1).tokens  # the other kind needs its own


def test_one_file_for_both_kinds_is_read_as_newer_programs_save_it(tmp_path):
    import json

    folder = shutil.copytree(resolve("nano"), tmp_path / "nano")
    image, video = folder / "preprocessor_config.json", folder / "video_preprocessor_config.json"
    both = {"image_processor": json.loads(image.read_text()), "video_processor": json.loads(video.read_text())}
    (folder / "processor_config.json").write_text(json.dumps(both))
    image.unlink(), video.unlink()
    model, processor = load(folder)
    assert generate(model, processor, ASK, images=[SHAPES], enable_thinking=False).text == SEEN
    assert generate(model, processor, WHICH, videos=[MOVING], enable_thinking=False).text == "right"


# --- conversations ---------------------------------------------------------------------------------------------------


def next_position(nano, messages) -> list[int]:
    """Where the tokens of a conversation stand when it is read at once."""
    prompt = nano[1].encode_messages(messages, add_generation_prompt=False, enable_thinking=False)
    cache = nano[0].make_cache()
    prefill(nano[0], cache, encode_media(nano[0], prompt), 512)
    return cache.next_positions


def said(conversation: Conversation, content) -> str:
    return "".join(str(piece) for piece in conversation.send(content))


@pytest.mark.full
@pytest.mark.parametrize("thinking", [True, False])
def test_turns_with_images_answer_as_if_all_were_read_anew(nano, thinking):
    turns = [
        [part(TRIANGLE), {"type": "text", "text": "What shape is it?"}],
        "And what colour is it?",
        [part(SHAPES), {"type": "text", "text": ASK}],
        [{"type": "video", "video": MOVING}, {"type": "text", "text": WHICH}],
    ]
    conversation = Conversation(*nano, enable_thinking=thinking, temp=0.9, seed=2)
    messages = []
    for content in turns:
        messages.append({"role": "user", "content": content})
        fresh = generate(*nano, messages=messages, enable_thinking=thinking, temp=0.9, seed=2)
        turn = conversation.send(content)
        assert turn.text == fresh.text and turn.result.tokens == fresh.tokens
        messages.append({"role": "assistant", "content": fresh.text})


def test_an_image_in_what_was_read_is_not_encoded_again(nano, encoded):
    conversation = Conversation(*nano, enable_thinking=False)
    assert said(conversation, [part(TRIANGLE), {"type": "text", "text": "What shape is it?"}]) == "triangle"
    assert said(conversation, "And what colour is it?") == "green"
    said(conversation, [part(SHAPES), {"type": "text", "text": ASK}])
    assert len(encoded) == 2


def test_positions_go_on_behind_images_of_earlier_turns(nano):
    conversation = Conversation(*nano, enable_thinking=False, max_tokens=1)
    large = {"type": "image", "image": SHAPES, "max_pixels": 65536, "min_pixels": 65536}  # 64 tokens, 8 positions
    for content in ([large, {"type": "text", "text": ASK}], "And what colour is it?"):
        said(conversation, content)
        conversation.cache.restore(conversation.entries[-1].snapshot)
        assert conversation.cache.next_positions == next_position(nano, conversation.messages[:-1])
        assert conversation.cache.next_positions[0] < conversation.cache.row_lengths[0] - 50


def test_other_pixels_put_into_an_earlier_turn_are_read_anew(nano):
    conversation = Conversation(*nano, enable_thinking=False)
    said(conversation, [part(TRIANGLE), {"type": "text", "text": "What shape is it?"}])
    other = nano[1].read("image", SHAPES, VisionOptions())
    conversation.messages[0] = {"role": "user", "content": [part(other), {"type": "text", "text": "What shape is it?"}]}
    turn = conversation.send("And what colour is it?")
    assert turn.text and turn.reused == 0


@pytest.mark.parametrize("option", ["images", "videos"])
def test_a_conversation_takes_its_images_with_the_messages(nano, option):
    with pytest.raises(TypeError, match=f"a conversation takes no {option}"):
        Conversation(*nano, **{option: [SHAPES]})


@pytest.mark.parametrize("content", [5, np.zeros((4, 4, 3), np.uint8)])
def test_a_message_of_another_kind_is_refused(nano, content):
    with refused("messages_invalid"):
        said(Conversation(*nano), content)


def test_a_turn_with_an_image_tells_the_tower_s_time(nano):
    conversation = Conversation(*nano, max_tokens=1)
    for content, seen in (([part(SHAPES), {"type": "text", "text": ASK}], True), (ASK, False)):
        turn = conversation.send(content)
        assert list(turn) and (turn.result.vision_seconds > 0) == seen


def test_a_sent_image_stays_when_its_file_is_replaced(nano, tmp_path):
    file = shutil.copy(TRIANGLE, tmp_path / "picture.png")
    conversation = Conversation(*nano, enable_thinking=False)
    said(conversation, [part(file), {"type": "text", "text": "What shape is it?"}])
    shutil.copy(SHAPES, file)
    turn = conversation.send("And what colour is it?")
    assert turn.text == "green" and turn.reused > 0


def test_a_message_whose_image_cannot_be_read_leaves_the_conversation_as_it_was(nano):
    conversation = Conversation(*nano, enable_thinking=False)
    said(conversation, [part(TRIANGLE), {"type": "text", "text": "What shape is it?"}])
    before = list(conversation.messages)
    with refused("media_not_found", "none.png"):
        said(conversation, [part("none.png"), {"type": "text", "text": ASK}])
    assert conversation.messages == before
    assert said(conversation, "And what colour is it?") == "green"


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    """(arguments) -> (exit status, stdout, stderr) of mlx_qwen35.generate, in this process."""

    def command(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlx_qwen35.generate", "--model", "nano", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            generate_command.main()
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    return command


def test_the_command_says_what_became_of_each_image(run):
    status, out, err = run("--image", SHAPES, "--video", MOVING, "--image", TRIANGLE, "-p", ASK, "--no-enable-thinking")
    assert status == 0 and out.strip()
    assert "image 1: 256x256 resized to 64x64, 4 tokens\nvideo 1: 256x256 resized to 64x64, 4 frames, 8 tokens\n" in err
    assert "image 2: 256x256 resized to 64x64, 4 tokens\n" in err and "Vision: 16 tokens in " in err


def test_images_and_videos_keep_their_order_and_the_system_prompt_its_place():
    options = {"system_prompt": "Be brief."}
    media = [("video", "a.mp4"), ("image", "b.png"), ("video", "c.mp4")]
    system, user = generate_command.with_media("Hi", media, options)
    assert system == {"role": "system", "content": "Be brief."} and options == {}
    assert [part.get("video") or part.get("image") or part["text"] for part in user["content"]] == [
        "a.mp4", "b.png", "c.mp4", "Hi",
    ]  # fmt: skip


def test_the_command_takes_raw_text_with_placeholders(run):
    raw = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What do you see?<|im_end|>\n"
    raw += "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    status, out, _ = run("--ignore-chat-template", "--image", SHAPES, "-p", raw)
    assert status == 0 and out.strip() == SEEN


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--image", "none.png"), "media_not_found"),
        (("--max-pixels", "4096"), "option_no_effect"),
        (("--video", MOVING, "--fps", "1", "--video-num-frames", "4"), "option_conflict"),
        (("--video", MOVING, "--source-fps", "4"), "option_no_effect"),
        (("--image", ""), "media_not_found"),
        (("--image", "file:///a.png"), "media_not_found"),
        (("--image", MOVING), "media_not_opened"),
        (("--video", SHAPES), "media_type_wrong"),
    ],
)
def test_the_command_refuses_with_one_clear_message(run, arguments, code):
    status, out, err = run(*arguments, "-p", ASK)
    assert (status, out) == (2, "") and f"[{code}]" in err and "Traceback" not in err


@pytest.fixture
def talk(monkeypatch, capsys):
    def session(*lines: str, options: tuple[str, ...] = ()) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["mlx_qwen35.chat", "--model", "nano", "--no-enable-thinking", *options])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        chat_command.main()
        out = capsys.readouterr()
        return out.out, out.err

    return session


def test_chat_shows_images_and_videos_with_the_next_message(talk):
    out, err = talk(f"/image {TRIANGLE}", "What shape is it?", "And what colour is it?", f"/video {MOVING}", WHICH)
    answers = [line.removeprefix(">> ").strip() for line in out.splitlines() if line.strip(" >")]
    assert [answer.removeprefix(">> ") for answer in answers] == ["triangle", "green", "right"]
    assert err.count("image 1: 256x256 resized to 64x64, 4 tokens") == 1


def test_chat_keeps_what_was_shown_when_a_line_goes_wrong(talk):
    out, err = talk("/image none.png", f"/image {TRIANGLE}", "/nonsense", "/image", "What shape is it?")
    assert "none.png" in err and "/nonsense" in err and "[option_missing]" in err
    assert "triangle" in out


@pytest.mark.parametrize("command", ["/reset", "/drop"])
def test_chat_forgets_what_was_shown(talk, encoded, command):
    out, _ = talk(f"/image {TRIANGLE}", command, "What is 34 + 58?")
    assert "92" in out and not encoded


def test_chat_shows_several_images_at_once_and_counts_them(talk, encoded):
    _, err = talk(f"/image {SHAPES}", f"/video {MOVING}", f"/image\t{TRIANGLE}", "Are they the same?")
    assert len(encoded) == 3 and "image 1: " in err and "video 1: " in err and "image 2: " in err


def test_chat_takes_names_as_they_are_quoted_or_dropped(talk, tmp_path):
    shutil.copy(TRIANGLE, tmp_path / "my picture.png")
    for name in ("my picture.png", r"my\ picture.png"):
        out, _ = talk(f"/image {tmp_path / name}", "What shape is it?")
        assert "triangle" in out
    out, _ = talk(f"/image '{tmp_path / 'my picture.png'}'", "What shape is it?")
    assert "triangle" in out


def test_chat_keeps_an_image_when_the_message_is_interrupted_before_it_is_taken(talk, monkeypatch):
    hidden, interrupts = Model.hidden, iter([KeyboardInterrupt()])

    def once(*given, **options):
        for interrupt in interrupts:
            raise interrupt
        return hidden(*given, **options)

    monkeypatch.setattr(Model, "hidden", once)
    out, _ = talk(f"/image {TRIANGLE}", "What shape is it?", "What shape is it?")
    assert "triangle" in out


def test_chat_goes_on_when_the_reading_of_an_image_is_interrupted(talk, monkeypatch):
    def interrupted(self, parts, vision, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(Processor, "read_parts", interrupted)
    out, _ = talk(f"/image {TRIANGLE}", "What is 34 + 58?")
    assert "92" in out


def test_keep_vision_holds_the_tower_of_a_command(monkeypatch, run, talk):
    held, unload = [], LazyPart.unload

    def unloaded(part: LazyPart) -> None:
        unload(part)
        if part.nbytes > 2_000_000:  # the vision encoder's; nano's draft head takes half of that
            held.append(part.loaded)

    monkeypatch.setattr(LazyPart, "unload", unloaded)
    for flags in ((), ("--keep-vision",)):
        talk(f"/image {TRIANGLE}", "What shape is it?", options=flags)
        run("--image", TRIANGLE, "-p", ASK, "--max-tokens", "1", *flags)
    assert held == [False, False, True, True]
