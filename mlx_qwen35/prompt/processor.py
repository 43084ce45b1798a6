"""What the user gives -> a prompt, and generated tokens -> text; with the checkpoint's template and tokenizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.config import Config
from mlx_qwen35.errors import InputError
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.media.preprocess import Media, Preprocessor
from mlx_qwen35.media.preprocessor_files import read_preprocessor
from mlx_qwen35.prompt.control import ControlTokens, check_text, unmarked
from mlx_qwen35.prompt.messages import Plain, check_messages, check_template_options, veiled
from mlx_qwen35.prompt.parts import PADS, in_order, read_parts, spread_clips, take_media, without_media
from mlx_qwen35.prompt.positions import Placeholder
from mlx_qwen35.prompt.prompt import Placed, Prompt
from mlx_qwen35.prompt.tokenizer import load_tokenizer

Messages = Sequence[Mapping[str, Any]]
END_TOKENS = ("<|im_end|>", "<|endoftext|>")  # the checkpoint's files name one each; both end a generation


class Processor:
    """Tokenizer, chat template and image settings of one checkpoint.

    Args:
        tokenizer: mlx-lm's wrapper around the checkpoint's tokenizer.
        config: the checkpoint's configuration, for its end tokens and its vision tower's sizes.
        folder: where the checkpoint's preprocessor files are; None for a checkpoint without a vision tower.
    """

    def __init__(self, tokenizer, config: Config, folder: Path | None = None):
        self.tokenizer, self.config, self._folder = tokenizer, config, folder
        known = tokenizer.get_vocab()
        _check_ids(known, config, folder is not None)
        ends = {known[token] for token in END_TOKENS if token in known}
        self.stop_ids = frozenset(ends | set(config.eos_token_ids) | set(tokenizer.eos_token_ids))
        self.vocabulary = max(known.values()) + 1
        self.greedy = config.greedy
        self.think_start, self.think_end = known.get("<think>"), known.get("</think>")

    @classmethod
    def from_folder(cls, folder: Path, config: Config, has_vision_encoder: bool = True) -> "Processor":
        """Read tokenizer.json and chat template of a checkpoint folder. No code from the folder is run.

        has_vision_encoder: whether the tensors of the vision encoder are there; without them images are refused.
        """
        return cls(load_tokenizer(folder), config, folder if has_vision_encoder and config.vision else None)

    # --- in ---

    def encode_text(
        self,
        text: str,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        vision: VisionOptions = VisionOptions(),  # noqa: B008 (frozen)
    ) -> Prompt:
        """A raw completion prompt: no template. Generation is taken to think if the text leaves a <think> open.

        Control tokens in it, as <|im_start|>, are control tokens: the text is the whole prompt, and its writer's own.

        Images go where the text has <|image_pad|>, clips where it has <|video_pad|>, in order; as many as there are.
        """
        media = [self.read("image", source, vision) for source in images]
        media += [self.read("video", source, vision) for source in videos]
        check_text(text)
        return self._prompt(self._control.mark(text), media, vision, self._control.encode_raw)

    def encode_messages(
        self,
        messages: Messages,
        vision: VisionOptions = VisionOptions(),  # noqa: B008
        **template: Any,
    ) -> Prompt:
        """Messages in the usual form, put through the checkpoint's chat template up to the assistant's turn.

        The content of a message is text or a list of parts: {"type": "text", "text": ...}, {"type": "image", "image":
        SOURCE} with min_pixels and max_pixels if wanted, {"type": "video", "video": SOURCE} with fps or num_frames,
        total_pixels and source_fps; also {"type": "image_url", "image_url": {"url": ...}}. SOURCE is anything that
        read_image or read_video takes.

        `template` goes to the template: enable_thinking True or False (absent: the checkpoint's default), tools, and
        add_generation_prompt. A control token becomes one only where the template writes it: <|im_end|> in a text, a
        tool or a call's arguments stays text. Off an assistant's content the template first splits the reasoning, at
        </think>; beside `reasoning_content` all content is text. Raises InputError with the template's own words when
        it refuses the messages.
        """
        plain = Plain()
        checked = check_messages(messages, plain)
        options = check_template_options(template, plain)
        bare, media = take_media(checked, self.read, vision)
        return self._prompt(self._rendered(bare, options, plain), media, vision, self._control.encode)

    def read(self, kind: str, source: Any, vision: VisionOptions) -> Media:
        """An image or a clip (`kind`), read and resized as the checkpoint wants it."""
        if isinstance(source, Media):
            return source
        if self._folder is None:
            raise InputError(
                "vision_missing",
                f"this checkpoint reads text alone: it has no vision tower, so the {kind} cannot be read. Use the "
                "original, or a folder that was converted with its tower",
            )
        return self._images.image(source, vision) if kind == "image" else self._videos.video(source, vision)

    def read_parts(self, parts: Sequence[Any], vision: VisionOptions) -> list[Any]:
        """The parts of one message with their images and clips read now."""
        return read_parts(parts, self.read, vision)

    @property
    def sees(self) -> bool:
        """Whether images and clips can be read."""
        return self._folder is not None

    @cached_property
    def _images(self) -> Preprocessor:
        return read_preprocessor(self._folder, "image", self.config.vision)

    @cached_property
    def _videos(self) -> Preprocessor:
        return read_preprocessor(self._folder, "video", self.config.vision)

    def render(self, messages: Messages, **template: Any) -> str:
        """The prompt text of messages, each image and clip one placeholder; see encode_messages."""
        plain = Plain()
        checked = check_messages(messages, plain)
        return unmarked(self._rendered(without_media(checked), check_template_options(template, plain), plain))

    def _rendered(self, messages: Messages, options: dict[str, Any], plain: Plain) -> str:
        """The same with marks, see control.py."""
        from mlx_qwen35.prompt.limits import Budget  # these bring jinja2, which takes its time
        from mlx_qwen35.prompt.template import Template, choose

        hugging_face = self.tokenizer._tokenizer
        source = choose(hugging_face.chat_template, "tools" in options)
        if source not in self._templates:
            self._templates[source] = Template(source, self._control, hugging_face.special_tokens_map)
        template = self._templates[source]
        known = {"add_generation_prompt", "documents", "enable_thinking", "tools"} | template.reads
        if unknown := sorted(set(options) - known):
            raise InputError(
                "option_no_effect", f"{', '.join(unknown)} must not be given: the chat template reads no such option"
            )
        options = {"add_generation_prompt": True} | options
        return template.render(veiled(messages, self._control.veil), options, Budget(plain.values, plain.chars))

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self.tokenizer._tokenizer._tokenizer)

    @cached_property
    def _templates(self) -> dict[str, Any]:
        return {}

    def _prompt(
        self, text: str, media: Sequence[Media], vision: VisionOptions, encode: Callable[[str], list[int]]
    ) -> Prompt:
        """Text with one marked placeholder for each image and clip -> tokens with as many as each takes."""
        if self.config.vision:
            media = in_order(text, media)
            text = spread_clips(text, media, vision.outer_vision_tags)
        tokens = encode(text)
        if not tokens:
            raise InputError("prompt_empty", "the prompt must not be empty")
        tokens, placed = self._place(tokens, media)
        return Prompt(tuple(tokens), self.opens_thinking(tokens), tuple(placed))

    def _place(self, tokens: list[int], media: Sequence[Media]) -> tuple[list[int], list[Placed]]:
        """Repeat each placeholder as often as its image, or pair of frames, has tokens."""
        out: list[int] = []
        merge = self.config.vision.spatial_merge_size if media else 1
        pads = self.placeholder_ids
        groups = [(i, *(side // merge for side in m.grid[1:])) for i, m in enumerate(media) for _ in range(m.grid[0])]
        placeholders: list[list[Placeholder]] = [[] for _ in media]
        queue = iter(groups)
        for token in tokens:
            if media and token in pads:
                i, height, width = next(queue)
                placeholders[i].append(Placeholder(len(out), height, width))
                out += [token] * (height * width)
            else:
                out.append(token)
        if next(queue, None) is not None:
            raise InputError(
                "tokenizer_invalid",
                f"the tokenizer must know {' and '.join(PADS.values())} by the ids that config.json gives them "
                f"({sorted(pads)}); it does not. Take both files from the same checkpoint",
            )
        return out, [Placed(m, tuple(own)) for m, own in zip(media, placeholders, strict=True)]

    @property
    def placeholder_ids(self) -> frozenset[int]:
        """The token ids that stand for images and clips."""
        return frozenset(self.config.token_ids[name] for name in ("image", "video") if name in self.config.token_ids)

    def opens_thinking(self, tokens: Sequence[int]) -> bool:
        """Whether a prompt ends inside a thinking block."""
        return _last(tokens, self.think_start) > _last(tokens, self.think_end)

    # --- out ---

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens))

    def text_stream(self, thinking: bool, stop: Sequence[str] = ()) -> "TextStream":
        return TextStream(self, thinking, stop)


def _check_ids(known: Mapping[str, int], config: Config, sees: bool) -> None:
    """InputError unless the model has a row for each token, and config.json the placeholders' ids as the tokenizer."""
    rows, highest = config.text.vocab_size, max(known.values(), default=-1)
    if not 0 <= highest < rows:
        raise InputError(
            "tokenizer_invalid",
            f"the tokenizer must have token ids from 0 to {rows - 1}, as config.json says (vocab_size); "
            f"its highest is {highest if known else 'none'}. Take both files from the same checkpoint",
        )
    named = [("eos_token_id", token) for token in config.eos_token_ids]
    named += [(f"{kind}_token_id", token) for kind, token in config.token_ids.items() if sees]
    for name, token in named:
        if token >= rows:
            raise InputError(
                "config_field_invalid",
                f"config.json: {name!r} must be a token id from 0 to {rows - 1}, as vocab_size says; got {token}. "
                "Download it again",
            )
    for kind, pad in PADS.items():
        if sees and known.get(pad, config.token_ids[kind]) != config.token_ids[kind]:
            raise InputError(
                "config_field_invalid",
                f"config.json: '{kind}_token_id' must be the tokenizer's id of {pad}, {known[pad]}; got "
                f"{config.token_ids[kind]}. Take both files from the same checkpoint",
            )


def _last(tokens: Sequence[int], wanted: int | None) -> int:
    return max((i for i, token in enumerate(tokens) if token == wanted), default=-1)


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
        self._stop = tuple(stop)
        self._held = ""
        self._started = not thinking  # the blank lines between reasoning and answer belong to neither
        self.stopped = False  # a stop string came

    @property
    def reasoning(self) -> bool:
        """Whether it is inside the reasoning now."""
        return self._reasoning

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


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
