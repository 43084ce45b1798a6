"""What generate and chat print: media, text as it comes, and that an answer was cut."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from mlx_qwen35.checkpoint.rope_fields import wider
from mlx_qwen35.console.notices import tell
from mlx_qwen35.console.progress import Step
from mlx_qwen35.console.safe import safe, safe_name
from mlx_qwen35.console.table import size
from mlx_qwen35.engine.result import Result
from mlx_qwen35.media.preprocess import Media, Page
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import either
from mlx_qwen35.prompt.piece import CALL, CALL_END, Piece


def media_lines(media: Sequence[Media], before: Sequence[Media] = ()) -> list[str]:
    """The size of each image and video, counted behind those before; pages of a PDF that follow each other and have
    one size share a line.
    """
    counts, lines = Counter(item.kind for item in before if not isinstance(item, Page)), []
    for name, group in groupby(media, _page_size):
        items = list(group)
        if isinstance(items[0], Page):
            lines.append(f"{_pages(items)} of {name}{' each' * (len(items) > 1)}")
            continue
        for item in items:
            counts[item.kind] += 1
            lines.append(f"{item.kind} {counts[item.kind]}: {item}")
    return lines


def _page_size(item: Media) -> str | None:
    return f"{item.document.name}: {item}" if isinstance(item, Page) else None


def _pages(pages: Sequence[Media]) -> str:
    """page 3, pages 1-3, pages 1, 4 and so on."""
    numbers = [page.number for page in pages if isinstance(page, Page)]
    if len(numbers) == 1:
        return f"page {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"pages {numbers[0]}-{numbers[-1]}"
    return f"pages {', '.join(map(str, numbers))}"


def print_media(media: Sequence[Media]) -> None:
    """The size of each image and video, on stderr, one line each."""
    for line in media_lines(media):
        tell(line)


def print_pieces(pieces: Iterable[Piece], waiting: Step) -> None:
    """Text as it comes; reasoning between the tags that the model itself uses, of which none is left open.

    A call stands on a line of its own, as name({"argument": value}). waiting: the step that ends with the first piece.
    """
    last, inside = None, False
    line = ""  # the last character that was printed
    try:
        for last in pieces:
            waiting.end()
            text = ""
            if last.reasoning != inside:
                inside = last.reasoning
                text = "<think>\n" if inside else "</think>\n\n"
            if last.kind == CALL and (line + text)[-1:] not in ("", "\n"):
                text += "\n"
            text += {CALL: f"{last.name}(", CALL_END: ")\n"}.get(last.kind, last.text)
            line = (line + text)[-1:]
            print(safe(text) if sys.stdout.isatty() else text, end="", flush=True)
    finally:
        if last and last.kind != CALL_END:  # before what goes to standard error
            print("\n</think>" if inside else "", flush=True)


def spread_json(model: Model) -> dict[str, Any]:
    """How a model is spread over several machines, as the JSON of a command has it; nothing for one machine."""
    spread = model.spread
    return {"split": spread.split, "rank_weight_bytes": list(spread.weight_bytes)} if spread else {}


def spread_text(model: Model) -> str:
    """The same in a line; "" for one machine."""
    if not model.spread:
        return ""
    split, hosts, sizes = model.spread
    parts = ", ".join(f"{size(nbytes)} on {safe_name(host)}" for host, nbytes in zip(hosts, sizes, strict=True))
    return f"Split: {split}, weights {parts}"


def tell_cut(result: Result, model: Model, shorter: str = "shorten the prompt") -> None:
    """Say on stderr that the answer was cut while the model was thinking or wrote a call, or by a full context or full
    memory, or that it looped. shorter: how to make room.
    """
    window = model.config.max_position_embeddings
    scaling, forms = wider(model.config.rope, window, window + 1), model.kv.smaller(model.config.head_dim)
    wide = [f"widen it with --rope-scaling {scaling}"] if scaling else []
    small = [f"store keys and values in fewer bits with --kv-bits {', '.join(forms)}"] if forms else []
    full, more = {
        "max_tokens": ("", ["allow more with --max-tokens"]),
        "context": ("the context is full: ", [shorter, *wide]),
        "memory": ("memory has room for no more: ", [shorter, *small]),
    }[result.limited_by]
    told, cut = "", f"the answer was cut after {result.generation_tokens} tokens"
    if result.cut_in_reasoning:
        more += ["end thinking with --thinking-budget", "let it answer at once with --no-enable-thinking"]
        told = f"{cut}, while the model was thinking: {full}{either(more)}"
    elif result.cut:
        what = f"a call of {result.cut.name or 'a tool'}"
        told = f"{what} is not whole ({result.finish_reason}): {full}{either(more)}"
    elif result.loop:
        ended = "it was ended there" if result.finish_reason == "loop" else "--loop-guard ends such an answer"
        told = f"the answer repeats itself: {result.loop}; {ended}"
    elif full and result.finish_reason == "length":
        told = f"{cut}: {full}{either(more)}"
    if told:
        tell(safe(told))
