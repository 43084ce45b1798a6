"""Placeholders of images and videos: one for each in a text, one for each of their tokens in a prompt."""

import re
from collections.abc import Collection, Sequence

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.prompt.control import marked
from mlx_qwen35.prompt.positions import Placeholder
from mlx_qwen35.prompt.prompt import Placed

PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
_IMAGE, _VIDEO = map(marked, PADS.values())  # one that bears no mark is a user's text
_START, _END = marked("<|vision_start|>"), marked("<|vision_end|>")
_PLACEHOLDERS = re.compile("|".join(map(re.escape, (_START + _VIDEO + _END, _VIDEO, _IMAGE))))


def in_order(text: str, media: Sequence[Media]) -> list[Media]:
    """Images and videos in the order of their placeholders in a text. InputError unless there are as many of each."""
    found = ["image" if match == _IMAGE else "video" for match in _PLACEHOLDERS.findall(text)]
    given = {kind: [m for m in media if m.kind == kind] for kind in PADS}
    for kind, of_kind in given.items():
        if found.count(kind) != len(of_kind):
            raise InputError(
                "placeholders_mismatch",
                f"there must be one {PADS[kind]} for each {kind}; got {found.count(kind)} and {len(of_kind)}",
            )
    queues = {kind: iter(of_kind) for kind, of_kind in given.items()}
    return [next(queues[kind]) for kind in found]


def expand_videos(text: str, media: Sequence[Media], outer_tags: bool) -> str:
    """Give each pair of frames of each video its own placeholder, with the time before it.

    media: images and videos in the order of their placeholders. <|vision_start|><|video_pad|><|vision_end|> becomes
    <0.3 seconds><|vision_start|><|video_pad|><|vision_end|><1.3 seconds>..., inside the outer tags with outer_tags.
    """
    queue = iter(media)

    def expanded(match: re.Match[str]) -> str:
        item, placeholder = next(queue), match.group()
        if placeholder == _IMAGE:
            return placeholder
        inner = "".join(f"<{seconds:.1f} seconds>{_START}{_VIDEO}{_END}" for seconds in item.times)
        return f"{_START}{inner}{_END}" if outer_tags and placeholder != _VIDEO else inner

    return _PLACEHOLDERS.sub(expanded, text)


def expand_tokens(
    tokens: Sequence[int], media: Sequence[Media], ids: Collection[int]
) -> tuple[list[int], list[Placed]]:
    """Repeat each placeholder as often as its image, or pair of frames, has tokens.

    media: images and videos in the order of their placeholders. ids: the token ids of placeholders.
    """
    out: list[int] = []
    placeholders: list[list[Placeholder]] = [[] for _ in media]
    queue = ((i, m) for i, m in enumerate(media) for _ in range(m.grid[0]))
    for token in tokens:
        count = 1
        if media and token in ids:
            i, item = next(queue)
            height, width = (side // item.config.spatial_merge_size for side in item.grid[1:])
            placeholders[i].append(Placeholder(len(out), height, width))
            count = height * width
        out += [token] * count
    if next(queue, None) is not None:
        raise InputError(
            "tokenizer_invalid",
            f"the tokenizer must know {' and '.join(PADS.values())} by the ids that config.json gives them "
            f"({sorted(ids)}); it does not. Take both files from the same checkpoint",
        )
    return out, [Placed(m, tuple(own)) for m, own in zip(media, placeholders, strict=True)]
