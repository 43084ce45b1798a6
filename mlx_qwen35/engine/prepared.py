"""A request made ready before an engine has room for it: all of it that needs no MLX and no free memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx

from mlx_qwen35.cache.prefix import PrefixLibrary
from mlx_qwen35.cache.prefix_tokens import Prefix
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.engine.constraints.rules import Rules
from mlx_qwen35.engine.drafts.speculate import DraftPolicy, DraftStatistics
from mlx_qwen35.engine.encode import prefix_of
from mlx_qwen35.engine.generation import Given, make_ready, make_request
from mlx_qwen35.engine.options import Options
from mlx_qwen35.engine.plan import SequencePlan, check_prompts, fill_in
from mlx_qwen35.engine.result import Result
from mlx_qwen35.engine.sequence import Sequence as Request
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Prompt


@dataclass
class Prepared:
    """A prompt, its options, and the plan of each of its answers. adapter: the name of the one that reads the prompt,
    "" for none.
    """

    processor: Processor
    prompt: Prompt
    adapter: str
    options: Options
    rules: Rules
    plans: Sequence[SequencePlan]

    @cached_property
    def prefix(self) -> Prefix:
        """The prompt, as a library compares it."""
        return prefix_of(self.prompt, self.adapter)

    @property
    def open_ended(self) -> bool:
        """Whether nobody said how long an answer may be."""
        return "max_tokens" not in self.options

    def request(self, choice: int, chunk: int, drafts: DraftPolicy, library: PrefixLibrary | None) -> Request:
        """The sequence of one answer. chunk: most tokens of a chunk of the prompt."""
        planned = replace(self.plans[choice], prefill_step_size=chunk, drafts=drafts)
        options: Any = self.options if library is None else {**self.options, "library": library}
        return make_request(self.processor, self.prompt, self.adapter, planned, None, options, self.rules)

    def unbegun(self, choice: int, reason: str, error: Exception | None) -> Result:
        """The result of an answer that ends before it begins."""
        return Result(
            text="", reasoning="", tokens=(), finish_reason="error" if error else reason,
            in_reasoning=self.prompt.thinking, prompt_tokens=len(self.prompt.tokens), generation_tokens=0,
            vision_seconds=0.0, prompt_tps=0.0, generation_tps=0.0, peak_memory=mx.get_peak_memory() / 1e9,
            seed=self.plans[choice].seed, mtp=DraftStatistics("the answer did not begin"), error=error,
            logprobs=() if self.options.get("logprobs") else None, limited_by=self.plans[choice].limited_by,
            adapter=self.adapter or None,
        )  # fmt: skip

    def let_go(self) -> None:
        """All of its answers have begun: the pixels are theirs."""
        self.prompt = Prompt(self.prompt.tokens, self.prompt.thinking)


def prepare(
    config: TextConfig, processor: Processor, prompt: Given, n: int, window: int | None, adapter: str = "",
    **options: Any,
) -> Prepared:  # fmt: skip
    """Make a prompt ready for n answers. Any thread may.

    Raises InputError for whatever can be wrong with it, except that memory has no room.

    window: most tokens of the prompt and an answer; None: the model's. adapter: the name of one that is loaded with the
    model, "" for none.
    """
    given, (encoded,), rules = make_ready(processor, [prompt], **options)
    prompts, contexts = [encoded] * n, [len(encoded.tokens)] * n
    check_prompts(given, config, [encoded], contexts[:1], window)
    plans = fill_in(given, config, processor.greedy, prompts, contexts, rules.closing, window=window)
    return Prepared(processor, encoded, adapter, given, rules, plans)
