"""What a caller may ask of a training run."""

from dataclasses import dataclass

from mlx_qwen35.options import check_fields, option

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adam", "sgd", "adafactor", "muon")


@dataclass(frozen=True)
class TrainOptions:
    """What is trained, on what, and how."""

    rank: int = option(8, help="rank of each low-rank part", least=1, most=1024, metavar="N")
    alpha: float | None = option(help="the scale is alpha / rank (default: 2 x rank)", least=0, above=True, most=1e6)
    layers: int | None = option(help="train the last N layers (default: all)", least=1, metavar="N")
    max_length: int = option(2048, help="tokens of a row; what is longer is cut, and counted", least=2, metavar="N")
    batch_size: int = option(1, help="rows that go through the model together", least=1, metavar="N")
    accumulate: int = option(4, help="batches of a step; each target weighs the same", least=1, metavar="N")
    learning_rate: float = option(1e-4, help="of the optimizer, at its highest", least=0, above=True, most=10)
    steps: int | None = option(help="steps of the optimizer (default: --epochs)", least=1, metavar="N")
    epochs: float = option(1.0, help="times that each row is seen", least=0, above=True, most=1e4)
    seed: int = option(0, help="of the order of rows and the first values", least=0, metavar="N")
    pieces: int = option(256, help="tokens whose logits are in memory at a time", least=1, metavar="N")

    def __post_init__(self) -> None:
        check_fields(self)
