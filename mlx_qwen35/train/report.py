"""OUT/report.md and OUT/losses.png: what was trained on what, how it went, and what has come of it.

A training loop calls `before` when it begins and `after` when it ends. Answers of the base alone are the same whenever
they are given, so a run that is resumed asks for them again.
"""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_qwen35.backend import backend, system_memory
from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.checkpoint.folder import written
from mlx_qwen35.checkpoint.names import MTP
from mlx_qwen35.console.progress import duration
from mlx_qwen35.console.report import last, quoted
from mlx_qwen35.console.table import markdown, size
from mlx_qwen35.machine.chip import brand
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import Option, options_of
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.train import plot
from mlx_qwen35.train.record import Run, loss_text
from mlx_qwen35.train.rows import Row, RowFile
from mlx_qwen35.train.samples import MOST_TOKENS, Answers, Question, answers, questions

REPORT, PICTURE = "report.md", "losses.png"
PACKAGES = ("mlx-qwen35", "mlx")
MOST_LOSSES = 20  # rows of the table of losses


@dataclass(frozen=True)
class Before:
    """The questions of some rows, and the answers of the base alone."""

    asked: tuple[Question, ...]
    answers: Answers


def before(model: Model, processor: Processor, rows: RowFile | Sequence[Row]) -> Before:
    """Ask the base before it is trained. rows: of the validation, or of the training where there are none."""
    asked = questions(rows, processor)
    return Before(tuple(asked), answers(model, processor, asked))


def after(
    earlier: Before, run: Run, model: Model, processor: Processor, pairs: Mapping[str, Pair], out: Path
) -> Path:
    """Ask again with the trained low-rank parts, by Hugging Face name, and write the report into the folder `out`.

    Returns the report's file. There is no picture where matplotlib is not installed, or no step was made.
    """
    text = {name: pair for name, pair in pairs.items() if not name.startswith(MTP)}
    now = answers(model, processor, earlier.asked, text)
    along = answers(model, processor, earlier.asked, pairs) if len(text) < len(pairs) else None
    drawn = bool(run.steps) and find_spec("matplotlib") is not None
    if drawn:
        plot.draw(out / PICTURE, run, f"{_named(run)} {machine()}")
    file = out / REPORT
    with written(str(file)):
        file.write_text(report(earlier, now, along, run, pairs, out.name, drawn), encoding="utf-8")
    return file


