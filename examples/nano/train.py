"""Trains the nano model on two CPU cores, from nothing or on from given weights.

    python examples/nano/train.py --out DIR --minutes 60 --seed 0
    python examples/nano/train.py --out DIR --start FOLDER --minutes 66 --rate 3e-3

Two worker processes of one thread each compute gradients on packed rows of short conversations and average them.
The matrices are updated with Muon (half of them by each worker), the rest with AdamW. The learning rate follows the
clock: warm-up, flat, then linear to zero at the end of the minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from checkpoint import Nano, initialise, load, save
from encoding import Encoder, positions
from forward import PRECISION, Batch, VisionGrid, hidden_states
from lessons import LESSONS, Settings, batches
from tasks import draw_lesson
from torch import Tensor

WORKERS = 2
MTP_WEIGHT = 0.2


# --- loss ------------------------------------------------------------------------------------------------------------


def losses(nano: Nano, grid: VisionGrid, batch: Batch, picture_ids: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross entropy of the next token and of the one after it, and the number of MTP hits."""
    main, draft = hidden_states(nano, grid, batch, picture_ids)
    table = nano.main.model.language_model.embed_tokens.weight
    first, second = batch.learn[:, 1:], batch.learn[:, 2:]
    loss = F.cross_entropy(F.linear(main[:, :-1][first], table), batch.ids[:, 1:][first], reduction="sum")
    logits, target = F.linear(draft[:, :-2][second], table), batch.ids[:, 2:][second]
    return loss, F.cross_entropy(logits, target, reduction="sum"), (logits.argmax(-1) == target).sum()


# --- optimisers ------------------------------------------------------------------------------------------------------


