"""What has come of one request."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from mlx_qwen35.engine.constraints.loop import Loop, first_loop
from mlx_qwen35.engine.drafts.speculate import DraftStatistics
from mlx_qwen35.engine.logprobs import TokenLogprob
from mlx_qwen35.prompt.tool_calls import Cut, ToolCall


@dataclass(frozen=True, eq=False)
class Result(str):
    """One finished answer. It is the string of its text, and has the rest in fields that do not change.

    Equality, hash and truth are those of the text, so two answers of one text are equal.

    finish_reason: "stop" (an end token or a stop string), "tool_calls" (the same, behind a whole call), "length"
    (see limited_by), "loop" (by the loop guard), "interrupted", or "error". limited_by: what set its most tokens:
    "max_tokens", "context" (then the window is full) or "memory". stop: the stop string that ended it, "" for none.
    text: the content; where tools were offered, without their calls. tool_calls: the whole ones. cut: a call that had
    begun. in_reasoning: whether it ended inside the reasoning, without an answer. tokens: the generated ids, the end
    token included. reasoning_tokens: how many of them are of the reasoning, </think> included.
    prompt_tokens: of the whole prompt. cached_tokens: those of them that a library held, so that they were not read.
    vision_seconds: of the vision encoder. prompt_tps, generation_tps: tokens per second, from the encoded prompt to the
    first token without those of the library, and after it. peak_memory: in GB (10^9 bytes), since the program started.
    mtp: the drafts. error: why it ended, with finish_reason "error". logprobs: one for each of tokens; None where not
    asked for. adapter: the name of the one that answered, None for none.
    """

    text: str
    reasoning: str
    tokens: tuple[int, ...]
    finish_reason: str
    in_reasoning: bool
    prompt_tokens: int
    generation_tokens: int
    vision_seconds: float
    prompt_tps: float
    generation_tps: float
    peak_memory: float
    seed: int
    mtp: DraftStatistics
    tool_calls: tuple[ToolCall, ...] = ()
    cut: Cut | None = None
    error: Exception | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    cached_tokens: int = 0
    limited_by: str = "max_tokens"
    reasoning_tokens: int = 0
    stop: str = ""
    adapter: str | None = None

    def __new__(cls, text: str, *fields: Any, **more: Any) -> Self:
        return super().__new__(cls, text)

    @property
    def message(self) -> dict[str, Any]:
        """The answer as the assistant's message of a history. A call that is not whole is left out."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in self.tool_calls
            ]
        return message

    @cached_property
    def loop(self) -> Loop | None:
        """The first tokens that repeat without end; None: there are none."""
        return first_loop(self.tokens)

    @property
    def cut_in_reasoning(self) -> bool:
        """Whether thinking took all tokens, so that there is no answer."""
        return self.in_reasoning and self.finish_reason == "length" and not self.tool_calls
