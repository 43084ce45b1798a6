"""What the user gives -> prompt tokens, and generated tokens -> text; with the checkpoint's template and tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qwen35.config import Config, read_json
from mlx_qwen35.errors import InputError

Messages = Sequence[Mapping[str, Any]]
END_TOKENS = ("<|im_end|>", "<|endoftext|>")  # the checkpoint's files name one each; both end a generation
_VISION_KEYS = {"image", "image_url", "video"}


@dataclass(frozen=True)
class Prompt:
    """Tokens to be read, and whether generation starts inside a thinking block."""

    tokens: tuple[int, ...]
    thinking: bool


class Processor:
    """Tokenizer and chat template of one checkpoint.

    Args:
        tokenizer: mlx-lm's wrapper around the checkpoint's tokenizer.
        config: the checkpoint's configuration, for its end tokens.
    """

    def __init__(self, tokenizer, config: Config):
        self.tokenizer = tokenizer
        known = tokenizer.get_vocab()
        ends = {known[token] for token in END_TOKENS if token in known}
        self.stop_ids = frozenset(ends | set(config.eos_token_ids) | set(tokenizer.eos_token_ids))
        self.vocabulary = max(known.values()) + 1
        self.greedy = config.greedy
        self.think_start, self.think_end = known.get("<think>"), known.get("</think>")

    @classmethod
    def from_folder(cls, folder: Path, config: Config) -> "Processor":
        """Read tokenizer.json and chat template of a checkpoint folder. No code from the folder is run."""
        if not (folder / "tokenizer.json").is_file():
            raise InputError(
                f"a checkpoint folder must hold tokenizer.json; {folder} does not. Download it again, whole"
            )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (folder / name).is_file() and not read_json(folder / name):
                raise InputError(f"{folder / name} must describe a tokenizer; it is empty. Download it again")
        from mlx_lm.tokenizer_utils import load  # brings transformers, which takes its time

        try:
            return cls(load(folder, {"trust_remote_code": False}), config)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"the tokenizer files of {folder} could not be read ({type(error).__name__}: {error}). "
                "Download them again"
            ) from error

    # --- in ---

    def encode_text(self, text: str) -> Prompt:
        """A raw completion prompt: no template. Generation is taken to think if the text leaves a <think> open."""
        return self._prompt(text)

    def encode_messages(self, messages: Messages, **template: Any) -> Prompt:
        """Messages in the usual form, put through the checkpoint's chat template up to the assistant's turn.

        `template` goes to the template: enable_thinking True or False (absent: the checkpoint's default), tools, and
        add_generation_prompt. Raises InputError with the template's own words when it refuses the messages.
        """
        return self._prompt(self.render(messages, **template))

    def render(self, messages: Messages, **template: Any) -> str:
        """The prompt text of messages; see encode_messages."""
        from jinja2.exceptions import TemplateError

        hugging_face = (
            self.tokenizer._tokenizer
        )  # the wrapper would switch thinking on where the template's default is off
        if hugging_face.chat_template is None:
            raise InputError(
                "this checkpoint has no chat template: it completes raw text, which is generate with "
                "ignore_chat_template (--ignore-chat-template)"
            )
        _refuse_vision(messages)
        given = {key: value for key, value in template.items() if value is not None}
        options = {"add_generation_prompt": True, "tokenize": False} | given
        try:
            return hugging_face.apply_chat_template(list(messages), **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the chat template refuses these messages: {error}") from error

    def _prompt(self, text: str) -> Prompt:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"a prompt must be valid Unicode text, in UTF-8 where it is typed or piped: {error}"
            ) from error
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        if not tokens:
            raise InputError("the prompt must not be empty")
        return Prompt(tuple(tokens), self.opens_thinking(tokens))

    def opens_thinking(self, tokens: Sequence[int]) -> bool:
        """Whether a prompt ends inside a thinking block."""
        return _last(tokens, self.think_start) > _last(tokens, self.think_end)

    # --- out ---

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens))

    def text_stream(self, thinking: bool, stop: Sequence[str] = ()) -> "TextStream":
        return TextStream(self, thinking, stop)


def _last(tokens: Sequence[int], wanted: int | None) -> int:
    return max((i for i, token in enumerate(tokens) if token == wanted), default=-1)


def _refuse_vision(messages: Messages) -> None:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, Sequence) and not isinstance(content, str) else ():
            if isinstance(part, Mapping) and (_VISION_KEYS & set(part) or part.get("type") in _VISION_KEYS):
                raise InputError("messages must be text in this version: images and video are not read yet")


@dataclass(frozen=True)
class Piece:
    """Some generated text: of the reasoning or of the answer. str() is the text."""

    text: str
    reasoning: bool

    def __str__(self) -> str:
        return self.text


class TextStream:
    """Tokens one by one -> pieces of text: whole characters, reasoning apart from answer, ended by a stop string.

    Stop strings are looked for in the answer, not in the reasoning; text that may become one is held back.
    """

    def __init__(self, processor: Processor, thinking: bool, stop: Sequence[str]):
        from tokenizers.decoders import DecodeStream

        self._decoder = DecodeStream(skip_special_tokens=True)
        self._tokenizer = processor.tokenizer._tokenizer._tokenizer
        self._think_start, self._think_end = processor.think_start, processor.think_end
        self._reasoning = thinking
        self._stop = check_stop(stop)
        self._held = ""
        self._started = not thinking  # the blank lines between reasoning and answer belong to neither
        self.stopped = False  # a stop string came

    def add(self, token: int) -> list[Piece]:
        """The text that this token completes, as zero or more pieces."""
        if token == self._think_start or token == self._think_end:
            rest = self.finish()
            self._reasoning, self._started = token == self._think_start, False
            return rest
        text = self._decoder.step(self._tokenizer, token)
        if not text or self.stopped:
            return []
        if not self._started:
            text = text.lstrip("\n")
            self._started = bool(text)
        if self._reasoning or not self._stop:
            return [Piece(text, self._reasoning)] if text else []
        return self._until_stop(text)

    def finish(self) -> list[Piece]:
        """What was held back, at the end. Bytes that make no whole character are dropped."""
        held, self._held = self._held, ""
        return [Piece(held, self._reasoning)] if held and not self.stopped else []

    def _until_stop(self, text: str) -> list[Piece]:
        text, self._held = self._held + text, ""
        found = [position for position in (text.find(stop) for stop in self._stop) if position >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
        else:
            keep = max(_overlap(text, stop) for stop in self._stop)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return [Piece(text, False)] if text else []


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """The stop strings; InputError unless they are a list of strings that are not empty."""
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise InputError(f"stop must be a list of strings that are not empty, got {stop!r}")
    return tuple(stop)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
