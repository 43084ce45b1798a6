"""What generate and chat print: media, text as it comes, and that an answer was cut."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from mlx_qwen35.commands.progress import Step
from mlx_qwen35.engine.sequence import Result
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.prompt.piece import Piece


def print_media(media: Sequence[Media], before: Sequence[Media] = ()) -> None:
    """The size of each image and video, on stderr, one line each, counted behind those before."""
    counts = Counter(item.kind for item in before)
    for item in media:
        counts[item.kind] += 1
        print(f"{item.kind} {counts[item.kind]}: {item}", file=sys.stderr, flush=True)


def print_pieces(pieces: Iterable[Piece], waiting: Step) -> None:
    """Text as it comes; reasoning between the tags that the model itself uses, of which none is left open.

    waiting: the step that ends with the first piece.
    """
    inside = begun = False
    try:
        for piece in pieces:
            waiting.end()
            begun = True
            if piece.reasoning != inside:
                print("<think>" if piece.reasoning else "</think>\n", flush=True)
                inside = piece.reasoning
            print(piece, end="", flush=True)
    finally:
        if begun:
            print("\n</think>" if inside else "", flush=True)  # before what goes to standard error


def tell_cut(result: Result) -> None:
    """Say on stderr that the end came while the model was thinking, so that there is no answer."""
    if result.cut_in_reasoning:
        print(
            f"the answer was cut after {result.generation_tokens} tokens, while the model was thinking: allow more "
            "with --max-tokens, end thinking with --thinking-budget, or let it answer at once with "
            "--no-enable-thinking",
            file=sys.stderr,
            flush=True,
        )
