"""Reasoning as it comes -> as `Result` has it."""


class Trimmed:
    """Takes the blanks off the ends of a text that comes in pieces."""

    def __init__(self) -> None:
        self._begun, self._gap = False, ""  # blanks that end the text so far

    def add(self, text: str) -> str:
        """What is certain now: blanks wait until more text comes behind them."""
        text = self._gap + text
        text = text if self._begun else text.lstrip()
        kept = text.rstrip()
        self._begun, self._gap = self._begun or bool(kept), text[len(kept) :]
        return kept
