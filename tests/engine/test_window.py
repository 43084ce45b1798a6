"""A window that is full: what still fits, what is refused, and what is said of an answer that it cut."""

import json
import shutil
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image
from refusing import refused

from mlx_qwen35 import Conversation, generate, load
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.commands.chat import main as chat
from mlx_qwen35.commands.generate import main as command
from mlx_qwen35.commands.output import tell_cut
from mlx_qwen35.engine.generation import start

W = 96
ASK = "What is 34 + 58?"


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """(window) -> a folder with nano, of that window."""

    def folder(window: int) -> Path:
        folder = shutil.copytree(resolve("nano"), tmp_path_factory.mktemp("window") / "nano")
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["max_position_embeddings"] = window
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return folder


@pytest.fixture(scope="module")
def small(windowed):
    return load(windowed(W))


@pytest.fixture(scope="module")
def cutting(small, windowed) -> Path:
    """A folder with nano whose window ends a token before the answer to ASK."""
    whole = generate(*small, ASK, temp=0, enable_thinking=False)
    assert whole.finish_reason == "stop"
    return windowed(whole.prompt_tokens + whole.generation_tokens - 1)


@pytest.fixture
def run(cutting, monkeypatch, capsys):
    def run(main, *arguments: str, stdin: str = "") -> tuple[str, str]:
        given = ["--model", str(cutting), "--temp", "0", "--no-enable-thinking", *arguments]
        monkeypatch.setattr(sys, "argv", ["mlx_qwen35", *given])
        monkeypatch.setattr(sys, "stdin", StringIO(stdin))
        try:
            main()
        except SystemExit as end:
            assert not end.code
        return capsys.readouterr()

    return run


def test_a_prompt_of_one_token_less_than_the_window_gets_one_token(small):
    result = generate(*small, [5] * (W - 1), temp=0)
    assert (result.generation_tokens, result.finish_reason, result.limited_by) == (1, "length", "context")


@pytest.mark.parametrize("tokens", [W, W + 1])
def test_a_prompt_as_long_as_the_window_is_refused_with_what_fits(small, tokens):
    with refused("context_length_exceeded", W, W - 1, tokens, "rope_scaling"):
        generate(*small, [5] * tokens)


@pytest.mark.parametrize(
    ("scaling", "tokens", "remedy"),
    [
        ("yarn:1.5", 2 * W, "rope_scaling='yarn'"),
        ("yarn", 4 * W, "rope_scaling='yarn:5'"),
        ("none", 9 * W + 1, "rope_scaling='yarn:10'"),
        ("none", 64 * W, None),
        ("yarn:64", 64 * W, None),
    ],
)
def test_a_factor_that_is_enough_is_named_if_there_is_one(windowed, scaling, tokens, remedy):
    model, processor = load(windowed(W), rope_scaling=scaling)
    with refused("context_length_exceeded") as caught:
        generate(model, processor, [5] * tokens)
    assert remedy in str(caught.value) if remedy else "rope_scaling" not in str(caught.value)


def test_of_several_prompts_the_one_that_is_too_long_is_named(small):
    with refused("context_length_exceeded", "prompt 2"):
        start(*small, [[5], [5] * W, [5]])


@pytest.mark.parametrize(
    ("given", "limit", "by"), [(3, 3, "max_tokens"), (6, 6, "max_tokens"), (7, 6, "context"), (None, 6, "context")]
)
def test_what_limits_an_answer_is_told(small, given, limit, by):
    (request,) = start(*small, [[5] * (W - 6)], **({} if given is None else {"max_tokens": given})).requests
    assert (request.limit, request.limited_by, request.result().limited_by) == (limit, by, by)


def test_an_answer_that_memory_limits_says_so():
    model, processor = load("nano")
    model.memory_limit = mx.get_active_memory() + 4_000_000
    (request,) = start(model, processor, [ASK]).requests
    assert request.limited_by == "memory" and request.limit < model.config.max_position_embeddings - 100


@pytest.mark.core(2)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("left", [1, 2, 4])
def test_drafts_change_nothing_at_the_edge(small, depth, left):
    prompt = [5 + i % 40 for i in range(W - left)]
    plain = generate(*small, prompt, temp=0, mtp="off")
    drafted = generate(*small, prompt, temp=0, mtp="on", mtp_depth=depth)
    assert drafted.tokens == plain.tokens and len(plain.tokens) <= left
    assert drafted.finish_reason == plain.finish_reason


def test_images_too_many_are_told_in_tokens_with_what_makes_them_smaller(small):
    images = [Image.new("RGB", (32, 32))] * W
    with refused("context_length_exceeded", "of images", "max_pixels"):
        generate(*small, ASK, images=images)


def test_a_conversation_goes_on_until_its_window_is_full_and_from_a_reset(small):
    conversation, fresh = Conversation(*small, enable_thinking=False, temp=0), []
    with refused("context_length_exceeded", W, "/reset"):
        for _ in range(W):
            turn = conversation.send(ASK)
            fresh.append(turn.text)
    assert len(fresh) > 1 and len(conversation.messages) == 2 * len(fresh)  # the refused message left no trace
    conversation.reset()
    assert conversation.send(ASK).text == fresh[0]


def test_a_chat_says_that_an_answer_was_cut_by_a_full_context_and_begins_anew(run):
    out, err = run(chat, "--verbose", stdin=f"{ASK}\n{ASK}\n/reset\n{ASK}\n")
    cut, refusal, again = (text in err for text in ("/reset begins anew or", "[context_length_exceeded]", "/reset)"))
    assert cut and refusal and again and "--max-tokens" not in err
    first, behind_reset = (line.split(",")[0] for line in err.splitlines() if line.startswith("[prompt "))
    assert first == behind_reset  # as many tokens: nothing came before
    assert out.count("92") == 2


def test_an_answer_cut_by_the_window_is_told_and_one_by_max_tokens_is_not(run):
    _, err = run(command, "--prompt", ASK)
    assert "the context is full: shorten the prompt or widen it with --rope-scaling yarn" in err
    _, err = run(command, "--prompt", ASK, "--max-tokens", "1")
    assert "full" not in err


@pytest.mark.parametrize(
    ("by", "remedy"), [("context", "--rope-scaling"), ("memory", "--kv-bits"), ("max_tokens", "--max-tokens")]
)
def test_an_answer_cut_while_thinking_names_what_limited_it(small, capsys, by, remedy):
    result = generate(*small, ASK, temp=0, max_tokens=2)
    tell_cut(replace(result, limited_by=by), small[0])
    said = capsys.readouterr().err
    named = [option for option in ("--rope-scaling", "--kv-bits", "--max-tokens") if option in said]
    assert named == [remedy] and "--thinking-budget" in said


def test_of_an_answer_that_was_cut_no_remedy_is_told_that_is_in_use(small, capsys):
    cut = replace(generate(*small, ASK, temp=0, max_tokens=2), limited_by="memory")
    told = {}
    for form in (None, "8", "4"):
        model, _ = load("nano", kv_bits=form)
        tell_cut(cut, model)
        told[form] = capsys.readouterr().err
    assert "--kv-bits 8, 8/4, 4" in told[None] and "--kv-bits 8/4, 4" in told["8"] and "--kv-bits" not in told["4"]
    for factor, remedy in ((2, "--rope-scaling yarn "), (4, "--rope-scaling yarn:5 "), (64, None)):
        model, _ = load("nano", rope_scaling=f"yarn:{factor}")
        tell_cut(replace(cut, limited_by="context"), model)
        said = capsys.readouterr().err.replace(",", " ")
        assert remedy in said if remedy else "--rope-scaling" not in said
