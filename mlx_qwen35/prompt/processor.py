"""A user's text or messages -> a prompt, with the checkpoint's tokenizer, chat template and preprocessor."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_qwen35.checkpoint.config import Config
from mlx_qwen35.errors import InputError
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.media.preprocess import Media, Preprocessor
from mlx_qwen35.media.preprocessor_files import read_preprocessor
from mlx_qwen35.prompt.continuation import cut, opened
from mlx_qwen35.prompt.control import ControlTokens, check_text, unmarked
from mlx_qwen35.prompt.marks import Heads, answers_behind_query, marks_at
from mlx_qwen35.prompt.messages import Plain, check_messages, check_template_options, veiled
from mlx_qwen35.prompt.pages import open_pages
from mlx_qwen35.prompt.parts import kind_of, read_parts, take_media, with_pages, without_media
from mlx_qwen35.prompt.placeholders import PADS, expand_tokens, expand_videos, in_order
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.prompt.stream import TextStream
from mlx_qwen35.prompt.tokenizer import END_TOKENS, Tokenizer, load_tokenizer
from mlx_qwen35.prompt.tool_calls import Tools
from mlx_qwen35.values import flag, is_whole, plain, shown, whole

if TYPE_CHECKING:
    from mlx_qwen35.prompt.template import Template

Messages = Sequence[Mapping[str, Any]]


class Processor:
    """Tokenizer, chat template and preprocessor of one checkpoint.

    Args:
        tokenizer: the checkpoint's tokenizer and chat template.
        config: the checkpoint's configuration, for its end tokens and the sizes of its vision encoder.
        folder: where the checkpoint's preprocessor files are; None for a checkpoint without a vision encoder.
        memory_limit: bytes that the model may take, see read_image. The pixels of images and videos follow from it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: Config,
        folder: Path | None = None,
        memory_limit: int | None = None,
    ):
        self.tokenizer, self.config, self._folder, self.memory_limit = tokenizer, config, folder, memory_limit
        self._preprocessors: dict[str, Preprocessor] = {}  # by kind of media
        self._templates: dict[str, Template] = {}  # by source
        self._known_heads: dict[tuple, Heads] = {}  # by template and switches
        known = tokenizer.get_vocab()
        _check_ids(known, config, folder is not None)
        ends = {known[token] for token in END_TOKENS if token in known}
        self.stop_ids = frozenset(ends | set(config.eos_token_ids) | tokenizer.eos_token_ids)
        self.vocabulary = max(known.values()) + 1
        self.greedy = config.greedy
        self.think_start, self.think_end = known.get("<think>"), known.get("</think>")

    @classmethod
    def from_folder(
        cls, folder: Path, config: Config, has_vision_encoder: bool = True, memory_limit: int | None = None
    ) -> "Processor":
        """Read tokenizer.json and chat template of a checkpoint folder. No code from the folder is run.

        has_vision_encoder: whether the tensors of the vision encoder are there; without them images are refused.
        """
        media = folder if has_vision_encoder and config.vision else None
        return cls(load_tokenizer(folder), config, media, memory_limit)

    # --- in ---

    def encode_text(
        self,
        text: str,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        vision: VisionOptions = VisionOptions(),  # noqa: B008 (frozen)
    ) -> Prompt:
        """A raw completion prompt: no template. Generation starts in the reasoning if the text leaves a <think> open.

        Control tokens in the text, as <|im_start|>, are control tokens: it is the whole prompt, and its writer's own.

        Images go where the text has <|image_pad|>, videos where it has <|video_pad|>, in order. InputError unless there
        are as many of each.
        """
        media = [self.read("image", source, vision) for source in images]
        media += [self.read("video", source, vision) for source in videos]
        check_text(text)
        return self._prompt(self._control.mark(text), media, vision, self._control.encode_raw)

    def encode_messages(
        self,
        messages: Messages,
        vision: VisionOptions = VisionOptions(),  # noqa: B008
        *,
        continue_final_message: bool = False,
        **template: Any,
    ) -> Prompt:
        """Messages in the usual form, rendered by the checkpoint's chat template up to the assistant's turn.

        The content of a message is text or a list of parts: {"type": "text", "text": ...}, {"type": "image", "image":
        SOURCE} with min_pixels and max_pixels if wanted, {"type": "video", "video": SOURCE} with fps or num_frames,
        total_pixels and source_fps, {"type": "pdf", "pdf": SOURCE} with pages, dpi, min_pixels and max_pixels; also
        {"type": "image_url", "image_url": {"url": ...}}. SOURCE is anything that read_image, read_video or open_pdf
        takes. A PDF becomes its pages: the text "Page 3 of 12:" and an image for each.

        History is taken as clients send it. A developer's message is a system's, and later system messages join the
        first. A call's arguments are a mapping or its JSON: a blank text is {}, and text that is no JSON object becomes
        one parameter `arguments`, with a RuntimeWarning. Results with a tool_call_id come in the order of the calls of
        the assistant's message before them; an id that none of these has is refused.

        continue_final_message: whether the prompt ends inside the last message, an assistant's without calls, in place
        of a new one: at the end of its content, or of its reasoning where it has no content.

        `template` goes to the template: enable_thinking True or False (absent: the checkpoint's default), tools,
        preserve_thinking where the template has it, and add_generation_prompt. A control token becomes one only where
        the template writes it: <|im_end|> in a text, a tool or a call's arguments stays text. Off an assistant's
        content the template first splits the reasoning, at </think>; beside `reasoning_content` all content is text.
        Raises InputError with the template's own words when it refuses the messages.
        """
        plain = Plain()
        checked = check_messages(messages, plain)
        options = check_template_options(template, plain)
        bare, media = take_media(with_pages(checked, self._pages, vision), self.read, vision)
        go_on = flag("continue_final_message", continue_final_message)
        text, heads = self._rendered(bare, options, plain, go_on), self._heads(options)
        answers = answers_behind_query(bare) + (not go_on and options.get("add_generation_prompt", True))
        return self._prompt(text, media, vision, self._control.encode, lambda text: heads.places(text, answers))

    def encode_answered(
        self,
        messages: Messages,
        vision: VisionOptions = VisionOptions(),  # noqa: B008
        **template: Any,
    ) -> tuple[Prompt, tuple[int, ...]]:
        """A prompt, and the answer to it that is the last message, an assistant's: the tokens to be generated.

        The prompt is that of `encode_messages` for the messages before the last, with the enable_thinking that suits
        the answer: where it has reasoning, the prompt opens it. The tokens end with the one that ends a generation.
        Raises InputError, as `encode_messages` does, and messages_invalid where the template writes the last message
        otherwise than a prompt begins it, or where its text holds a control token.
        """
        plain = Plain()
        checked = check_messages(messages, plain)
        options = check_template_options(template, plain)
        if not checked or checked[-1]["role"] != "assistant":
            raise InputError("messages_invalid", "the last message must be an assistant's")
        bare, media = take_media(with_pages(checked, self._pages, vision), self.read, vision)
        whole = self._rendered(bare, options | {"add_generation_prompt": False}, plain)
        switched = ({**options, "enable_thinking": thinking} for thinking in (False, True))
        asked = [text for own in switched if whole.startswith(text := self._rendered(bare[:-1], own, plain))]
        text = max(asked, key=len, default="")
        answer = whole[len(text) :]
        if not text or (tags := self._control.unmarked_in(answer)):
            own = "calls belong into tool_calls, and reasoning into reasoning_content"
            rule = f"hold no {tags[0]} in its text: {own}" if text else "go on where the template's prompt for it ends"
            raise InputError("messages_invalid", f"messages[{len(messages) - 1}] is an answer, which must {rule}")
        tokens = self._control.encode(answer)
        if (end := next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)) is None:
            raise InputError("chat_template_refused", "the chat template must close an answer with an end token")
        return self._prompt(text, media, vision, self._control.encode), tuple(tokens[: end + 1])

    def read(self, kind: str, source: Any, vision: VisionOptions) -> Media:
        """An image or a video (`kind`), read and resized by the checkpoint's settings."""
        if isinstance(source, Media):
            return source
        preprocessor = self._preprocessor(kind)
        return preprocessor.image(source, vision) if kind == "image" else preprocessor.video(source, vision)

    def resized(self, pixels: np.ndarray, times: Sequence[float], original: tuple[int, int]) -> Media:
        """An image or a video whose pixels were read and resized before; see Media."""
        preprocessor = self._preprocessor("video" if times else "image")
        return Media(pixels, tuple(times), original, preprocessor.config, preprocessor.values)

    @property
    def most_pixels(self) -> int:
        """The most pixels of an image by default. InputError where none can be read."""
        return self._preprocessor("image").most_of_image

    def _preprocessor(self, kind: str) -> Preprocessor:
        if self._folder is None:
            raise InputError(
                "vision_missing",
                f"this checkpoint reads text alone: it has no vision encoder, so the {kind} cannot be read. Use the "
                "original, or a folder that was converted with its vision encoder",
            )
        if kind not in self._preprocessors:
            assert self.config.vision is not None
            self._preprocessors[kind] = read_preprocessor(self._folder, kind, self.config.vision, self.memory_limit)
        return self._preprocessors[kind]

    def read_parts(
        self, parts: Sequence[Any], vision: VisionOptions, progress: Callable[[int, int], None] = lambda done, all: None
    ) -> list[Any]:
        """The parts of one message with their images and videos read now, and the pages of PDFs in their place.

        progress: called with the images that are ready, and all of them; a page is one.
        """
        found = read_parts(parts, self.read, self._pages, vision)
        media = [part[kind] for part in found if (kind := kind_of(part))]
        for done, item in enumerate(media, start=1):
            item.digest  # noqa: B018 (draws a page: one that cannot be drawn is told now)
            progress(done, len(media))
        return found

    def _pages(self, part: Mapping[str, Any], vision: VisionOptions) -> list[dict[str, Any]]:
        """The pages of the PDF of a part."""
        cut, window = self._preprocessor("image").pages, self.config.text.max_position_embeddings
        return open_pages(part, vision, cut, lambda text: len(self.tokenizer.encode(text)), window)

    @property
    def sees(self) -> bool:
        """Whether images and videos can be read."""
        return self._folder is not None

    def render(self, messages: Messages, *, continue_final_message: bool = False, **template: Any) -> str:
        """The prompt text of messages, each image and video one placeholder; see encode_messages."""
        plain = Plain()
        checked = without_media(with_pages(check_messages(messages, plain), self._pages, VisionOptions()))
        options, go_on = check_template_options(template, plain), flag("continue_final_message", continue_final_message)
        return unmarked(self._rendered(checked, options, plain, go_on))

    def _rendered(
        self, messages: list[dict[str, Any]], options: dict[str, Any], plain: Plain, go_on: bool = False
    ) -> str:
        """The prompt text with marks, see control.py. go_on: whether it ends inside the last message."""
        from mlx_qwen35.prompt.limits import RenderLimits  # brings jinja2, which takes its time

        template = self._template("tools" in options)
        known = {"add_generation_prompt", "documents", "enable_thinking", "tools"} | template.reads
        if unknown := sorted(set(options) - known):
            raise InputError(
                "option_no_effect", f"{', '.join(unknown)} must not be given: the chat template reads no such option"
            )
        if go_on and options.get("add_generation_prompt"):
            raise InputError(
                "option_conflict", "continue_final_message must not be given with add_generation_prompt, a new message"
            )
        options = {"add_generation_prompt": not go_on} | options
        messages = veiled(opened(messages) if go_on else messages, self._control.veil)
        text = template.render(messages, options, RenderLimits(plain.values, plain.chars))
        return cut(text) if go_on else text

    def _template(self, tools: bool) -> "Template":
        from mlx_qwen35.prompt.template import Template, choose

        source = choose(self.tokenizer.chat_template, tools)
        if source not in self._templates:
            self._templates[source] = Template(source, self._control, self.tokenizer.special_tokens)
        return self._templates[source]

    def _heads(self, options: Mapping[str, Any]) -> Heads:
        """How messages begin in the template with these options."""
        from mlx_qwen35.prompt.limits import RenderLimits

        template = self._template("tools" in options)
        switches = {name: value for name, value in options.items() if isinstance(value, bool)}
        key = id(template), *sorted(switches.items())
        if key not in self._known_heads:
            self._known_heads[key] = Heads.of(
                lambda messages, prompted: template.render(
                    messages, switches | {"add_generation_prompt": prompted}, RenderLimits(100, 100)
                )
            )
        return self._known_heads[key]

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self.tokenizer.backend)

    def _prompt(
        self,
        text: str,
        media: Sequence[Media],
        vision: VisionOptions,
        encode: Callable[[str], list[int]],
        places: Callable[[str], Mapping[int, str]] = lambda text: {},
    ) -> Prompt:
        """Text with one marked placeholder for each image and video -> tokens with as many as each takes.

        places: where the text parts from others, see `Heads.places`.
        """
        if self.config.vision:
            media = in_order(text, media)
            text = expand_videos(text, media, vision.outer_vision_tags)
        tokens = encode(text)
        if not tokens:
            raise InputError("prompt_empty", "the prompt must not be empty")
        control = self._control.among(tokens)
        tokens, placed = expand_tokens(tokens, media, self.placeholder_ids)
        marks = marks_at(places(text), text, control, [p for own in placed for p in own.placeholders])
        return Prompt(tuple(tokens), self.opens_thinking(tokens), tuple(placed), marks)

    def check_tokens(self, tokens: Sequence[Any]) -> list[int]:
        """Token ids as a caller gives them -> integers. InputError for one that is none, or stands for an image."""
        checked = [plain(token) for token in tokens]
        if wrong := [token for token in checked if not is_whole(token) or not 0 <= token < self.vocabulary]:
            raise InputError(
                "tokens_invalid", f"tokens must be integers from 0 to {self.vocabulary - 1}, got {shown(wrong[0])}"
            )
        if found := sorted(self.placeholder_ids & set(checked)):
            raise InputError(
                "tokens_invalid",
                f"tokens must not stand for images ({found}): there is no image with them. Give messages",
            )
        return checked

    @property
    def placeholder_ids(self) -> frozenset[int]:
        """The token ids that stand for images and videos."""
        return frozenset(self.config.token_ids[name] for name in ("image", "video") if name in self.config.token_ids)

    def opens_thinking(self, tokens: Sequence[int]) -> bool:
        """Whether a prompt ends inside a thinking block."""
        start, end = (
            max((i for i, token in enumerate(tokens) if token == wanted), default=-1)
            for wanted in (self.think_start, self.think_end)
        )
        return start > end

    # --- out ---

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token id stands for, of an added token its text in UTF-8; none where an id has no token.

        A character may be spread over several tokens, so they are no text by themselves.
        """
        return self.tokenizer.token_bytes(whole("token", token, 0, self.vocabulary - 1))

    def text_stream(
        self,
        thinking: bool,
        stop: Sequence[str] = (),
        tools: Tools | None = None,
        call_id: Callable[[int], str] = "call_{}".format,
        one_call: bool = False,
    ) -> TextStream:
        """What turns tokens into pieces of text, see `TextStream`."""
        think = self.think_start, self.think_end
        return TextStream(self.tokenizer.text_bytes, think, thinking, stop, tools, call_id, one_call)


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
