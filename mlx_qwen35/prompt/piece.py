"""A piece of an answer, as it comes."""

from dataclasses import dataclass

REASONING, CONTENT, CALL, ARGUMENTS, CALL_END = "reasoning", "content", "tool_call", "arguments", "tool_call_end"


@dataclass(frozen=True)
class Piece:
    """Some of an answer. str() is the text.

    kind: "reasoning" or "content", with text; "tool_call", where a call begins, with its id and name and no text;
    "arguments", with a piece of the JSON text of that call's arguments; "tool_call_end", without text.
    """

    text: str
    kind: str = CONTENT
    id: str = ""
    name: str = ""

    @property
    def reasoning(self) -> bool:
        """Whether it is text of the reasoning."""
        return self.kind == REASONING

    def __str__(self) -> str:
        return self.text