def orthogonalise(x: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrices; `x`: (n, rows, columns), rows <= columns."""
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(PRECISION.product)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x.float()


class Optimiser:
    """Muon for the matrices (Jordan 2024; each worker takes a share), AdamW for the rest, on flat buffers."""

    def __init__(self, nano: Nano, rank: int):
        named = {name: p for name, p in nano.named_parameters()}
        wide = {n for n, p in named.items() if p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 16}
        wide -= {n for n in named if "embed_tokens" in n or "pos_embed" in n}
        self.matrices = [p for n, p in named.items() if n in wide]
        self.others = [p for n, p in named.items() if n not in wide]
        self.parameters = self.matrices + self.others
        total = sum(p.numel() for p in self.parameters)
        self.values, self.gradient = torch.empty(total), torch.zeros(total)
        at = 0
        for p in self.parameters:
            view = self.values[at : at + p.numel()].view_as(p)
            view.copy_(p.data)
            p.data, p.grad = view, self.gradient[at : at + p.numel()].view_as(p)
            at += p.numel()
        self.split = sum(p.numel() for p in self.matrices)
        self.momentum = torch.zeros(self.split)
        self.update = torch.zeros(self.split)
        self.mean, self.square = (torch.zeros(total - self.split) for _ in range(2))
        self.steps = 0
        self.rank = rank
        self.shares = self._shares()

    def _shares(self) -> list[list[list[tuple[int, tuple[int, int]]]]]:
        """For each worker groups of (offset, shape) of equal shape, by about equal work."""
        work = [0.0] * WORKERS
        shares: list[dict[tuple[int, int], list[tuple[int, tuple[int, int]]]]] = [{} for _ in range(WORKERS)]
        entries, at = [], 0
        for p in self.matrices:
            shape = (p.shape[0], p[0].numel())
            entries.append((min(shape) ** 2 * (4 * max(shape) + 2 * min(shape)), at, shape))
            at += p.numel()
        for cost, offset, shape in sorted(entries, reverse=True):
            worker = work.index(min(work))
            work[worker] += cost
            shares[worker].setdefault((min(shape), max(shape)), []).append((offset, shape))
        return [list(share.values()) for share in shares]

    def step(self, rate: float, adam_rate: float) -> None:
        """One update from `self.gradient`, which all workers hold alike."""
        self.steps += 1
        norm = self.gradient.norm()
        if norm > 1:
            self.gradient.mul_(1 / norm)
        g = self.gradient[: self.split]
        self.momentum.lerp_(g, 0.05)
        nesterov = g.lerp(self.momentum, 0.95)
        self.update.zero_()
        for group in self.shares[self.rank]:
            views = [nesterov[at : at + r * c].view(r, c) for at, (r, c) in group]
            flat = orthogonalise(torch.stack([x if x.shape[0] <= x.shape[1] else x.T for x in views]))
            for x, (at, (r, c)) in zip(flat, group, strict=True):
                self.update[at : at + r * c].view(r, c).copy_(x if r <= c else x.T).mul_(0.2 * max(r, c) ** 0.5)
        if WORKERS > 1:
            dist.all_reduce(self.update)
        self.values[: self.split].sub_(self.update, alpha=rate)
        g = self.gradient[self.split :]
        self.mean.lerp_(g, 0.1)
        self.square.mul_(0.98).addcmul_(g, g, value=0.02)
        mean, square = self.mean / (1 - 0.9**self.steps), self.square / (1 - 0.98**self.steps)
        self.values[self.split :].sub_(mean / (square.sqrt() + 1e-8), alpha=adam_rate)
        self.gradient.zero_()

    def state(self) -> dict[str, Tensor | int]:
        names = ("values", "momentum", "mean", "square", "steps")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Tensor | int]) -> None:
        self.steps = int(state["steps"])
        for name in ("values", "momentum", "mean", "square"):
            getattr(self, name).copy_(state[name])


def rate_at(progress: float, step: int, settings: Settings) -> float:
    """The factor of the learning rate after `progress` (0 to 1) of the time."""
    fall = min(1.0, max(0.0, (1 - progress) / (1 - settings.hold)))
    return fall * min(1.0, (step + 1) / settings.warmup)


# --- the run ---------------------------------------------------------------------------------------------------------


def work(rank: int, settings: Settings, out: Path, start: Path | None, save_every: float) -> None:
    """One worker process."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    PRECISION.product = getattr(torch, settings.product)
    dist.init_process_group("gloo", init_method=f"file://{out.resolve()}/.workers", rank=rank, world_size=WORKERS)
    encoder = Encoder()
    if start:
        nano = load(start)
    else:
        nano = Nano()
        initialise(nano, settings.seed)
    grid = VisionGrid(nano)
    optimiser = Optimiser(nano, rank)
    spent = 0.0
    if (out / "resume.pt").exists():
        state = torch.load(out / "resume.pt", weights_only=True)
        optimiser.restore(state)
        spent = float(state["seconds"])
    progress = [spent / (60 * settings.minutes)]
    stream = batches(encoder, settings, rank, optimiser.steps, progress)
    begin, saved = time.monotonic() - spent, spent
    totals = torch.zeros(5)
    while True:
        clock = torch.tensor([time.monotonic() - begin])
        dist.broadcast(clock, 0)
        seconds = float(clock)
        progress[0] = seconds / (60 * settings.minutes)
        if rank == 0 and (seconds - saved > 60 * save_every or progress[0] >= 1):
            saved = seconds
            save(nano, out)
            torch.save({**optimiser.state(), "seconds": seconds}, out / "resume.part")
            os.replace(out / "resume.part", out / "resume.pt")
        if progress[0] >= 1:
            break
        batch = next(stream)
        loss, draft_loss, hits = losses(nano, grid, batch, (encoder.image_pad, encoder.video_pad))
        counts = torch.tensor([batch.learn[:, 1:].sum(), batch.learn[:, 2:].sum()])
        ((loss + MTP_WEIGHT * draft_loss) / counts[0]).backward()
        dist.all_reduce(optimiser.gradient)
        optimiser.gradient.div_(WORKERS)
        totals += torch.stack((loss.detach(), draft_loss.detach(), hits, *counts)).float()
        factor = rate_at(progress[0], optimiser.steps, settings)
        optimiser.step(factor * settings.rate, factor * settings.rate * settings.adam_ratio)
        if optimiser.steps % 50 == 0:
            dist.all_reduce(totals)
            if rank == 0:
                main, draft, hit = totals[0] / totals[3], totals[1] / totals[4], totals[2] / totals[4]
                print(
                    f"step {optimiser.steps:5d}  {seconds / 60:6.2f} min  rate x{factor:.2f}  loss {main:.4f}  "
                    f"mtp {draft:.4f}  mtp top-1 {hit:.3f}",
                    flush=True,
                )
            totals.zero_()
    if rank == 0:
        summary = {**asdict(settings), "steps": optimiser.steps, "start": start.name if start else None}
        (out / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    dist.destroy_process_group()


def check_forward() -> None:
    """Compares the training forward pass with transformers' own on one item of each kind."""
    PRECISION.product = torch.float32
    encoder, nano = Encoder(), Nano()
    initialise(nano, 1)
    grid, pads = VisionGrid(nano), (encoder.image_pad, encoder.video_pad)
    table = nano.main.model.language_model.embed_tokens.weight
    for name in LESSONS:
        encoded = encoder.lesson(*draw_lesson(name, Random(4), more=2))
        ids = encoded.ids
        kinds = [1 if i == pads[0] else 2 if i == pads[1] else 0 for i in ids]
        patches = torch.from_numpy(np.stack(encoded.patches)) if encoded.patches else torch.zeros(0, 16, 1536)
        where = torch.from_numpy(positions(ids, *pads))[:, None]
        extra = {}
        if len(patches):
            key = ("pixel_values", "image_grid_thw") if 1 in kinds else ("pixel_values_videos", "video_grid_thw")
            shape = torch.tensor([[1, 4, 4]] * len(patches)) if 1 in kinds else torch.tensor([[len(patches), 4, 4]])
            extra = {key[0]: patches.reshape(-1, 1536), key[1]: shape, "mm_token_type_ids": torch.tensor([kinds])}
            grids = {k: v for k, v in extra.items() if k.endswith("thw") or k.startswith("mm")}
            theirs = nano.main.model.get_rope_index(torch.tensor([ids]), **grids)[0]
            assert torch.equal(theirs, where), name
        padded = F.pad(torch.tensor([ids]), (0, -len(ids) % 32), value=encoder.pad)
        places = F.pad(where, (0, -len(ids) % 32))
        with torch.no_grad():
            ours, draft = hidden_states(nano, grid, Batch(padded, places, padded > 0, patches), pads)
            theirs = nano.main(torch.tensor([ids]), **extra).logits
            nano.main.model.rope_deltas = None
            embedded = F.pad(ours, (0, 0, 0, 0))
            error = (F.linear(ours[:, : len(ids)], table) - theirs).abs().max()
            rotary = nano.main.model.language_model.rotary_emb(embedded, places)
            text = nano.main.model.language_model.embed_tokens(padded)
            following = F.pad(text[:, 1:], (0, 0, 0, 1))
            reference = nano.mtp(ours, following, rotary)
            head = (reference - draft).abs().max() if not len(patches) else torch.zeros(())
        print(f"{name:14s} tokens {len(ids):3d}  logits {float(error):.1e}  draft {float(head):.1e}")
        assert error < 1e-4 and head < 1e-4 and float(reference.abs().max()) > 0.1, name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the checkpoint; resumes what lies there")
    parser.add_argument("--minutes", type=float, default=Settings.minutes)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--rate", type=float, default=Settings.rate)
    parser.add_argument("--hold", type=float, default=Settings.hold)
    parser.add_argument("--easy", type=float, default=Settings.easy, help="part of the time with easy lessons")
    parser.add_argument("--long-every", type=int, default=Settings.long_every, help="steps to one with long rows")
    parser.add_argument("--product", choices=("bfloat16", "float32"), default=Settings.product)
    parser.add_argument("--start", type=Path, help="folder of the weights to go on from (fine-tuning)")
    parser.add_argument("--boost", nargs="*", default=[], metavar="TASK=FACTOR", help="draw a task more often")
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes between checkpoints")
    parser.add_argument("--check", action="store_true", help="only compare the forward pass with transformers")
    args = parser.parse_args()
    if args.check:
        check_forward()
        return
    boost = tuple((name, float(factor)) for name, factor in (text.split("=") for text in args.boost))
    settings = Settings(minutes=args.minutes, seed=args.seed, rate=args.rate, hold=args.hold, easy=args.easy)
    settings = replace(settings, boost=boost, product=args.product, long_every=args.long_every)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / ".workers").unlink(missing_ok=True)
    mp.spawn(work, args=(settings, args.out, args.start, args.save_every), nprocs=WORKERS)
    (args.out / ".workers").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
