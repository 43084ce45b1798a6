"""What of images and clips is compared with transformers: checkpoints with a tower, prompts, pixels, films.

All pixels are raw output of PCG64, as all numbers of cases.py are.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from parity import cases
from parity.cases import Case

from mlx_qwen35.checkpoint.config import FULL, VisionConfig, parse_config
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.prompt.positions import Placeholder
from mlx_qwen35.prompt.prompt import Placed, Prompt

# Heads of 72 dims as in the 9B and 27B, a table of 7 x 7, and a text model whose sizes and rotary sections differ too.
_ODD_TOWER = {
    "hidden_size": 216, "intermediate_size": 200, "num_heads": 3, "depth": 3, "num_position_embeddings": 49,
}  # fmt: skip
# One block and the merger of the 4B's tower, and a text model of its width that is otherwise as small as it gets.
_NARROW = {
    "num_hidden_layers": 1, "layer_types": [FULL], "intermediate_size": 32, "vocab_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip

TINY = Case("vision-tiny", 23, vision={}, prompt=0)
ODD = Case("vision-odd", 21, {**cases.by_name("odd").text, "vocab_size": 1024}, vision=_ODD_TOWER, prompt=0)
WIDE = Case("vision-4b", 22, _NARROW, base="4b", vision={"depth": 1}, prompt=0)
YARN = Case("vision-yarn", 24, cases.SCALED, vision={}, prompt=0)
CASES = (TINY, ODD, WIDE, YARN)

# Grids (time, height, width) in patches whose whole way through the tower is compared; the first also stage by stage.
GRIDS = {
    TINY.name: ((1, 10, 14), (1, 2, 2), (1, 2, 18), (1, 12, 4), (3, 4, 6)),
    ODD.name: ((1, 6, 10), (1, 16, 8), (2, 8, 4)),
    WIDE.name: ((1, 4, 6),),
    YARN.name: (),
}
BYTES = np.tile(((np.arange(256) / 255).astype(np.float32) - np.float32(0.5)) / np.float32(0.5), (3, 1))
GREEDY = 16  # tokens drawn after each prompt


def vision_config(case: Case) -> VisionConfig:
    return parse_config(case.config).vision


def pixels(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 noise."""
    return (cases.uniform(seed, name, shape) * 256).astype(np.uint8)


def media(case: Case, name: str, grid: tuple[int, int, int], clip: bool | None = None) -> Media:
    """An image, or a clip (by default where there is more than one pair of frames), of noise."""
    time, height, width = grid
    clip = time > 1 if clip is None else clip
    frames = pixels(case.seed, name, (2 * time if clip else 1, 16 * height, 16 * width, 3))
    times = tuple(0.25 + i for i in range(time)) if clip else ()
    return Media(frames, times, frames.shape[1:3], vision_config(case), BYTES)


def plain_patches(item: Media) -> np.ndarray:
    """(patches, 1536) float32, one by one: squares of 2 x 2 patches in row-major order, each (channel, time, y, x)."""
    frames = item.pixels if item.is_video else np.concatenate([item.pixels] * 2)
    _, height, width, _ = frames.shape
    rows = []
    for pair, top, left in product(range(0, len(frames), 2), range(0, height, 32), range(0, width, 32)):
        for y, x in product((top, top + 16), (left, left + 16)):
            rows.append(frames[pair : pair + 2, y : y + 16, x : x + 16].transpose(3, 0, 1, 2).reshape(-1))
    return BYTES[0][np.stack(rows)]


def tower_input(case: Case, grid: tuple[int, int, int]) -> np.ndarray:
    """(patches, D) float32 activations for single stages."""
    return cases.normal(case.seed, f"tower input {grid}", (int(np.prod(grid)), vision_config(case).hidden_size))


# --- prompts ---------------------------------------------------------------------------------------------------------


class Image(NamedTuple):
    height: int  # in tokens, each 32 x 32 pixels
    width: int


class Clip(NamedTuple):
    pairs: int  # of frames
    height: int
    width: int


# Numbers are tokens of text. Each prompt has fewer than 96 tokens, of which a golden file keeps every column.
PROMPTS: dict[str, tuple[int | Image | Clip, ...]] = {
    "text": (40,),
    "image": (5, Image(3, 5), 9),
    "three": (0, Image(2, 2), 3, Image(1, 7), 6, Image(6, 3), 11),
    "clip": (7, Clip(3, 2, 4), 8),
    "mix": (6, Image(4, 2), 5, Clip(2, 3, 3), 4, Image(2, 6), 3),
    "turns": (9, Image(3, 3), 12, Image(2, 4), 7, Clip(2, 2, 3), 5),
    "later": (4, Clip(1, 2, 2), 1, Image(5, 1), 6, Clip(4, 1, 2), 0),  # a clip of two frames, and one at the end
}
COMPARED = {  # through the whole model
    TINY.name: tuple(PROMPTS), ODD.name: ("image", "mix"), WIDE.name: (), YARN.name: ("image",),
}  # fmt: skip
TURN = 9 + 11 + 6  # where the second turn of "turns" begins: after its first image and half of the text behind it