def report(
    earlier: Before, now: Answers, along: Answers | None, run: Run, pairs: Mapping[str, Pair], name: str, drawn: bool
) -> str:
    """The report's text. along: answers with the draft head trained too. name: of the folder. drawn: the picture is."""
    picture = f"![Losses over the steps]({PICTURE})" if drawn else ""
    if run.steps and not drawn:
        picture = "The picture of the losses needs matplotlib: `pip install 'mlx-qwen35[plot]'`."
    sections = [
        f"# {name}: an adapter for {last(run.model)}",
        f"{run.claim}. {run.ended}".strip(),
        picture,
        _trained(run, pairs),
        _losses(run),
        _samples(earlier, now),
        _drafts(earlier.answers, now, along),
        _cost(run),
        _use(run, name),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def machine() -> str:
    """Versions and hardware, in one sentence."""
    packages = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    where = f"{brand()}, {os.cpu_count()} cores, {system_memory() / 1e9:.0f} GB, {platform.system()}"
    return f"{packages}, Python {platform.python_version()}; {where}, on {backend().device}."


def _named(run: Run) -> str:
    own = run.counts.get("train")
    rows = f", {own.rows:,} rows" if own else ""
    return f"{last(run.model)}, trained on {last(run.data)}{rows}."


# --- sections --------------------------------------------------------------------------------------------------------


def _trained(run: Run, pairs: Mapping[str, Pair]) -> str:
    head = sum(name.startswith(MTP) for name in pairs)
    numbers = sum(pair.a.size + pair.b.size for pair in pairs.values())
    maps = f"{len(pairs)} maps{f', {head} of them in the draft head' if head else ''}"
    rows = [
        [split, *(f"{n:,}" for n in (own.rows, own.tokens, own.targets, own.images, own.cut, own.skipped))]
        for split, own in run.counts.items()
    ]
    parts = [
        "## What was trained",
        f"Low-rank parts of {maps}: {numbers:,} numbers, float32. Model: `{last(run.model)}`. Data: "
        f"`{last(run.data)}`. {_options(run.options)}",
        markdown(["split", "rows", "tokens", "targets", "images, videos", "rows cut", "left out"], rows),
    ]
    cut, skipped = (sum(getattr(own, name) for own in run.counts.values()) for name in ("cut", "skipped"))
    if cut or skipped:
        parts.append(
            f"Rows longer than `--max-length`: {cut:,} cut, whose last tokens were not learnt; {skipped:,} left out, "
            "with nothing left to learn."
        )
    parts.append(f"Made with {machine()}")
    return "\n\n".join(parts)


def _options(options: Any) -> str:
    """The options that are not at their defaults, as on the command line."""
    group: Any = type(options)
    named = [(option, getattr(options, name)) for name, option in options_of(group).items()]
    typed = [_typed(option, value) for option, value in named if value is not None and value != option.default]
    return f"Options: `{' '.join(typed)}`." if typed else "All options have their defaults."


def _typed(option: Option, value: Any) -> str:
    if isinstance(value, bool):
        return option.flags[0 if value else -1]
    text = ",".join(value) if isinstance(value, tuple) else last(value) if isinstance(value, str) else f"{value:.10g}"
    return f"{option.flags[0]} {text}"


def _losses(run: Run) -> str:
    if not run.steps:
        return ""
    validated = {own.step: own.loss for own in run.validations}
    kept = run.kept.step if run.kept else None
    marks = sorted({*_spread(sorted(validated) or [step.step for step in run.steps]), *([kept] if kept else [])})
    rows = [
        [f"{stop:,}", loss_text(run.mean(start, stop)), loss_text(validated.get(stop)), "kept" if stop == kept else ""]
        for start, stop in zip([0, *marks], marks, strict=False)
    ]
    told = "Means over targets, in nats; of the training since the row before."
    table = markdown(["step", "training loss", "validation loss", ""], rows)
    if kept is None:
        table = markdown(["step", "training loss"], [row[:2] for row in rows])
    perplexity = ""
    if run.kept:
        perplexity = f" Perplexity of the validation rows with the kept adapter: {math.exp(run.kept.loss):,.4g}."
    return f"## Losses\n\n{told}{perplexity}\n\n{table}"


def _spread(steps: Sequence[int]) -> list[int]:
    """At most MOST_LOSSES of them, spread evenly, the last among them."""
    count = min(MOST_LOSSES, len(steps))
    return [steps[(n + 1) * len(steps) // count - 1] for n in range(count)]


def _samples(earlier: Before, now: Answers) -> str:
    if not earlier.asked:
        return ""
    right = [question.right for question in earlier.asked]
    before, after = (
        sum(map(str.__eq__, texts, right)) for texts in (earlier.answers.texts, now.texts)
    )
    parts = [
        "## Answers before and after",
        f"Greedy, at most {MOST_TOKENS} tokens. Word for word those of the data: {before} of {len(right)} before, "
        f"{after} after.",
    ]
    for question, old, new in zip(earlier.asked, earlier.answers.texts, now.texts, strict=True):
        said = {"data": question.right, "before": old, "after": new}
        lines = [f"- {name}: {quoted(text)}" for name, text in said.items()]
        parts.append("\n".join([f"Line {question.line}: {quoted(question.shown)}\n", *lines]))
    return "\n\n".join(parts)


def _drafts(earlier: Answers, now: Answers, along: Answers | None) -> str:
    named = {"before": earlier, "after, draft head as it was": now, "after, draft head trained along": along}
    rows = [
        [name, f"{own.accepted:,} of {own.drafted:,}", f"{100 * own.acceptance:.0f} %"]
        for name, own in named.items()
        if own and own.acceptance is not None
    ]
    if not rows:
        return "## Drafts\n\nNo tokens were drafted: the model has no draft head, or memory no room for it."
    told = "Of the draft head's tokens, one a step, accepted in the answers above. Drafts change no answer, only speed."
    if along is None:
        told += " `--draft-head` trains the head along."
    return f"## Drafts\n\n{told}\n\n{markdown(['', 'accepted', ''], rows)}"


def _cost(run: Run) -> str:
    if not run.steps:
        return ""
    seconds, tokens = (sum(getattr(step, name) for step in run.steps) for name in ("seconds", "tokens"))
    told = [f"{len(run.steps):,} steps in {duration(seconds)}: {tokens / max(seconds, 1e-9):,.0f} tokens a second."]
    if run.peak is not None:
        planned = f"; the plan was {size(run.planned)}" if run.planned else ""
        told.append(f"Memory at its highest: {size(run.peak)}{planned}.")
    return "## Time and memory\n\n" + " ".join(told)


def _use(run: Run, name: str) -> str:
    model = last(run.model)
    peft = f"""

In transformers, of the unquantized original:

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("{model}"), "{name}")
```"""
    mlx_lm = f"""

In mlx-lm, of the text model: `mlx_lm.generate --model {model} --adapter-path {name}`."""
    commands = f"""## Use

```sh
mlx_qwen35.generate --model {model} --adapter {name} --prompt "..."
mlx_qwen35.serve --model {model} --adapter {name}
mlx_qwen35.convert --hf-path {model} --adapter {name} --mlx-path {name}-fused
```"""
    return commands + (mlx_lm if getattr(run.options, "adapter_format", "") == "mlx-lm" else peft)
