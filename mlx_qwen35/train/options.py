"""What a caller may ask of a training run."""

from dataclasses import dataclass
from functools import partial

from mlx_qwen35.checkpoint.adapter_write import FORMATS
from mlx_qwen35.engine.presets import MOST_SEED
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import check_fields, option, spelled
from mlx_qwen35.values import names, path

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adam", "sgd", "adafactor", "muon")
RANK = 8  # of a low-rank part, where none is chosen
EVERY = 50  # steps between validations, likewise


@dataclass(frozen=True)
class TrainOptions:
    """What is trained, on what rows, and how.

    A step is `batch_size` x `accumulate` rows. Its loss is the mean over all their targets.
    """

    rank: int | None = option(help=f"rank of each low-rank part (default: {RANK})", least=1, most=1024, metavar="N")
    alpha: float | None = option(help="the scale is alpha / rank (default: 2 x rank)", least=0, above=True, most=1e6)
    targets: tuple[str, ...] | None = option(
        help="maps to train, by the end of their names, as q_proj,v_proj,mlp.up_proj; embed_tokens and lm_head too "
        "(default: all maps of the text model's layers)", metavar="NAMES",
        check=partial(names, what="maps, as q_proj,v_proj"),
    )  # fmt: skip
    layers: int | None = option(help="train the last N layers alone (default: all)", least=1, metavar="N")
    from_adapter: str | None = option(
        help="begin with the low-rank parts of this adapter, and train those", check=path, metavar="FOLDER"
    )
    draft_head: bool = option(False, help="train the draft head along, on the same rows, so that drafts still fit")
    max_length: int = option(
        2048, help="tokens of a row; what is longer is cut, and counted (default: 2048)", least=2, metavar="N"
    )
    mask_prompt: bool = option(True, help="all tokens are targets, not those of answers alone")
    batch_size: int = option(1, help="rows that go through the model together (default: 1)", least=1, metavar="N")
    accumulate: int = option(4, help="batches of a step; all targets weigh the same (default: 4)", least=1, metavar="N")
    steps: int | None = option(help="steps of the optimizer (default: as many as --epochs takes)", least=1, metavar="N")
    epochs: float | None = option(help="times that each row is seen (default: 1)", least=0, above=True, most=1e4)
    optimizer: str = option(
        "adamw", help="of mlx.optimizers; sgd has momentum 0.9 (default: adamw)", choices=OPTIMIZERS
    )
    learning_rate: float = option(
        1e-4, help="of the optimizer, at its highest (default: 1e-4)", least=0, above=True, most=10
    )
    schedule: str = option(
        "cosine", help="how the learning rate falls, to 0 behind the last step (default: cosine)", choices=SCHEDULES
    )
    warmup: int = option(0, help="steps in which the learning rate rises first (default: 0)", least=0, metavar="N")
    weight_decay: float = option(0.0, help="of the optimizer; adam has none (default: 0)", least=0, most=10)
    clip: float = option(
        1.0, help="a longer gradient is scaled to this norm, over all maps; 0: none (default: 1)", least=0, most=1e9
    )
    validate_every: int | None = option(
        help=f"steps between validations, where the data has a valid.jsonl (default: {EVERY})", least=1, metavar="N"
    )
    validation_rows: int | None = option(help="validate on the first N rows (default: all)", least=1, metavar="N")
    patience: int | None = option(
        help="end after N validations without a lower loss (default: after all steps)", least=1, metavar="N"
    )
    save_every: int = option(50, help="steps between saved states (default: 50)", least=1, metavar="N")
    seed: int = option(
        0, help="of the order of rows and of the first values (default: 0)", least=0, most=MOST_SEED, metavar="N"
    )
    pieces: int = option(256, help="tokens whose logits are in memory at a time (default: 256)", least=1, metavar="N")
    adapter_format: str = option(
        "peft", help="files of the adapter: PEFT's or mlx-lm's (default: peft)", choices=FORMATS
    )

    @property
    def validated_every(self) -> int:
        """Steps between validations."""
        return self.validate_every or EVERY

    def __post_init__(self) -> None:
        check_fields(self)
        if self.steps is not None and self.epochs is not None:
            raise InputError(
                "option_conflict",
                f"{spelled('steps')} and {spelled('epochs')} both say how long to train. Leave one out",
            )
        if self.from_adapter is not None:
            fixed = ("rank", "alpha", "targets", "layers")
            if given := [spelled(name) for name in fixed if getattr(self, name) is not None]:
                raise InputError(
                    "option_conflict",
                    f"{', '.join(given)} must not be given with {spelled('from_adapter')}: that adapter says which "
                    "maps are trained, and of what rank. Leave it out",
                )
        if self.weight_decay and self.optimizer == "adam":
            raise InputError(
                "option_no_effect", f"{spelled('weight_decay')} has no effect with adam; take adamw, or leave it out"
            )


@dataclass(frozen=True)
class RunOptions:
    """What a run reads and writes."""

    data: str | None = option(
        help="folder with train.jsonl, and valid.jsonl if there is one", check=path, metavar="FOLDER"
    )
    adapter: str | None = option(
        help="folder to write: the adapter, and run/ to go on with", check=path, metavar="FOLDER"
    )
    resume: bool = option(False, help="go on with the run in --adapter; a run that was killed ends as if it was not")
    report: bool = option(
        True, help="write no report.md with losses, answers before and after, and the use of drafts"
    )
    dry_run: bool = option(False, help="print rows, tokens, steps, memory and hours, and read no weights")
