"""A conversation over several turns that reads each part of it once."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Unpack

from mlx_qwen35.cache import Snapshot
from mlx_qwen35.errors import InputError
from mlx_qwen35.generate import Generation, Result
from mlx_qwen35.generate.loop import read
from mlx_qwen35.generate.options import PREFILL_STEP, Options, check_names, plan
from mlx_qwen35.model import Model
from mlx_qwen35.processor import Piece, Processor, Prompt


class Conversation:
    """Messages so far, and the model's memory of them.

    The chat template rewrites the last assistant turn (its reasoning goes), and the DeltaNet state cannot be trimmed.
    So the memory is remembered just before each generation prompt: the next turn goes back there and reads only the
    last answer and the new message.

    After each turn `reused` and `total` say how many tokens of its prompt were there already, and how many it has.

    Args:
        options: of every turn, see `Options`; not cache, ignore_chat_template or progress.
    """

    def __init__(self, model: Model, processor: Processor, **options: Unpack[Options]):
        given = check_names(options)
        if refused := {"cache", "ignore_chat_template", "progress"} & set(given):
            raise TypeError(f"a conversation takes no {', '.join(sorted(refused))}")
        self.model, self.processor = model, processor
        self._template = {name: given.pop(name, None) for name in ("enable_thinking", "tools")}
        self._system = given.pop("system_prompt", None)
        self._step = given.get("prefill_step_size", PREFILL_STEP)
        self._options = given
        plan(given, model.config, processor.greedy, [Prompt((0,), thinking=False)], [0])  # a bad option is told at once
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self._system}] if self._system else []
        self.cache = self.model.make_cache()
        self._read: tuple[int, ...] = ()  # tokens up to the snapshot
        self._snapshot: Snapshot = self.cache.snapshot()
        self.reused = self.total = 0
        self.reading_seconds = 0.0
        self.result: Result | None = None

    def send(self, text: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Iterator[Piece]:
        """Say something and yield the answer as it comes; `result` is the whole of it.

        Stopping early keeps what was answered until then. When the message cannot be read, because it is empty or the
        context is full, InputError is raised and the conversation is as it was before.
        """
        if not text.strip():
            raise InputError("the message must not be empty")
        self.result = None
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.processor.encode_messages(messages, **self._template)
        before = self.processor.encode_messages(messages, add_generation_prompt=False, **self._template).tokens
        assert prompt.tokens[: len(before)] == before, "the generation prompt must come after the messages"
        self._go_back(before)
        start = time.perf_counter()
        new = before[len(self._read) :]
        room = self.model.config.max_position_embeddings - len(prompt.tokens)
        if room < 1:
            raise InputError(
                f"the conversation has {len(prompt.tokens)} tokens, which fills its context; start a new one"
            )
        self.reused, self.total = len(self._read), len(prompt.tokens)
        read_so_far = 0

        def count(tokens: int) -> None:
            nonlocal read_so_far
            read_so_far += tokens
            progress(read_so_far, len(new))

        read(self.model, self.cache, [new], self._step, count)
        self._read, self._snapshot = before, self.cache.snapshot()
        self.reading_seconds = time.perf_counter() - start
        rest = Prompt(prompt.tokens[len(before) :], prompt.thinking)
        generation = Generation(self.model, self.processor, [rest], {**self._options, "cache": self.cache})
        try:
            for _, piece in generation:
                yield piece
        finally:
            (self.result,) = generation.results()
            if self.result.tokens:
                self.messages = [*messages, {"role": "assistant", "content": self.result.text}]

    def _go_back(self, tokens: tuple[int, ...]) -> None:
        """To the remembered place if it begins this prompt, as it does unless the template rewrites earlier turns."""
        if tokens[: len(self._read)] == self._read:
            self.cache.restore(self._snapshot)
        else:
            self.cache = self.model.make_cache()
            self._read, self._snapshot = (), self.cache.snapshot()
