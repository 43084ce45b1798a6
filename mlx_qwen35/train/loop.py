"""The loop: batches make a step, steps make a run. Validation, early stop, saving, and what looks on.

A step's gradient is the sum over all targets of its batches, divided by their number: each target weighs the same,
wherever it stands. A state is replaced as a whole once its step is done, so that whatever ends the loop leaves one.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.checkpoint.names import MTP
from mlx_qwen35.console.interrupt import uninterrupted
from mlx_qwen35.console.notices import tell
from mlx_qwen35.errors import InputError
from mlx_qwen35.machine.awake import Awake
from mlx_qwen35.machine.process import LOCK
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import spelled
from mlx_qwen35.train.draft_head import draft_gradients
from mlx_qwen35.train.gradients import batch_loss
from mlx_qwen35.train.optimizer import Gradients, learning_rate, norm, updated
from mlx_qwen35.train.options import TrainOptions
from mlx_qwen35.train.order import Order
from mlx_qwen35.train.rows import Row, RowFile
from mlx_qwen35.train.state import LOG, SECONDS, Best, Lines, RunFolder, RunState

Line = Mapping[str, Any]  # of the log: step, and loss, targets, tokens, learning_rate, gradient_norm, validation


class Watcher:
    """What looks on while a run trains. This one does nothing."""

    def begins(self, training: "Training") -> None:
        """The model is loaded, and the first step of this process comes next."""

    def moves(self, training: "Training", what: str, done: int, total: int) -> None:
        """So many batches of a step or of a validation are done."""

    def stepped(self, training: "Training", line: Line, seconds: float) -> None:
        """A step is done, or step 0, the validation before the first. line: of the log. seconds: that it took."""

    def ends(self, training: "Training") -> None:
        """All steps are done, or validation has ended the run, and the adapter is written."""


@dataclass
class Sums:
    """Loss and gradients over batches, by the maps of the text model and of the draft head."""

    loss: float = 0.0
    targets: int = 0
    gradients: dict[str, tuple[mx.array, mx.array]] = field(default_factory=dict)

    def add(self, loss: float, targets: int, gradients: Gradients) -> None:
        self.loss, self.targets = self.loss + loss, self.targets + targets
        for name, (a, b) in gradients.items():
            own = self.gradients.get(name)
            self.gradients[name] = (a, b) if own is None else (own[0] + a, own[1] + b)
        mx.eval(self.gradients)

    @property
    def mean(self) -> float:
        return self.loss / self.targets

    def clipped(self, most: float) -> tuple[Gradients, float]:
        """The gradients of the mean, no longer than `most`, 0 for any length; and their length before."""
        length = norm(self.gradients) / self.targets
        factor = (most / length if 0 < most < length else 1.0) / self.targets
        return {name: (a * factor, b * factor) for name, (a, b) in self.gradients.items()}, length


Embed = Callable[[Sequence[Row]], Sequence[mx.array] | None]  # the embeddings of each row's images and videos
Write = Callable[[Mapping[str, Pair]], None]  # the adapter's files


@dataclass
class Training:
    """A run: what is trained on what, and where it stands.

    valid: None where there are no rows to validate on. steps: of the whole run. embed: see `batch_loss`. write: called
    with the parameters that are the adapter whenever a state was saved. identity: what must be the same for a run to go
    on. saved: the step of the newest saved state; None: there is none.
    """

    model: Model
    options: TrainOptions
    rows: RowFile
    valid: RowFile | None
    order: Order
    steps: int
    state: RunState
    folder: RunFolder
    identity: Mapping[str, Any]
    embed: Embed
    write: Write
    watchers: Sequence[Watcher] = ()
    saved: int | None = None

    @property
    def early(self) -> bool:
        """Whether validation has ended the run before its last step."""
        patience = self.options.patience
        return patience is not None and self.state.stale >= patience and self.state.step < self.steps

    @property
    def done(self) -> bool:
        return self.early or self.state.step >= self.steps

    @property
    def kept(self) -> str:
        """Which parameters the adapter is, in words."""
        best = self.state.best
        if best is None:
            return f"the adapter of step {self.state.step:,}, the last"
        where = "before the first step" if best.step == 0 else f"of step {best.step:,}"
        return f"the adapter {where}, whose validation loss is the lowest ({best.loss:.4f})"

    def run(self) -> None:
        """Train to the end. Whatever ends it earlier leaves a saved state behind the last whole step.

        Raises InputError loss_not_finite, which saves nothing.
        """
        with ExitStack() as stack:
            self._log, self._seconds = (self._open(stack, name) for name in (LOG, SECONDS))
            if self.lost:
                tell(f"{self._log.path} has lost {self.lost:,} of {self.state.step:,} steps; the report lacks them too")
            awake = Awake()
            stack.callback(awake.set, False)
            awake.set(True)
            try:
                if self.saved is not None:  # a killed process may have left an older one
                    self.write(self.state.chosen)
                self._tell("begins")
                self._train()
            except BaseException as error:
                if not (isinstance(error, InputError) and error.code in ("loss_not_finite", "disk_full")):
                    self._save()
                raise
            self._save()
            self._tell("ends")

    def _open(self, stack: ExitStack, name: str) -> Lines:
        state = self.state
        begun = state.step if state.step or state.best else -1
        return stack.enter_context(Lines(self.folder.folder / name, begun))

    def _tell(self, what: str, *values: Any) -> None:
        for watcher in self.watchers:
            getattr(watcher, what)(self, *values)

    def log(self) -> list[dict[str, Any]]:
        """The lines of the log up to where the run stands."""
        return [line for line in self._log.read() if line["step"] <= self.state.step]

    @property
    def lost(self) -> int:
        """Steps that the log does not have, as where it was removed. Nothing but the report needs them."""
        return self.state.step - sum(line["step"] > 0 for line in self.log())

    def seconds(self) -> dict[int, float]:
        """What each step took, of those that are known."""
        return {line["step"]: line["seconds"] for line in self._seconds.read()}

    def _train(self) -> None:
        if self.valid is not None and self.state.best is None:
            began, loss = time.monotonic(), self._validation()
            state = replace(self.state, best=Best(0, loss, self.state.parameters))
            self._commit({"step": 0, "validation": loss}, state, time.monotonic() - began)
        while not self.done:
            self._step()
            if self.state.step % self.options.save_every == 0:
                self._save()

    def _step(self) -> None:
        began, number = time.monotonic(), self.state.step + 1
        text, head, tokens = Sums(), Sums(), 0
        batches = self.order[number - 1]
        for done, indices in enumerate(batches):
            self._tell("moves", f"step {number:,}", done, len(batches))
            batch = [self.rows[index] for index in indices]
            tokens += sum(len(row.tokens) for row in batch)
            self._add(batch, text, head)
        rate = learning_rate(self.options, number, self.steps)
        gradients, length = text.clipped(self.options.clip)
        line = {"step": number, "loss": text.mean, "targets": text.targets, "tokens": tokens, "learning_rate": rate,
                "gradient_norm": length}  # fmt: skip
        if head.targets:
            of_head, length = head.clipped(self.options.clip)
            line |= {"draft_loss": head.mean, "draft_gradient_norm": length}
            gradients = {**gradients, **of_head}
        for name, value in line.items():
            self._check_finite(name.replace("_", " "), value)
        parameters, moments = updated(
            self.options, rate, number, self.state.parameters, gradients, self.state.moments
        )
        state = replace(self.state, step=number, parameters=parameters, moments=moments)
        if self.valid is not None and (number % self.options.validated_every == 0 or number == self.steps):
            loss = line["validation"] = self._validation(parameters)
            state = replace(state, stale=state.stale + 1)
            if state.best is None or loss < state.best.loss:
                state = replace(state, best=Best(number, loss, parameters), stale=0)
        self._commit(line, state, time.monotonic() - began)

    def _commit(self, line: Line, state: RunState, seconds: float) -> None:
        """Note a step, and take its state, whole."""
        self._log.append(line)
        self._seconds.append({"step": line["step"], "seconds": round(seconds, 3)})
        peak = max(state.peak, mx.get_peak_memory())
        self.state = replace(state, seconds=state.seconds + seconds, peak=peak)
        self._tell("stepped", line, seconds)

    def _add(self, batch: Sequence[Row], text: Sums, head: Sums) -> None:
        """Add loss and gradients of a batch."""
        options = self.options
        parameters = self.state.parameters
        with LOCK:
            embeddings = self.embed(batch)
            found = batch_loss(
                self.model, of_text(parameters), batch, embeddings=embeddings, pieces=options.pieces
            )
            text.add(found.loss, found.targets, found.gradients)
            if options.draft_head:
                drafted = draft_gradients(
                    self.model, parameters, batch, found.hidden, embeddings=embeddings, pieces=options.pieces
                )
                head.add(drafted.loss, drafted.targets, drafted.gradients)

    def _validation(self, parameters: Mapping[str, Pair] | None = None) -> float:
        """The mean loss over all targets of the validation's rows."""
        assert self.valid is not None
        options, sums = self.options, Sums()
        own = of_text(self.state.parameters if parameters is None else parameters)
        indices = range(min(len(self.valid), options.validation_rows or len(self.valid)))
        for done, start in enumerate(range(0, len(indices), options.batch_size)):
            self._tell("moves", "validation", done, -(-len(indices) // options.batch_size))
            batch = [self.valid[i] for i in indices[start : start + options.batch_size]]
            with LOCK:
                found = batch_loss(
                    self.model, own, batch, embeddings=self.embed(batch), pieces=options.pieces, backward=False
                )
            sums.add(found.loss, found.targets, {})
        self._check_finite("the validation loss", sums.mean)
        return sums.mean

    def _check_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        saved = "No state was saved yet" if self.saved is None else f"The saved state of step {self.saved:,} is intact"
        raise InputError(
            "loss_not_finite",
            f"loss and gradients must be finite; behind step {self.state.step:,} {what} is {value}. {saved}. Begin "
            f"anew in another folder, with a lower {spelled('learning_rate')} or {spelled('dtype', 'float32')}",
        )

    def _save(self) -> None:
        """Write the state and the adapter, undisturbed by signals."""
        if self.saved == self.state.step:
            return
        in_main = threading.current_thread() is threading.main_thread()
        with uninterrupted() if in_main else nullcontext():
            self._log.flush()
            self.folder.save(self.state, self.identity)
            self.write(self.state.chosen)
            self.saved = self.state.step


def of_text(parameters: Mapping[str, Pair]) -> dict[str, Pair]:
    """Those that are not the draft head's."""
    return {name: pair for name, pair in parameters.items() if not name.startswith(MTP)}
