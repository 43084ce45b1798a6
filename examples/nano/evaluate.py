"""Measures a nano checkpoint on held-out items with transformers, and prints a markdown table.

    python examples/nano/evaluate.py --folder mlx_qwen35/nano --json mlx_qwen35/nano/evaluation.json
    python examples/nano/evaluate.py --tasks typed_call needle --items 20 --generate 20

`text` counts completions that are right to the last token (thinking included), `answer` the right final answers of
real greedy generations, see scoring.py. Weights are used as stored, arithmetic is float32. `MTP` is how often the
draft head names the token after the next one, over the tokens of the right completions. `mlx_qwen35` counts the whole
completions that our own greedy generation gets right on the same items.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from checkpoint import DraftHead
from encoding import FOLDER, Encoded, Encoder
from ours import completions, marks
from safetensors.torch import load_file
from scoring import right, well_formed
from tasks import ALL_TASKS, TASKS, Item, draw, items_of
from torch import Tensor
from transformers import AutoTokenizer, Qwen3_5ForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import mlx_qwen35

BATCH = 16


@dataclass
class Score:
    """The results of one task in one mode."""

    task: str
    thinking: bool
    items: int
    text: float  # share of items whose whole completion is right
    right: str  # which ones: "1" or "0" for each item in order
    mtp: float  # share of tokens the draft head gets right
    tokens: float  # mean length of a completion
    generated: int = 0
    answer: float = 0.0  # share of generations with the right final answer
    well_formed: float | None = None  # of tool calls, and of JSON to a schema
    ours: str = ""  # like right, by greedy generation with mlx_qwen35


class Judge:
    """A checkpoint under transformers: the model, the draft head beside it and the tokenizer."""

    def __init__(self, folder: Path):
        self.encoder = Encoder(folder, folder / "chat_template.jinja")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.draft = DraftHead(self.model.model.language_model.config).float().eval()
        stored = load_file(folder / "model.safetensors")
        own = {name.removeprefix("mtp."): p.float() for name, p in stored.items() if name.startswith("mtp.")}
        self.draft.load_state_dict(own)
        self.images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.stops = [self.encoder.end, self.encoder.pad]
        self.ours = mlx_qwen35.load(folder)
        self._seen: dict[str, Tensor] = {}
        text = self.model.model.language_model
        text.register_forward_pre_hook(lambda module, args, kwargs: self._seen.update(kwargs), with_kwargs=True)

    def inputs(self, encoded: list[Encoded]) -> dict[str, Tensor]:
        """Model inputs of right-padded sequences; pictures and clips become the pixel tensors of transformers."""
        length = max(len(e.ids) for e in encoded)
        ids = torch.tensor([e.ids + [self.encoder.pad] * (length - len(e.ids)) for e in encoded])
        mask = torch.tensor([[1] * len(e.ids) + [0] * (length - len(e.ids)) for e in encoded])
        kinds = (ids == self.encoder.image_pad).int() + 2 * (ids == self.encoder.video_pad).int()
        out = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
        shown = [e for e in encoded if e.patches]
        if shown:
            pixels = torch.from_numpy(np.concatenate([p for e in shown for p in e.patches]))
            if self.encoder.video_pad in shown[0].ids:
                grid = torch.tensor([[len(e.patches), 4, 4] for e in shown])
                out |= {"pixel_values_videos": pixels, "video_grid_thw": grid}
            else:
                grid = torch.tensor([[1, 4, 4]] * (len(pixels) // 16))
                out |= {"pixel_values": pixels, "image_grid_thw": grid}
        return out

    def check(self, item: Item) -> None:
        """Asserts that prompt and pixels equal those of transformers' tokenizer and image processor."""
        encoded = self.encoder.prompt(item)
        text = self.tokenizer.apply_chat_template(
            item.messages,
            tools=item.tools,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=item.enable_thinking,
        )
        assert text + "".join(item.given) == self.encoder.text(item), item
        parts = [part for m in item.messages if isinstance(m["content"], list) for part in m["content"]]
        pictures = [part["image"] for part in parts if part["type"] == "image"]
        if self.encoder.video_pad not in encoded.ids:
            text = text.replace("<|image_pad|>", "<|image_pad|>" * 4)
            rows = self.tokenizer([text, *item.given], add_special_tokens=False).input_ids
            assert [token for ids in rows for token in ids] == encoded.ids, item
        if pictures:
            theirs = self.images(pictures, return_tensors="pt")
            assert theirs["image_grid_thw"].tolist() == [[1, 4, 4]] * len(pictures)
            assert (theirs["pixel_values"] - torch.from_numpy(np.concatenate(encoded.patches))).abs().max() < 1e-6

    @torch.no_grad()
    def logits(self, encoded: list[Encoded]) -> tuple[Tensor, Tensor]:
        """Logits of the main model and of the draft head, (B, T, V) each."""
        inputs = self.inputs(encoded)
        self.model.model.rope_deltas = None
        hidden = self.model.model(**inputs).last_hidden_state
        embedded, where = self._seen["inputs_embeds"], self._seen["position_ids"]
        text = self.model.model.language_model
        if where is None:
            where = torch.arange(hidden.shape[1]).expand(3, len(hidden), -1)
        rotary = text.rotary_emb(hidden, where[-3:])
        draft = self.draft(hidden, F.pad(embedded[:, 1:], (0, 0, 0, 1)), rotary)
        table = text.embed_tokens.weight
        return F.linear(hidden, table), F.linear(draft, table)

    @torch.no_grad()
    def generate(self, item: Item) -> str:
        """The greedy completion, without its end token."""
        inputs = self.inputs([self.encoder.prompt(item)])
        self.model.model.rope_deltas = None
        out = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=ALL_TASKS[item.task].limit,
            eos_token_id=self.stops,
            pad_token_id=self.encoder.pad,
        )
        ids = [i for i in out[0, inputs["input_ids"].shape[1] :].tolist() if i not in self.stops]
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def margin(self, item: Item) -> float:
        """The smallest lead of the right token over the best other one within the completion; negative if one fails."""
        encoded = self.encoder.lesson(item, [])
        logits = self.logits([encoded])[0][0]
        leads = []
        for i, learn in enumerate(encoded.learn):
            if learn:
                others = logits[i - 1].clone()
                others[encoded.ids[i]] = float("-inf")
                leads.append(float(logits[i - 1, encoded.ids[i]] - others.max()))
        return min(leads)


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


