"""From a conversation to what the model reads: token ids, patches and three-axis positions.

This is the small, fixed-size twin of the real processor: every picture and every frame is 64 x 64, so every picture
and every pair of frames is 16 patches and 4 tokens. `evaluate.py` checks it against transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tasks import Clip, Item, Turn, completion, sample_indices, timestamps
from tokenizers import Tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "mlx_qwen35" / "nano"  # the bundled checkpoint
PATCH, MERGE, SIDE = 16, 2, 64
TOKENS = 4  # of one picture or one pair of frames
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
CLIP_GROUP = "<|clip group|>"  # stands for one pair of frames while a prompt holds unexpanded clips


@dataclass
class Encoded:
    """A tokenized text: `learn[i]` says whether token i is the model's own; one patch array for each 4 pad tokens."""

    ids: list[int]
    learn: list[bool]
    patches: list[np.ndarray]  # each (16, 1536) float32


def _raise(message: str) -> None:
    raise ValueError(message)


def load_template(path: Path) -> Any:
    """Compiles a chat template the way transformers does."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(path.read_text())


def patchify(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two frames (64, 64, 3) uint8 -> normalised patches (16, 1536) in merge-block order."""
    x = np.stack((first, second)).astype(np.float32).transpose(3, 0, 1, 2) * np.float32(2 / 255) - np.float32(1)
    n = SIDE // PATCH // MERGE
    x = x.reshape(3, 2, n, MERGE, PATCH, n, MERGE, PATCH)  # C, T, block row, row, y, block column, column, x
    return x.transpose(2, 5, 3, 6, 0, 1, 4, 7).reshape(n * n * MERGE * MERGE, -1)


def clip_patches(clip: Clip) -> tuple[list[np.ndarray], list[float]]:
    """The patches of each pair of sampled frames and its time in seconds."""
    indices = sample_indices(len(clip.frames), clip.fps)
    frames = [np.asarray(clip.frames[i].convert("RGB")) for i in indices]
    frames += frames[-1:] * (len(frames) % 2)
    pairs = zip(frames[::2], frames[1::2], strict=True)
    return [patchify(a, b) for a, b in pairs], timestamps(indices, clip.fps)


def positions(ids: list[int], image_pad: int, video_pad: int) -> np.ndarray:
    """Three-axis positions (3, T): text counts up, a picture spans 2 x 2 and moves the count by 2."""
    out = np.empty((3, len(ids)), dtype=np.int64)
    now = i = 0
    while i < len(ids):
        if ids[i] in (image_pad, video_pad):
            out[:, i : i + TOKENS] = now + np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
            i, now = i + TOKENS, now + 2
        else:
            out[:, i] = now
            i, now = i + 1, now + 1
    return out


class Encoder:
    """Turns items and lessons into tokens and patches."""

    def __init__(self, folder: Path = FOLDER, template: Path = FOLDER / "chat_template.jinja"):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.template = load_template(template)
        self.image_pad, self.video_pad, self.pad, self.end = (
            self.tokenizer.token_to_id(t) for t in ("<|image_pad|>", "<|video_pad|>", "<|endoftext|>", "<|im_end|>")
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, item: Item) -> str:
        """The prompt as the chat template writes it and what is given, pads not yet expanded."""
        return self._rendered(item) + "".join(item.given)

    def _rendered(self, item: Item) -> str:
        return self.template.render(
            messages=item.messages,
            tools=item.tools,
            add_generation_prompt=True,
            enable_thinking=item.enable_thinking,
        )

    def prompt(self, item: Item) -> Encoded:
        """The prompt of an item, generation prompt and what is given included; videos without outer vision tags."""
        text = self._rendered(item)
        patches: list[np.ndarray] = []
        for message in item.messages:
            for part in message["content"] if isinstance(message["content"], list) else ():
                if part["type"] == "image":
                    frame = np.asarray(part["image"].convert("RGB"))
                    patches.append(patchify(frame, frame))
                elif part["type"] == "video":
                    groups, times = clip_patches(Clip(part["video"], part["source_fps"]))
                    patches += groups
                    text = text.replace(VIDEO, "".join(f"<{t:.1f} seconds>{CLIP_GROUP}" for t in times), 1)
        text = text.replace(IMAGE, IMAGE.replace("<|image_pad|>", "<|image_pad|>" * TOKENS))
        text = text.replace(CLIP_GROUP, VIDEO.replace("<|video_pad|>", "<|video_pad|>" * TOKENS))
        ids = [token for part in (text, *item.given) for token in self._ids(part)]
        return Encoded(ids, [False] * len(ids), patches)

    def lesson(self, item: Item, more: list[Turn]) -> Encoded:
        """The prompt, the right answer and further turns, each with its own think block as it was generated."""
        out = self.prompt(item)
        self._answer(out, item.completion)
        opening = "<think>\n" if item.enable_thinking else "<think>\n\n</think>\n\n"
        for turn in more:
            self._add(out, f"<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n{opening}", False)
            self._answer(out, completion(turn, item.enable_thinking))
        return out

    def _answer(self, out: Encoded, text: str) -> None:
        self._add(out, text + "<|im_end|>", True)
        self._add(out, "\n", False)

    def _add(self, out: Encoded, text: str, learn: bool) -> None:
        ids = self._ids(text)
        out.ids += ids
        out.learn += [learn] * len(ids)
