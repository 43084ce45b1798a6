"""The programs of `bench --train`, for worker.py, which loads this file by its path: a program imports nothing of the
others.

Each trains low-rank parts of rank RANK beside all maps of all layers with AdamW, on the same rows of random tokens, all
of which but the first are targets. A step is one row, forward, back and a step of the optimizer. Of several the last is
timed, since a GPU compiles in the first.
"""

import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK, SCALE, RATE = 8, 2.0, 1e-4
Row = list[int]


def rows(tokens: int, count: int, vocabulary: int) -> list[Row]:
    """Rows of `tokens` and one more, which is a target alone: special tokens come last, and are not drawn."""
    generator = random.Random(0)
    return [[generator.randrange(vocabulary // 2) for _ in range(tokens + 1)] for _ in range(count)]


def measured(train: Callable[[list[Row]], list[float]], given: list[Row]) -> dict[str, Any]:
    """Seconds of the last row's step, and what MLX had in memory at most, weights included.

    cpu_seconds: of all threads of the process, of a step on average: what else runs on the machine changes it less.
    """
    import mlx.core as mx

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.process_time()
    seconds, loss = train(given)
    used = (time.process_time() - start) / len(given)
    return {"seconds": seconds, "cpu_seconds": used, "loss": loss, "mlx_peak_bytes": mx.get_peak_memory(), "weight_bytes": before}


class Ours:
    """`mlx_qwen35.train`, as its loop makes a step."""

    def __init__(self, folder: Path, dtype: str):
        sys.path.append(str(Path(__file__).parents[2]))  # for a checkout that is not installed
        from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
        from mlx_qwen35.checkpoint.dtypes import DTYPES
        from mlx_qwen35.load import load_model
        from mlx_qwen35.machine.chip import tune
        from mlx_qwen35.train.options import TrainOptions
        from mlx_qwen35.train.parameters import first_values, trained_parts

        tune()  # as our commands do, and in this process alone
        checkpoint = open_checkpoint(folder)
        self.model = load_model(checkpoint, DTYPES[dtype], str(folder))
        self.options = TrainOptions(rank=RANK, alpha=RANK * SCALE, accumulate=1, learning_rate=RATE)
        parts = trained_parts(checkpoint.config.text, self.options, None)
        self.parameters, self.steps = first_values(parts, self.options, None), 0
        self.moments: Any = {}

    def train(self, given: list[Row]) -> dict[str, Any]:
        return measured(lambda given: [self._step(row) for row in given][-1], given)

    def _step(self, tokens: Row) -> list[float]:
        from mlx_qwen35.train.gradients import batch_loss
        from mlx_qwen35.train.loop import Sums
        from mlx_qwen35.train.optimizer import updated
        from mlx_qwen35.train.rows import Row as Tokens

        start, sums = time.perf_counter(), Sums()
        row = Tokens(tuple(tokens), (False, *[True] * (len(tokens) - 1)))
        found = batch_loss(self.model, self.parameters, [row], pieces=self.options.pieces)
        sums.add(found.loss, found.targets, found.gradients)
        gradients, _ = sums.clipped(self.options.clip)
        self.steps += 1
        self.parameters, self.moments = updated(
            self.options, RATE, self.steps, self.parameters, gradients, self.moments
        )
        return [time.perf_counter() - start, sums.mean]


class MLXLM:
    """mlx-lm's trainer, as `mlx_lm.lora` calls it. checkpointed: with --grad-checkpoint."""

    def __init__(self, folder: Path, dtype: str, checkpointed: bool = False):
        if platform.system() != "Darwin":
            os.environ["MLX_DISABLE_COMPILE"] = "1"  # it compiles whole steps, on the CPU with a C++ compiler
        import mlx.core as mx
        from mlx_lm.tuner.utils import linear_to_lora_layers
        from mlx_lm.utils import load_model

        self.model = load_model(folder)[0]
        halves = (mx.float16, mx.bfloat16)
        self.model.set_dtype(
            getattr(mx, dtype), lambda d: d in halves or (dtype == "float32" and mx.issubdtype(d, mx.floating))
        )
        self.model.freeze()
        parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
        linear_to_lora_layers(self.model, len(self.model.layers), parameters)
        mx.eval(self.model.parameters())
        self.checkpointed = checkpointed

    def train(self, given: list[Row]) -> dict[str, Any]:
        return measured(self._train, given)

    def _train(self, given: list[Row]) -> list[float]:
        import mlx.optimizers as optimizers
        from mlx_lm.tuner.callbacks import TrainingCallback
        from mlx_lm.tuner.trainer import TrainingArgs, train

        reports: list[dict[str, float]] = []

        class Collects(TrainingCallback):
            def on_train_loss_report(self, train_info: dict[str, float]) -> None:
                reports.append(train_info)

        with tempfile.TemporaryDirectory(prefix="mlx_qwen35-bench-") as folder:
            args = TrainingArgs(
                batch_size=1, iters=len(given), steps_per_report=1, max_seq_length=len(given[0]),
                adapter_file=str(Path(folder) / "adapters.safetensors"), grad_checkpoint=self.checkpointed,
            )  # fmt: skip
            rate = optimizers.AdamW(learning_rate=RATE)
            train(self.model, rate, [(row, 0) for row in given], args=args, training_callback=Collects())
        self.checkpointed = False  # the layer's class has it now
        return [1 / reports[-1]["iterations_per_second"], reports[-1]["train_loss"]]


LOADERS: dict[str, Callable[[Path, str], Any]] = {
    "mlx_qwen35": Ours, "mlx-lm": MLXLM,
    "mlx-lm, checkpointed": lambda folder, dtype: MLXLM(folder, dtype, checkpointed=True),
}  # fmt: skip
