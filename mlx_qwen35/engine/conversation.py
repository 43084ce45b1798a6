"""A conversation over several turns that reads each part of it once."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Unpack, cast

from mlx_qwen35.cache.cache import Snapshot
from mlx_qwen35.engine.drafts.speculate import attach
from mlx_qwen35.engine.generation import Generation, Result, see
from mlx_qwen35.engine.options import Options, check_options, thinking_switch, vision_options
from mlx_qwen35.engine.plan import plan, reading_step
from mlx_qwen35.engine.prefill import prefill
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.process import refuse_fork
from mlx_qwen35.media.options import VISION_OPTIONS
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import listed, spelled
from mlx_qwen35.prompt.messages import Plain, check_template_options
from mlx_qwen35.prompt.processor import Piece, Processor
from mlx_qwen35.prompt.prompt import Prompt

_OF_ONE_PROMPT = {"cache", "ignore_chat_template", "progress", "images", "videos"}


class Conversation:
    """Messages so far, and the model's memory of them.

    The chat template rewrites the last assistant turn (its reasoning goes), and the DeltaNet state cannot be trimmed.
    So the memory is remembered just before each generation prompt: the next turn goes back there and reads only the
    last answer and the new message. An image or clip in what was read is not encoded again, and stays the one that
    was sent, whatever becomes of its file.

    After each turn `reused` and `total` say how many tokens of its prompt were there already, and how many it has.

    Args:
        options: of every turn, see `Options`; not cache, ignore_chat_template, progress, images or videos.
    """

    def __init__(self, model: Model, processor: Processor, **options: Unpack[Options]):
        if refused := sorted(name for name in _OF_ONE_PROMPT if options.get(name) is not None):
            raise TypeError(f"a conversation takes no {', '.join(refused)}")
        given = check_options(options)
        self.model, self.processor = model, processor
        self._template = {"enable_thinking": thinking_switch(given), "tools": given.pop("tools", None)}
        given.pop("enable_thinking", None)
        check_template_options(self._template, Plain())
        self._system = given.pop("system_prompt", None)
        idle = [name for name in VISION_OPTIONS if given.get(name)]
        if idle and not processor.sees:
            raise InputError(
                "vision_missing", f"{listed(idle)} must not be given: this checkpoint has no vision encoder"
            )
        self.vision = vision_options(given)  # how the images and clips of coming messages are read
        self._options = cast(Options, {name: value for name, value in given.items() if name not in VISION_OPTIONS})
        plan(self._options, model, processor.greedy, [Prompt((0,), thinking=False)], [0])  # tells a bad option
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self._system}] if self._system else []
        self.cache = self.model.make_cache()
        self._read = Prompt((), thinking=False)  # up to the snapshot
        self._snapshot: Snapshot = self.cache.snapshot()
        self.reused = self.total = 0
        self.reading_seconds = 0.0
        self.result: Result | None = None

    def send(
        self, content: str | Sequence[Any], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Iterator[Piece]:
        """Say something and yield the answer as it comes; `result` is the whole of it.

        content: text, or a list of parts with images and clips, see Processor.encode_messages.

        Stopping early keeps what was answered until then. When the message cannot be read, because it is empty or the
        context is full, InputError is raised and the conversation is as it was before.
        """
        refuse_fork()
        if not isinstance(content, str):
            content = self.processor.read_parts(content, self.vision)
        if not (content.strip() if isinstance(content, str) else content):
            raise InputError("message_empty", "the message must not be empty")
        self.result = None
        messages = [*self.messages, {"role": "user", "content": content}]
        prompt = self.processor.encode_messages(messages, self.vision, **self._template)
        before = self.processor.encode_messages(messages, self.vision, add_generation_prompt=False, **self._template)
        assert prompt.identity(len(before.tokens)) == before.identity(), "the generation prompt must come last"
        self._go_back(before)
        start = time.perf_counter()
        new = before.after(len(self._read.tokens))
        room = self.model.config.max_position_embeddings - len(prompt.tokens)
        if room < 1:
            raise InputError(
                "context_length_exceeded",
                f"the conversation has {len(prompt.tokens)} tokens, which fills its context; start a new one, or "
                f"show less of an image with a lower {spelled('max_pixels')}",
            )
        self.reused, self.total = len(self._read.tokens), len(prompt.tokens)
        read_so_far = 0

        def count(tokens: int) -> None:
            nonlocal read_so_far
            read_so_far += tokens
            progress(read_so_far, len(new.tokens))

        unread = prompt.after(len(self._read.tokens))
        drafts = plan(self._options, self.model, self.processor.greedy, [unread], self.cache.row_lengths).drafts
        step = reading_step(self._options, self.model, [len(prompt.tokens)])
        rows = see(self.model, [new])
        seen = time.perf_counter()
        drafts = attach(self.model, self.cache, drafts)
        prefill(self.model, self.cache, rows, step, count)
        self._read, self._snapshot = before, self.cache.snapshot()
        self.reading_seconds = time.perf_counter() - start
        vision_seconds = seen - start if new.media else 0.0
        del rows
        rest = prompt.after(len(before.tokens))
        generation = Generation(self.model, self.processor, [rest], {**self._options, "cache": self.cache}, drafts)
        try:
            for _, piece in generation:
                yield piece
        finally:
            (result,) = generation.results()
            self.result = replace(result, vision_seconds=vision_seconds)
            if self.result.tokens:
                self.messages = [*messages, {"role": "assistant", "content": self.result.text}]

    def _go_back(self, prompt: Prompt) -> None:
        """To the remembered place if it begins this prompt, as it does unless the template rewrites earlier turns."""
        if prompt.identity(len(self._read.tokens)) == self._read.identity():
            self.cache.restore(self._snapshot)
        else:
            self.cache = self.model.make_cache()
            self._read, self._snapshot = Prompt((), thinking=False), self.cache.snapshot()
