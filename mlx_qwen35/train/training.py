"""From names of a model, a folder of data and a folder to write, to a trained adapter: what is read and checked first."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter import Adapter, Pair, read_adapter, write_adapter
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.checkpoint.fingerprint import fingerprint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.names import MTP
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions, choose_dtype, has_vision, load_model
from mlx_qwen35.machine.memory import limit_of
from mlx_qwen35.machine.process import check_folder, refuse_fork
from mlx_qwen35.model.weights import Progress
from mlx_qwen35.options import option, spelled
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.train import report
from mlx_qwen35.train.loop import Training, Watcher
from mlx_qwen35.train.options import TrainOptions
from mlx_qwen35.train.order import Order
from mlx_qwen35.train.parameters import Shapes, first_values, from_adapter, trained_shapes
from mlx_qwen35.train.record import Counts, Run, Step, Validation
from mlx_qwen35.train.rows import RowFile, open_rows
from mlx_qwen35.train.state import RunFolder, RunState

READ = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
        "video_preprocessor_config.json")  # fmt: skip
FREE = ("save_every",)  # options that may change when a run goes on


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
    shapes: Shapes
    begin: Adapter | None
    rows: RowFile
    valid: RowFile | None
    order: Order

    def parameters(self) -> dict[str, Pair]:
        """The first values of what is trained."""
        first = first_values(self.shapes, self.options)
        return first if self.begin is None else first | from_adapter(self.begin, self.options)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on, as JSON has it."""
        folder = self.checkpoint.folder
        options = {name: value for name, value in asdict(self.options).items() if name not in FREE}
        files = [self.data / f"{split}.jsonl" for split in ("train", "valid")]
        found = {
            "options": options,
            "data": {file.name: _digest(file) for file in files if file.is_file()},
            "model": {"weights": fingerprint(self.checkpoint), "dtype": dtype_name(self.dtype)},
            "files": {name: _digest(folder / name) for name in READ if (folder / name).is_file()},
            "adapter": self.begin and self.begin.fingerprint,
        }
        return json.loads(json.dumps(found))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def prepared(given: LoadOptions, data: str | Path, options: TrainOptions, folder: Path | None = None) -> Prepared:
    """Read headers, configuration, tokenizer and data, no weights. folder: of the model, where it is found already.

    Raises InputError for whatever of them cannot be used, and where the run would not fit into memory.
    """
    limit = limit_of(given.memory_limit)
    assert given.model is not None
    checkpoint = open_checkpoint(folder or resolve(given.model, given.revision), rope_scaling=given.rope_scaling)
    config = checkpoint.config.text
    if options.draft_head and not (config.mtp_num_hidden_layers and checkpoint.has(MTP)):
        raise InputError(
            "draft_head_missing", f"{spelled('draft_head')} must not be given: {given.model} has no draft head"
        )
    begin = None if options.from_adapter is None else read_adapter(options.from_adapter, checkpoint)
    chosen = options if begin is None else replace(options, from_adapter=None)
    shapes = trained_shapes(config, chosen)
    processor = Processor.from_folder(checkpoint.folder, checkpoint.config, has_vision(checkpoint), limit)
    where = Path(data).expanduser()
    rows = open_rows(where, "train", processor, options.max_length, mask_prompt=options.mask_prompt)
    valid = open_rows(where, "valid", processor, options.max_length, mask_prompt=options.mask_prompt)
    if rows is None:
        raise InputError("data_missing", f"{spelled('data')} must be a folder with a train.jsonl; {where} has none")
    if valid is None and options.patience is not None:
        raise InputError(
            "option_no_effect",
            f"{spelled('patience')} has no effect without validation: {where} has no valid.jsonl. Add one, or leave it "
            "out",
        )
    dtype = choose_dtype(checkpoint, given.dtype)
    order = Order.of(len(rows), options)
    return Prepared(
        str(given.model), where, options, checkpoint, processor, dtype, limit, shapes, begin, rows, valid, order
    )


@dataclass(frozen=True)
class Trained:
    """What a run has come to.

    adapter: the folder. kept: which parameters the adapter is, in words. steps: done so far, of this process and those
    before it. validations: mean loss by step, 0 before the first. best: the step of the adapter; None without
    validation. seconds: of all steps. peak: bytes of memory, of this process.
    """

    adapter: Path
    kept: str
    run: Run
    tokens: int
    targets: int
    seconds: float
    peak: int

    def as_json(self) -> dict[str, Any]:
        run = self.run
        return {
            "adapter": str(self.adapter), "kept": self.kept, "ended": run.ended, "best_step": run.best,
            "steps": len(run.steps), "loss": [step.loss for step in run.steps[:1] + run.steps[-1:]],
            "validation": [own._asdict() for own in run.validations],
            "counts": {split: asdict(counts) for split, counts in run.counts.items()}, "tokens": self.tokens,
            "targets": self.targets, "seconds": round(self.seconds, 1), "peak_memory": self.peak,
            "planned_memory": run.planned, "options": asdict(run.options),
            "versions": {name: version(name) for name in ("mlx-qwen35", "mlx")},
        }  # fmt: skip
