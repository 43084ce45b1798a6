"""The options of a request -> what restricts each of its answers."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from mlx_qwen35.engine.constraints.door import Door, Thinking, ToolTags
from mlx_qwen35.engine.constraints.grammar import compile_grammar
from mlx_qwen35.engine.constraints.thinking import ROOM, blank_tokens, closing_tokens, line_tokens
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import listed, spelled
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.prompt.prompt import Prompt
from mlx_qwen35.prompt.stream import TextStream
from mlx_qwen35.prompt.tool_calls import Tools

if TYPE_CHECKING:
    from mlx_qwen35.engine.options import Options


class Rules:
    """What restricts the answers of one request, made once for all of its prompts.

    Raises InputError for a grammar that cannot be used, and options that name tokens that there are not.
    """

    def __init__(self, processor: Processor, options: "Options"):
        self._processor = processor
        idle = [name for name in ("tool_choice", "parallel_tool_calls") if options.get(name, True) is not True]
        if idle and not options.get("tools"):
            raise InputError("option_no_effect", f"{listed(idle)} must be given with {spelled('tools')}, for its calls")
        named = [("logit_bias", token) for token in options.get("logit_bias", ())]
        named += [("xtc_special_tokens", token) for token in options.get("xtc_special_tokens", ())]
        for name, token in named:
            if token >= processor.vocabulary:
                most = processor.vocabulary - 1
                raise InputError("option_invalid", f"{name} must name tokens from 0 to {most}, got {token}")
        self._caller = options.get("constraint")
        self._guard = bool(options.get("loop_guard"))
        self._one_call = options.get("parallel_tool_calls") is False
        offered = options.get("tools") if options.get("tool_choice") != "none" else None
        self._tools = Tools(offered) if offered else None
        self._grammar = compile_grammar(processor, options, options.get("tools"))

    @cached_property
    def closing(self) -> tuple[int, ...]:
        """The tokens that close thinking; empty where the tokenizer knows none."""
        return () if self._processor.think_end is None else closing_tokens(self._processor)

    def door(self, prompt: Prompt, budget: int | None, limit: int) -> Door | None:
        """What restricts the answer to one prompt; None: nothing.

        budget: most tokens of thinking. limit: most tokens of the answer.
        """
        processor = self._processor
        if self._caller:
            return Door(processor.vocabulary, everywhere=self._caller)
        thinking = None
        if budget is not None or self._guard or (prompt.thinking and self._grammar):
            thinking = self._thinking(budget, limit)
        if not (thinking or self._grammar):
            return None
        answer = self._grammar() if self._grammar else None
        return Door(
            processor.vocabulary, stops=processor.stop_ids, thinking=thinking, inside=prompt.thinking, answer=answer
        )

    def stream(self, prompt: Prompt, cached: int, seed: int, stop: Sequence[str]) -> TextStream:
        """What turns the tokens of an answer into text. Its calls have ids that seed and prompt decide.

        cached: tokens before the prompt.
        """

        def call_id(number: int) -> str:
            place = repr((seed, cached, prompt.tokens, number))
            return "call_" + hashlib.blake2b(place.encode(), digest_size=12).hexdigest()

        return self._processor.text_stream(prompt.thinking, stop, self._tools, call_id, self._one_call)

    def _thinking(self, budget: int | None, limit: int) -> Thinking | None:
        processor = self._processor
        if processor.think_start is None or processor.think_end is None:
            return None
        nothing = (*line_tokens(processor), processor.think_end, *blank_tokens(processor))
        return Thinking(
            processor.think_start, processor.think_end, budget, limit - ROOM - len(self.closing), self.closing, nothing,
            blank_tokens(processor), self._guard, self._tool_tags() if self._tools else None,
        )  # fmt: skip

    def _tool_tags(self) -> ToolTags | None:
        known = self._processor.tokenizer.get_vocab()
        begin, end = known.get("<tool_call>"), known.get("</tool_call>")
        return None if begin is None or end is None else ToolTags(begin, end, self._processor.decode)