def score(judge: Judge, task: str, thinking: bool, items: int, generated: int, seed: int) -> Score:
    """Draws held-out items and measures them."""
    drawn = items_of(task, thinking, items, seed)
    exact, hits, drafts = "", 0, 0
    for some in chunks(drawn, BATCH):
        encoded = [judge.encoder.lesson(item, []) for item in some]
        main, draft = (x.argmax(-1) for x in judge.logits(encoded))
        for row, e in enumerate(encoded):
            own = [i for i, learn in enumerate(e.learn) if learn]
            exact += "1" if all(main[row, i - 1] == e.ids[i] for i in own) else "0"
            hits += sum(int(draft[row, i - 2] == e.ids[i]) for i in own)
            drafts += len(own)
    out = Score(task, thinking, items, exact.count("1") / items, exact, hits / drafts, drafts / items)
    out.ours = marks(completions(*judge.ours, drawn), drawn)
    if generated:
        texts = [judge.generate(item) for item in drawn[:generated]]
        pairs = list(zip(texts, drawn, strict=False))
        out.generated = generated
        out.answer = sum(right(text, item) for text, item in pairs) / generated
        formed = [found for text, item in pairs if (found := well_formed(text, item)) is not None]
        if formed:
            out.well_formed = sum(formed) / len(formed)
    return out


def table(scores: list[Score]) -> str:
    """The scores as a markdown table."""
    lines = [
        "| task | thinking | items | text | mlx_qwen35 | answer (generated) | MTP | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in scores:
        answer = f"{100 * s.answer:.1f} % of {s.generated}" if s.generated else ""
        if s.well_formed is not None:
            answer += f" (well formed {100 * s.well_formed:.0f} %)"
        ours = f"{100 * s.ours.count('1') / s.items:.1f} %"
        cells = [s.task, "on" if s.thinking else "off", str(s.items), f"{100 * s.text:.1f} %", ours, answer]
        lines.append("| " + " | ".join([*cells, f"{100 * s.mtp:.1f} %", f"{s.tokens:.1f}"]) + " |")
    return "\n".join(lines)


def fixed_prompts(judge: Judge, per_task: int, candidates: int = 24) -> list[dict[str, Any]]:
    """For every task the seeds of the clearest right answers, checked by a real generation."""
    out = []
    for task in TASKS:
        found = []
        for seed in range(candidates):
            thinking = seed % 2 == 0
            item = draw(task, Random(seed), thinking=thinking)
            found.append((judge.margin(item), seed, thinking))
        chosen: list[dict[str, Any]] = []
        for margin, seed, thinking in sorted(found, reverse=True):
            item = draw(task, Random(seed), thinking=thinking)
            same = sum(entry["thinking"] == thinking for entry in chosen)
            wanted = margin > 0.5 and len(chosen) < per_task and same < (per_task + 1) // 2
            if wanted and judge.generate(item) == item.completion:
                entry = {"task": task, "seed": seed, "thinking": thinking, "margin": round(margin, 2)}
                texts = {"prompt": judge.encoder.text(item), "completion": item.completion, "answer": item.answer}
                chosen.append(entry | texts)
        out += chosen
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--items", type=int, default=200, help="held-out items of each task and mode")
    parser.add_argument("--generate", type=int, default=20, help="of these, items answered by real generation")
    parser.add_argument("--tasks", nargs="*", choices=list(ALL_TASKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the scores here")
    parser.add_argument("--prompts", type=Path, help="only choose fixed prompts with a clear margin, into this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    judge, tasks = Judge(args.folder), args.tasks or list(ALL_TASKS)
    if args.prompts:
        prompts = fixed_prompts(judge, per_task=4)
        args.prompts.write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n")
        print(f"{len(prompts)} prompts")
        return
    for task in tasks:
        for i in range(5):
            judge.check(draw(task, Random(i)))
    scores = []
    for task in tasks:
        for thinking in ALL_TASKS[task].modes:
            scores.append(score(judge, task, thinking, args.items, args.generate, args.seed))
            print(table(scores[-1:]).splitlines()[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "scores": [asdict(s) for s in scores]}, indent=1) + "\n")
    print("\n" + table(scores))


if __name__ == "__main__":
    main()