@dataclass(frozen=True, eq=False)
class Scene:
    """One of PROMPTS with the token ids and the pixels of a case."""

    case: Case
    name: str

    @property
    def ids(self) -> dict[str, int]:
        return parse_config(self.case.config).token_ids

    @cached_property
    def _laid_out(self) -> tuple[list[int], list[Placed]]:
        text = iter((cases.tokens(self.case, 400, self.name) % 900).tolist())  # below all special tokens
        tokens: list[int] = []
        placed = []
        for number, part in enumerate(PROMPTS[self.name]):
            if isinstance(part, int):
                tokens += [next(text) for _ in range(part)]
                continue
            clip = isinstance(part, Clip)
            placeholders = []
            for _ in range(part.pairs if clip else 1):
                tokens += [next(text) for _ in range(3 if clip else 0)] + [self.ids["vision_start"]]
                placeholders.append(Placeholder(len(tokens), part.height, part.width))
                tokens += [self.ids["video" if clip else "image"]] * (part.height * part.width)
                tokens += [self.ids["vision_end"]]
            grid = (len(placeholders), 2 * part.height, 2 * part.width)
            placed.append(Placed(media(self.case, f"{self.name} {number}", grid, clip), tuple(placeholders)))
        return tokens, placed

    @property
    def prompt(self) -> Prompt:
        tokens, placed = self._laid_out
        return Prompt(tuple(tokens), False, tuple(placed))

    @property
    def length(self) -> int:
        return len(self.prompt.tokens)

    @property
    def types(self) -> np.ndarray:
        """(T,) 0 for text, 1 for tokens of images, 2 for those of clips: transformers' mm_token_type_ids."""
        tokens = np.array(self.prompt.tokens)
        return (tokens == self.ids["image"]) + 2 * (tokens == self.ids["video"])

    def media(self, clips: bool) -> list[Media]:
        return [placed.media for placed in self.prompt.media if placed.media.is_video == clips]


def scenes(case: Case) -> list[Scene]:
    """Those that are compared through the whole model of a case."""
    return [Scene(case, name) for name in COMPARED[case.name]]


# --- films -----------------------------------------------------------------------------------------------------------

IMAGE_SETTINGS = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
VIDEO_SETTINGS = {**IMAGE_SETTINGS, "size": {"shortest_edge": 4096, "longest_edge": 25165824}}


class Film(NamedTuple):
    """Frames of 32 x 32 pixels, and how they are sampled: by the default of 2 a second, or by one of two options."""

    frames: int
    rate: float
    fps: float | None = None
    num_frames: int | None = None

    @property
    def key(self) -> str:
        how = f" fps {self.fps}" if self.fps else f" num_frames {self.num_frames}" if self.num_frames else ""
        return f"{self.frames} at {self.rate}{how}"

    @property
    def options(self) -> dict[str, Any]:
        """As transformers takes them: its default fps must be taken back where the number of frames is given."""
        if self.num_frames:
            return {"num_frames": self.num_frames, "fps": None}
        return {"fps": self.fps} if self.fps else {}

    @property
    def array(self) -> np.ndarray:
        return np.zeros((self.frames, 32, 32, 3), np.uint8)


FILMS = [Film(*film) for film in product((2, 3, 4, 5, 30, 300, 1000), (1, 2, 5, 23.976, 24, 29.97, 30, 60))]
FILMS += [Film(n, rate, fps=fps) for n, rate, fps in product((5, 30, 300), (24, 29.97), (0.5, 1, 4.5, 60))]
FILMS += [Film(n, rate, num_frames=k) for n, rate, k in product((5, 30, 300), (24, 29.97), (2, 3, 7, 64))]
PLACES = "Look: <|vision_start|><|video_pad|><|vision_end|> What is it?"
BOTH = "<|vision_start|><|image_pad|><|vision_end|> and <|vision_start|><|video_pad|><|vision_end|>, compare."
IMAGE = (40, 70)  # the size of the picture of BOTH, whose clip is the film below
BOTH_FILM = Film(30, 29.97)

# (frames, height, width): below a side of 32, below and above the volume limits, odd numbers of frames whose half
# rounds down or up in the budget, and the extreme ratios.
SIZES = [
    (2, 32, 32), (3, 32, 32), (2, 40, 50), (4, 20, 50), (4, 50, 20), (3, 8, 8), (2, 1, 1), (4, 1, 200), (5, 31, 6200),
    (2, 32, 6400), (7, 33, 6000), (20, 720, 1280), (120, 1080, 1920), (768, 1080, 1920), (768, 240, 320),
    (5, 2048, 2560), (5, 2080, 2560), (7, 1792, 1792), (7, 1760, 1760), (9, 1500, 1700), (11, 1481, 1333),
    (3, 2896, 2900), (13, 336, 336), (4, 48, 80), (6, 112, 176), (700, 17, 3000), (768, 2160, 3840), (2, 8000, 8000),
]  # fmt: skip
# (frames, height, width) of clips whose pixels are compared: the first keep their size, the second are resized.
SHOWN = [(3, 64, 32), (5, 45, 70)]


def shown_frames(shape: tuple[int, int, int]) -> np.ndarray:
    """Noise between 64 and 191. Where bicubic overshoots 0 or 255, Pillow and torch, which resize height and width in
    another order, clip other values: with noise over the whole range 1 % of them differ by more than one step."""
    return pixels(0, str(shape), (*shape, 3)) // 2 + 64


def shortened(text: str) -> str:
    """<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|> as {image*3}."""
    text = re.sub(r"(<\|(\w+)_pad\|>)\1*", lambda found: f"{found[2]}*{len(found[0]) // len(found[1])}", text)
    return text.replace("<|vision_start|>", "{").replace("<|vision_end|>", "}")
