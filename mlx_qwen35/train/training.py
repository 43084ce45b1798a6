"""`train`: from a model's name, a folder of data and a folder to write to a trained adapter."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.budget.plan import Machine, this_machine
from mlx_qwen35.budget.training import TrainingNeeds, TrainingPlan, check_training_fits, plan_training
from mlx_qwen35.checkpoint.adapter import Adapter, Pair, read_adapter
from mlx_qwen35.checkpoint.adapter_write import write_adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.checkpoint.fingerprint import fingerprint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.names import MTP
from mlx_qwen35.console.notices import tell
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions, choose_dtype, has_vision, load_model
from mlx_qwen35.machine.memory import limit_of
from mlx_qwen35.machine.process import check_folder, refuse_fork
from mlx_qwen35.machine.versions import versions
from mlx_qwen35.options import listed, spelled
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.train.images import Embeddings
from mlx_qwen35.train.loop import Training, Watcher
from mlx_qwen35.train.options import RANK, TrainOptions
from mlx_qwen35.train.order import Order
from mlx_qwen35.train.parameters import LAYERS, Parts, first_values, trained_parts
from mlx_qwen35.train.report import after, before
from mlx_qwen35.train.rows import RowFile, open_rows
from mlx_qwen35.train.state import RunFolder, RunState
from mlx_qwen35.train.trained import Trained, run_of

FREE = ("save_every",)  # options that may change when a run goes on
Reads = Callable[[str, int, int, str], None]  # what is read, how much of it, of how much, in which unit


@dataclass(frozen=True)
class Prepared:
    """What a run needs beside the weights, checked. begin: the adapter that it begins with."""

    model: str
    data: Path
    options: TrainOptions
    checkpoint: Checkpoint
    processor: Processor
    dtype: mx.Dtype
    limit: int
    parts: Parts
    begin: Adapter | None
    rows: RowFile
    valid: RowFile | None

    @property
    def order(self) -> Order:
        """Of the rows, by step."""
        options = self.options
        return Order(self.rows.lengths, options.batch_size, options.accumulate, options.seed)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        epochs = 1.0 if self.options.epochs is None else self.options.epochs
        return self.options.steps or max(1, round(epochs * len(self.order)))

    @property
    def files(self) -> dict[str, RowFile]:
        """The data, by split."""
        return {"train": self.rows} | ({"valid": self.valid} if self.valid else {})

    @property
    def machine(self) -> Machine:
        return this_machine(self.checkpoint.config.text, self.dtype, self.limit)

    @property
    def needs(self) -> TrainingNeeds:
        """What the run asks of memory."""
        options, files = self.options, self.files.values()
        return TrainingNeeds(
            self.parts, max(int(file.lengths.max()) for file in files), options.batch_size, options.pieces,
            options.optimizer, accumulates=options.accumulate > 1, keeps_best=self.valid is not None,
            rank=(options.rank or RANK) if self.begin is None else None,
            patches=max(file.report.patches for file in files),
        )  # fmt: skip

    @property
    def plan(self) -> TrainingPlan:
        """Of its memory."""
        return plan_training(self.checkpoint, self.machine, self.needs)

    @property
    def notes(self) -> list[str]:
        """What of the data is not learnt, and what of an adapter is left out, in sentences."""
        notes, most = [], f"{spelled('max_length')} {self.options.max_length:,}"
        for split, file in self.files.items():
            own = file.report
            if own.cut:
                notes.append(f"{split}.jsonl: {own.cut:,} of {own.rows:,} rows lose their ends to {most}")
            if own.skipped:
                notes.append(f"{split}.jsonl: {own.skipped:,} rows are left out, since {most} leaves them no target")
            if own.unread:
                notes.append(f"{split}.jsonl: nothing reads the columns {', '.join(own.unread)}")
        if self.begin and any(name.startswith(MTP) for name in self.begin.pairs.keys() - self.parts.keys()):
            notes.append(
                f"the draft head's parts of {self.begin.path} are left out; {spelled('draft_head', True)} trains them "
                "further"
            )
        return notes

    def write(self, out: Path, parameters: Mapping[str, Pair]) -> None:
        """Write the adapter's files, whole or not at all."""
        write_adapter(out, parameters, format=self.options.adapter_format, model=self.model)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on, as JSON has it."""
        options = {name: value for name, value in asdict(self.options).items() if name not in FREE}
        found = {
            "options": options,
            "data": {f"{split}.jsonl": file.fingerprint for split, file in self.files.items()},
            "model": {"weights": fingerprint(self.checkpoint), "dtype": dtype_name(self.dtype)},
            "the adapter that it began with": self.begin and self.begin.fingerprint,
            "versions": versions(),
        }
        return json.loads(json.dumps(found))


def prepared(
    given: LoadOptions,
    data: str | Path,
    options: TrainOptions,
    folder: Path | None = None,
    reads: Reads = lambda what, done, total, unit: None,
) -> Prepared:
    """Read headers, configuration, tokenizer and data, no weights. folder: of the model, where it is found already.

    Raises InputError for whatever of them cannot be used, and where the run would not fit into memory.
    """
    assert given.model is not None
    limit, where = limit_of(given.memory_limit), Path(data).expanduser()
    checkpoint = open_checkpoint(folder or resolve(given.model, given.revision))
    config = checkpoint.config.text
    if options.draft_head and not (config.mtp_num_hidden_layers and checkpoint.has(MTP)):
        raise InputError(
            "draft_head_missing", f"{spelled('draft_head')} must not be given: {given.model} has no draft head"
        )
    begin = None if options.from_adapter is None else read_adapter(options.from_adapter, checkpoint)
    parts = trained_parts(config, options, begin)
    others = [name for name in parts if not name.startswith((LAYERS, MTP))]
    if options.adapter_format == "mlx-lm" and others:
        raise InputError(
            "adapter_unsupported",
            f"{spelled('adapter_format')} mlx-lm is for maps of layers alone, and {others[0]} is to be trained. Write "
            "peft's, or leave that map out",
        )
    processor = Processor.from_folder(checkpoint.folder, checkpoint.config, has_vision(checkpoint), limit)

    def rows(split: str) -> RowFile | None:
        return open_rows(
            where, split, processor, options.max_length, mask_prompt=options.mask_prompt,
            progress=lambda done, total: reads(f"reading {where / split}.jsonl", done, total, "B"),
        )  # fmt: skip

    train, valid = rows("train"), rows("valid")
    assert train is not None, "open_rows refuses a folder without train.jsonl"
    dtype = choose_dtype(checkpoint, given.dtype)
    found = Prepared(str(given.model), where, options, checkpoint, processor, dtype, limit, parts, begin, train, valid)
    _check_effects(found)
    check_training_fits(checkpoint, found.machine, found.needs, found.model)
    return found


def _check_effects(found: Prepared) -> None:
    """InputError for options that would have no effect on this run."""
    options, steps = found.options, found.steps
    idle = [name for name in ("patience", "validate_every", "validation_rows") if getattr(options, name) is not None]
    if found.valid is None and idle:
        raise InputError(
            "option_no_effect",
            f"{listed(idle)} has no effect without validation: {found.data} has no valid.jsonl. Add one, or leave it "
            "out",
        )
    times = (steps - 1) // options.validated_every  # validations between the first step and the last
    if options.patience is not None and options.patience > times:
        raise InputError(
            "option_no_effect",
            f"{spelled('patience', options.patience)} has no effect: {times} validations stand between the first of "
            f"{steps:,} steps and the last. Validate more often by {spelled('validate_every')}, or leave it out",
        )
    if options.warmup >= steps:
        raise InputError(
            "option_conflict",
            f"{spelled('warmup')} must be less than the {steps:,} steps of the run, got {options.warmup:,}: the "
            f"learning rate would not reach {options.learning_rate:g}. Warm up for fewer, or train for longer",
        )


def train(
    model: str | Path,
    data: str | Path,
    adapter: str | Path,
    options: TrainOptions = TrainOptions(),  # noqa: B008 (frozen)
    *,
    resume: bool = False,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    memory_limit: float | None = None,
    report: bool = True,
    watchers: Sequence[Watcher] = (),
    reads: Reads = lambda what, done, total, unit: None,
) -> Trained:
    """Train an adapter for a model, and write it into the folder `adapter`.

    Args:
        model: a local folder, a Hugging Face id, or "nano"; quantized or not.
        data: a folder with train.jsonl, and valid.jsonl if there is one. With it the adapter is that of the lowest
            validation loss, otherwise that of the last step.
        adapter: a folder that is absent or empty. The adapter stands there from the first saved state on, and run/
            holds what a run needs to go on.
        resume: go on with the run in `adapter`. Killed at any moment and gone on with, a run ends with the same bytes
            as one that was not. Where nothing was saved yet it begins.
        revision, dtype, memory_limit: see `load`.
        report: whether report.md and losses.png are written, with answers before and after.
        watchers: what looks on.
        reads: called while data and weights are read, as reads(what, done, total, unit).

    KeyboardInterrupt and SystemExit save the state behind the last whole step, and pass on.

    Raises InputError: whatever `load` and the data can be refused for; target_refused, target_busy where the folder
    cannot be written; memory_exceeded where the run would not fit; resume_differs, run_invalid where a run cannot go
    on; loss_not_finite.
    """
    refuse_fork()
    check_folder()
    given = LoadOptions(model=model, revision=revision, dtype=dtype, memory_limit=memory_limit)
    folder = RunFolder(Path(adapter).expanduser())
    folder.check(resume)
    found = prepared(given, data, options, reads=reads)
    identity = found.identity()
    tell(*found.notes)
    with folder.held():
        goes_on = folder.check(resume)
        if resume and not goes_on:
            tell(f"nothing to go on with in {folder.out}: training from the start")
        state = folder.read(identity) if goes_on else RunState(0, first_values(found.parts, options, found.begin))
        mx.reset_peak_memory()
        loaded = load_model(
            found.checkpoint, found.dtype, found.model, lambda done, total: reads(f"loading {model}", done, total, "B"),
            found.limit,
        )  # fmt: skip
        images = Embeddings(loaded, folder.images)
        images.fill(found.files.values(), lambda done, total: reads("encoding images", done, total, "rows"))
        training = Training(
            loaded, options, found.rows, found.valid, found.order, found.steps, state, folder, identity,
            embed=images, write=lambda parameters: found.write(folder.out, parameters),
            watchers=watchers, saved=state.step if goes_on else None,
        )  # fmt: skip
        if report:
            reads("asking the model before it is trained", 0, 0, "")
        asked = before(loaded, found.processor, found.valid or found.rows) if report else None
        training.run()
        quantized = bool(found.checkpoint.config.quantization)
        run = run_of(training, found.model, str(found.data), found.plan.peak, quantized)
        if asked:
            after(asked, run, loaded, found.processor, training.state.chosen, folder.out)
    return Trained.of(training, run)

