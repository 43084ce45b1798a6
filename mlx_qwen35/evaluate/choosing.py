"""How probable texts are behind a prompt: multiple choice, and the likelihoods of a harness."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_qwen35.engine.encode import encode
from mlx_qwen35.engine.options import PromptOptions, check_options
from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.task import Prompt as Question
from mlx_qwen35.measure.score import Score, likelihoods, split
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import options_of
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Prompt


def check_choices(prompt: Prompt) -> None:
    """InputError where choices stand behind images: likelihoods are those of text behind text."""
    if prompt.media:
        raise InputError(
            "task_invalid",
            "choices are compared behind text alone, and the question shows an image. Leave choices out: list them in "
            "the question, and have the answer written",
        )


def scores(
    model: Model, processor: Processor, prompt: Question, texts: Sequence[str], options: Mapping[str, Any]
) -> list[Score]:
    """Of each text behind the prompt, which is read once, without reasoning. No text depends on the others.

    options: of `generate`; those of the prompt count. Behind raw text a text is split into tokens together with it.
    """
    given = {name: value for name, value in options.items() if name in options_of(PromptOptions)}
    given.pop("enable_thinking", None)
    if isinstance(prompt, str) and given == {"ignore_chat_template": True}:
        pairs = [split(processor, prompt, text) for text in texts]
    else:
        if not given.get("ignore_chat_template"):
            given["enable_thinking"] = False
        asked: Any = prompt
        read = encode(processor, asked, check_options(given))
        check_choices(read)
        tokens = list(read.tokens)
        pairs = [(tokens, list(processor.tokenizer.encode(text, add_special_tokens=False))) for text in texts]
    behind: dict[tuple[int, ...], list[int]] = {}  # context -> places of the texts behind it
    for place, (context, _) in enumerate(pairs):
        behind.setdefault(tuple(context), []).append(place)
    found: dict[int, Score] = {}
    for before, places in behind.items():
        ends = [processor.check_tokens(pairs[place][1]) for place in places]
        own = likelihoods(model, processor.check_tokens(before), ends)
        found.update(zip(places, own, strict=True))
    return [found[place] for place in range(len(pairs))]
