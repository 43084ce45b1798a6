"""--dry-run: questions, tokens, hours and memory of an evaluation, from headers and questions alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_qwen35.budget.plan import MemoryPlan, loaded_bytes, names, plan_memory, this_machine
from mlx_qwen35.budget.roofline import decode_speed, prefill_speed, token_bytes
from mlx_qwen35.budget.rows import RowNeeds, RowsPlan
from mlx_qwen35.checkpoint.names import VISION
from mlx_qwen35.checkpoint.shapes import mtp_shapes, text_shapes
from mlx_qwen35.console.progress import duration
from mlx_qwen35.console.table import align, size
from mlx_qwen35.engine.prepared import Prepared
from mlx_qwen35.engine.room import encoding_bytes
from mlx_qwen35.evaluate.evaluation import Evaluation
from mlx_qwen35.evaluate.harness import HarnessTask
from mlx_qwen35.evaluate.items import Line
from mlx_qwen35.evaluate.kl import KL, PIECE, Sequences
from mlx_qwen35.evaluate.names import Wanted
from mlx_qwen35.evaluate.run import chosen, keyed
from mlx_qwen35.evaluate.subject import SAMPLE, Subject
from mlx_qwen35.evaluate.task import Asked, Item, Task
from mlx_qwen35.machine.chip import parse_chip, this_chip
from mlx_qwen35.machine.memory import usable_bytes

ELSEWHERE = parse_chip("Apple M1")  # the slowest: what hours are computed for where this machine is no Mac
LAYERWISE = 200e6  # bytes that kl takes beside a layer and the streams (measure/layerwise.py)
# Tokens of an answer with thinking, as others have counted or guessed them; of other tasks nothing is known.
TYPICAL = {"mmlu_pro": 3500, "gpqa_diamond": 12000, "ifeval": 2500, "mmmu_val": 3500, "mmmu": 3500}


@dataclass(frozen=True)
class Outlook:
    """What a task would take on a model.

    questions: those that are left to ask; of kl, sequences. answered: those that the folder has. prompt_tokens, tokens:
    of all questions that are left, and of their answers; guessed: whether `tokens` is a guess, by the answers that are
    there or such as others saw, and not the most that they may have. at_once: questions that memory has room for at a
    time. chip: whose published figures seconds are computed from, one question at a time and without drafts; None
    where its peak is not known. memory: bytes, at most. limit: bytes that a model may take.
    """

    task: str
    model: str
    questions: int
    answered: int
    prompt_tokens: int
    tokens: int
    guessed: bool
    at_once: int
    chip: str
    seconds: float | None
    memory: int
    limit: int


def look_ahead(found: Evaluation) -> "Looked":
    """What an evaluation on this machine would take."""
    outlooks = []
    asked = [own for own in found.wanted if own.task]
    for subject in filter(None, (found.subject, found.against)):
        own = found.wanted if subject is found.subject else asked
        begun = bool(found.options.out) and subject.folder.has_answers
        if begun:  # by a run that can go on
            subject.folder.begun(subject.identity(), found.versions_of(own))
        for wanted in own:
            lines = subject.folder.log(wanted.name).lines if begun else {}
            if wanted.task is not None:
                outlooks.append(_of_task(subject, wanted, lines))
            elif found.read is not None:
                outlooks.append(_of_kl(subject, found.read, lines))
    return Looked(outlooks)


def _of_task(subject: Subject, wanted: Wanted, lines: Mapping[str, Line]) -> Outlook:
    """lines: of the answers that are there."""
    assert wanted.task is not None
    task, config = wanted.task, subject.checkpoint.config
    every = chosen(keyed(task), wanted.items)
    answered = task.answered(lines) if isinstance(task, HarnessTask) else {*lines}
    items = [item for item in every if item.key not in answered]
    fitting = _fitting(subject, task, items) or _fitting(subject, task, every)  # there are some: `settings` saw them
    made = [one for _, one in fitting]
    prompts = [len(one.prompt.tokens) + _read(subject, own) for own, one in fitting]
    most = max(0 if own.choices else one.plans[0].limit for own, one in fitting)
    typical = TYPICAL.get(task.name) if made[0].prompt.thinking else None
    if lines:
        typical = math.ceil(sum(line["tokens"] for line in lines.values()) / len(lines))
    answer = min(typical or most, most)
    plan = _plan(subject, round(sum(prompts) / len(prompts)) + answer // 2)
    rows = _rows(subject, plan)
    encoding = max(encoding_bytes(own.prompt, config.vision, rows.machine) for own in made)
    needs = RowNeeds(max(prompts), most, encoding=encoding)
    at_once = max((n for n in range(1, subject.rows + 1) if rows.fits([needs] * n)), default=1)
    tokens, read = len(items) * answer, round(len(items) * sum(prompts) / len(prompts))
    chip = rows.machine.chip or ELSEWHERE
    seconds = tokens / decode_speed(token_bytes(subject.checkpoint, plan), chip)
    seconds += read / (prefill_speed(config.text, max(prompts), chip) or math.inf)
    return Outlook(
        task.name, subject.name, len(items), len(every) - len(items), read, tokens, typical is not None, at_once,
        chip.name, seconds, rows.nbytes([needs] * at_once), rows.machine.limit,
    )  # fmt: skip


def _fitting(subject: Subject, task: Task, items: Sequence[Item]) -> list[tuple[Asked, Prepared]]:
    """Some of the questions, as they are asked, without those that the context has no room for."""
    asked = {item.key: task.ask(item) for item in chosen(items, SAMPLE)}
    return [(own, made) for key, own in asked.items() if (made := subject.fitting(key, own))]


def _read(subject: Subject, asked: Asked) -> int:
    """Tokens of choices, which are read behind the prompt."""
    return sum(len(subject.processor.tokenizer.encode(text, add_special_tokens=False)) for text in asked.choices)


def _of_kl(subject: Subject, read: Sequences, lines: Mapping[str, Line]) -> Outlook:
    """Both models go through their layers, one in memory at a time, with a piece of the text."""
    left = [tokens for key, tokens in zip(read.keys, read.tokens, strict=True) if key not in lines]
    count, done = sum(map(len, left)), len(read.tokens) - len(left)
    config, bytes_each = subject.checkpoint.config.text, subject.dtype.size
    layers = [0] * config.num_hidden_layers
    for name, shape in text_shapes(config).items():
        if ".layers." in name:
            layers[int(name.split(".layers.")[1].split(".")[0])] += math.prod(shape)
    memory = bytes_each * (max(layers) + 2 * min(read.count, PIECE) * config.hidden_size) + int(LAYERWISE)
    plan = _plan(subject, max(map(len, read.tokens)))
    chip = plan.machine.chip or ELSEWHERE
    speed = prefill_speed(config, plan.context, chip)
    seconds = 2 * count / speed if speed else None
    return Outlook(
        KL, subject.name, len(left), done, count, 0, False, 1, chip.name, seconds, memory, plan.machine.limit
    )


def _plan(subject: Subject, context: int) -> MemoryPlan:
    limit = usable_bytes(subject.limit)
    machine = this_machine(subject.checkpoint.config.text, subject.dtype, limit, subject.kv)
    return plan_memory(subject.checkpoint, machine, context, adapters=subject.adapters.listed)


def _rows(subject: Subject, plan: MemoryPlan) -> RowsPlan:
    """As of the loaded model (engine/room.py), from headers."""
    checkpoint, dtype = subject.checkpoint, plan.machine.dtype
    head = names(checkpoint, mtp_shapes(checkpoint.config.text))
    encoder = [name for name in checkpoint.entries if name.startswith(VISION)]
    packed = any(checkpoint.quantization(name) for name in names(checkpoint, text_shapes(checkpoint.config.text)))
    return RowsPlan(
        checkpoint.config.text, plan.machine, weights=plan.weights + plan.adapters,
        head=loaded_bytes(checkpoint, head, dtype), encoder=loaded_bytes(checkpoint, encoder, dtype),
        unpacks=plan.machine.on_cpu and packed,
    )  # fmt: skip


@dataclass(frozen=True)
class Looked:
    """All tasks on all models."""

    outlooks: Sequence[Outlook]

    def as_json(self) -> Mapping[str, Any]:
        """For --json; `seconds` is null where it is not known."""
        return {"tasks": [asdict(own) for own in self.outlooks]}

    def described(self) -> str:
        """The table, and what its figures rest on."""
        begun = any(own.answered for own in self.outlooks)
        head = ("task", "model", *(["answered", "left"] if begun else ["questions"]))
        rows: list[Sequence[str]] = [(*head, "read", "written", "at once", "time", "memory")]
        for own in self.outlooks:
            counts = [f"{own.answered:,}"] * begun + [f"{own.questions:,}"]
            written = f"{'about' if own.guessed else 'at most'} {own.tokens:,}" if own.tokens else "0"
            time = "unknown" if own.seconds is None else duration(own.seconds)
            rows.append((
                own.task, own.model, *counts, f"{own.prompt_tokens:,}", written, f"{own.at_once:,}", time,
                size(own.memory),
            ))  # fmt: skip
        which = " that are left" * begun
        lines = [*align(rows, (0, 1)), "", f"read, written: tokens of all questions{which} and of their answers"]
        if any(own.guessed and not own.answered for own in self.outlooks):
            lines.append("about: by the tokens that such answers were seen to have, which nobody measured here")
        if any(own.guessed and own.answered and own.tokens for own in self.outlooks):
            lines.append("about, where some are answered: by the mean of their tokens")
        own = self.outlooks[0]
        here = "" if this_chip() else " (this machine's are not known)"
        lines.append(
            f"time: computed from the figures of an {own.chip}{here}, one question at a time, without drafts; nothing "
            "was measured"
        )
        lines += [
            f"{own.task}: {size(own.memory)} do not fit, a model may take {size(own.limit)}; lower --max-tokens"
            for own in self.outlooks
            if own.memory > own.limit
        ]
        return "\n".join(lines)
