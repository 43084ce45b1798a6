"""A conversation of several turns, each part of which is prefilled once."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Unpack, cast

from mlx_qwen35.cache.cache import Snapshot
from mlx_qwen35.engine.drafts.speculate import attach
from mlx_qwen35.engine.generation import Generation, Result, encode_media
from mlx_qwen35.engine.options import Options, check_options, thinking_switch, vision_options
from mlx_qwen35.engine.plan import plan, reading_step
from mlx_qwen35.engine.prefill import prefill
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.memory import set_limits
from mlx_qwen35.machine.process import refuse_fork
from mlx_qwen35.media.options import VISION_OPTIONS
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import listed, spelled
from mlx_qwen35.prompt.messages import Plain, check_template_options
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.prompt.stream import Piece

_OF_ONE_PROMPT = {"cache", "ignore_chat_template", "progress", "images", "videos"}


class Conversation:
    """Messages so far, and the cache that holds them.

    The chat template removes the reasoning from earlier turns, and a DeltaNet state cannot be trimmed. So a snapshot is
    taken before each generation prompt. The next turn returns there, and prefills only the last answer and the new
    message. Images and videos of earlier turns are not read or encoded again.

    After each turn `total` is the number of tokens of its prompt, `reused` of those that were in the cache already, and
    `prefill_seconds` the time for the others.

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
        self.vision = vision_options(given)  # for the images and videos of coming messages
        self._options = cast(Options, {name: value for name, value in given.items() if name not in VISION_OPTIONS})
        plan(self._options, model, processor.greedy, [Prompt((0,), thinking=False)], [0])  # refuses a bad option
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self._system}] if self._system else []
        self.cache = self.model.make_cache()
        self._cached = Prompt((), thinking=False)  # up to the snapshot
        self._snapshot: Snapshot = self.cache.snapshot()
        self.reused = self.total = 0
        self.prefill_seconds = 0.0
        self.result: Result | None = None

    def send(
        self, content: str | Sequence[Any], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Iterator[Piece]:
        """Send a message and yield the answer in pieces; `result` then holds all of it.

        content: text, or a list of parts with images and videos, see Processor.encode_messages.

        If the caller stops early, the answer so far stays in the conversation. Raises InputError for a message that is
        empty or does not fit into the context; the conversation is then as before.
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
        new = before.after(len(self._cached.tokens))
        room = self.model.config.max_position_embeddings - len(prompt.tokens)
        if room < 1:
            raise InputError(
                "context_length_exceeded",
                f"the conversation has {len(prompt.tokens)} tokens, which fills its context; start a new one, or "
                f"show less of an image with a lower {spelled('max_pixels')}",
            )
        self.reused, self.total = len(self._cached.tokens), len(prompt.tokens)
        done = 0

        def count(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(done, len(new.tokens))

        rest = prompt.after(len(self._cached.tokens))
        drafts = plan(self._options, self.model, self.processor.greedy, [rest], self.cache.row_lengths).drafts
        step = reading_step(self._options, self.model, [len(prompt.tokens)])
        set_limits(self.model.memory_limit)
        rows = encode_media(self.model, [new])
        encoded = time.perf_counter()
        drafts = attach(self.model, self.cache, drafts)
        prefill(self.model, self.cache, rows, step, count)
        self._cached, self._snapshot = before, self.cache.snapshot()
        self.prefill_seconds = time.perf_counter() - start
        vision_seconds = encoded - start if new.media else 0.0
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
        """Return to the snapshot if it holds the beginning of this prompt, else to an empty cache."""
        if prompt.identity(len(self._cached.tokens)) == self._cached.identity():
            self.cache.restore(self._snapshot)
        else:
            self.cache = self.model.make_cache()
            self._cached, self._snapshot = Prompt((), thinking=False), self.cache.snapshot()
