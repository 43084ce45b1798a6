"""Loading a model over several ranks: each reads its own part from its own disk."""

import bisect
import gc
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from mlx_qwen35.budget.plan import Machine, this_machine
from mlx_qwen35.budget.splitting import AUTO, PIPELINE, TENSOR, split_model, split_of
from mlx_qwen35.cache.kv_format import KVFormat
from mlx_qwen35.checkpoint.adapter_choice import Chosen
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.config import FULL
from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.distributed.channel import Order
from mlx_qwen35.distributed.handshake import Facts, agree
from mlx_qwen35.distributed.model import Holding, PipelineModel, TensorModel
from mlx_qwen35.distributed.opening import NEEDS, described, room, weight_bytes
from mlx_qwen35.distributed.options import RankOptions
from mlx_qwen35.distributed.orders import Orders
from mlx_qwen35.distributed.ranks import Ranks, join, ranks
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions, load_given, load_model
from mlx_qwen35.machine.process import LOCK, check_folder, refuse_fork
from mlx_qwen35.model.model import Model, Spread
from mlx_qwen35.model.weights import Progress
from mlx_qwen35.options import spelled
from mlx_qwen35.prompt.processor import Processor

Waiting = Callable[[str], object]  # is told whom rank 0 waits for


def load_distributed(
    model: str | Path,
    *,
    hosts: str | Sequence[str] | None = None,
    split: str = AUTO,
    progress: Progress = lambda done, total: None,
    waiting: Waiting = lambda whom: None,
    **options: Any,
) -> tuple[Model, Processor]:
    """Load a checkpoint over several machines. Return the model and the processor, as `load` does.

    In a script that `mlx.launch -n 2 -- python script.py` runs, every rank calls this. It returns on rank 0 alone: the
    other ranks follow it from here on, and end with it. With `hosts` this process starts them itself.

    Args:
        model: as for `load`. Every machine has it on its own disk, at the same path or under the same id.
        hosts: names for ssh of the other machines, as "mini.local"; None: the ranks of mlx.launch.
        split: "tensor" (a part of every layer each), "pipeline" (some of the layers each), or "auto": tensor over
            jaccl, else pipeline.
        progress: as for `load`, of this machine's part.
        waiting: called with the name of the machine that is waited for.
        options: the others of `load`. memory_limit is this machine's.

    The process has one such model at a time. Raises InputError as `load` does, with the machine's name where it is
    about another one; peer_unreachable and control_failed where machines cannot meet; ranks_differ where they have not
    the same versions or files; split_unfit for heads that do not divide. All of it before weights are read.
    """
    refuse_fork()
    check_folder()
    given, own = LoadOptions(model, **options), RankOptions(hosts, split)
    return load_given(given, progress, Spreading(join(own.hosts), given, own.split, waiting))


def loader(given: LoadOptions, own: RankOptions) -> "Spreading | None":
    """What loads a model as these options say; None where this process alone holds it."""
    return None if runs_alone(own) else Spreading(join(own.hosts), given, own.split)


def runs_alone(own: RankOptions) -> bool:
    """Whether this process holds the whole model. InputError option_no_effect for a split of it."""
    if ranks() or own.hosts:
        return False
    if own.split != AUTO:
        raise InputError(
            "option_no_effect",
            f"{spelled('split')} must be given with machines to split over (--with): one holds all of a model here. "
            "Leave it out",
        )
    return True


def no_session() -> NoReturn:
    raise InputError(
        "ranks_unsupported",
        "what was read of a conversation is on several machines, each with its part, and a session's file would hold "
        "that of one. Keep sessions with a model that one machine holds",
    )


_loaded: "weakref.ref[Model] | None" = None  # the model that the ranks hold, while it lives


@dataclass(frozen=True)
class Spreading:
    """Makes a model over these ranks, in the place of `load_model`."""

    ranks: Ranks
    given: LoadOptions
    split: str = AUTO
    waiting: Waiting = lambda whom: None

    def __call__(
        self, checkpoint: Checkpoint, dtype: mx.Dtype, name: str, progress: Progress, memory_limit: int, kv: KVFormat,
        adapters: Chosen,
    ) -> Model:  # fmt: skip
        with LOCK:  # so that no other order comes between one and its answers
            return self._agreed(checkpoint, dtype, name, progress, memory_limit, kv, adapters)

    def _agreed(
        self, checkpoint: Checkpoint, dtype: mx.Dtype, name: str, progress: Progress, memory_limit: int, kv: KVFormat,
        adapters: Chosen,
    ) -> Model:  # fmt: skip
        _check_alone()
        told = self._asked("open", described(self.given, checkpoint, adapters))
        facts = [Facts.of(checkpoint, adapters, memory_limit), *(Facts.from_json(one["facts"]) for one in told)]
        agree(facts, self.ranks.hosts)
        limits = [own.memory for own in facts]
        if self.given.dtype is None and dtype == mx.bfloat16 and any(one["dtype"] == "float16" for one in told):
            dtype = mx.float16  # of a machine without bfloat16's arithmetic
        return self._loaded(checkpoint, dtype, name, progress, limits, kv, adapters)

    def _loaded(
        self, checkpoint: Checkpoint, dtype: mx.Dtype, name: str, progress: Progress, limits: Sequence[int],
        kv: KVFormat, adapters: Chosen,
    ) -> Model:  # fmt: skip
        global _loaded
        text = checkpoint.config.text
        kind = split_of(self.ranks.place.backend) if self.split == AUTO else self.split
        machines = self._machines(this_machine(text, dtype, limits[0], kv), limits)
        shares = split_model(kind, checkpoint, machines, name, adapters=adapters.listed).shares(text)
        others = [Holding(own.of_config(text), limit) for own, limit in zip(shares[1:], limits[1:], strict=True)]
        leading = {PIPELINE: PipelineModel, TENSOR: TensorModel}[kind]
        orders = Orders(self.ranks.leader, self.ranks.leader.fail)
        self._give("load", {
            "name": name, "dtype": dtype_name(dtype),
            "layers": [[own.layers.start, own.layers.stop] for own in shares] if kind == PIPELINE else None,
        })  # fmt: skip
        try:
            model = load_model(
                checkpoint, dtype, name, progress, limits[0], kv, adapters, shares[0],
                partial(leading, text, self.ranks.group, orders, others),
            )  # fmt: skip
        except BaseException:
            self.ranks.leader.leave_answers()
            raise
        told = self._answers()
        for host, one in zip(self.ranks.hosts[1:], told, strict=True):
            for warned in one["warned"]:  # tensors of its part that float16 cannot hold, say
                warnings.warn(f"{host}: {warned}", RuntimeWarning, stacklevel=2)
        weights = [weight_bytes(model), *(own["weights"] for own in told)]
        self._keep_to_least_room(model, limits[0])
        model.fingerprint = no_session
        model.spread = Spread(kind, tuple(self.ranks.hosts), tuple(weights))
        _loaded = weakref.ref(model)
        return model

    def _machines(self, own: Machine, limits: Sequence[int]) -> list[Machine]:
        """What is planned for, rank 0's first."""
        names = [own.name, *self.ranks.hosts[1:]]
        return [replace(own, name=name, limit=limit) for name, limit in zip(names, limits, strict=True)]

    def _keep_to_least_room(self, model: Model, limit: int) -> None:
        """Lower rank 0's limit until what it has room for fits on every rank. Where none of its layers keeps tokens, so
        that its memory tells nothing of them, their number is bounded instead.
        """
        window = model.config.max_position_embeddings
        chunk = model.chunk(window)
        told = [own["tokens"] for own in self._asked("room", {"chunk": chunk})]
        least = [min(rows * window, *own) for (rows, _), *own in zip(NEEDS, *told, strict=True)]

        def too_much(limit: int) -> bool:
            return any(own > most for own, most in zip(room(model, chunk, limit), least, strict=True))

        capped = [min(own, rows * window) for own, (rows, _) in zip(room(model, chunk, limit), NEEDS, strict=True)]
        short = [most for own, most in zip(capped, least, strict=True) if own > most]
        if short and FULL not in model.held.layer_types:
            model.room = min(short)
        elif short:
            model.memory_limit = max(1, bisect.bisect_left(range(limit), True, key=too_much) - 1)

    # --- orders ---

    def _give(self, name: str, fields: Mapping[str, Any]) -> None:
        self.ranks.leader.give(Order(name, fields))

    def _asked(self, name: str, fields: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        self._give(name, fields)
        return self._answers()

    def _answers(self) -> Sequence[Mapping[str, Any]]:
        """The others' answers. InputError, with the machine's name, for what one of them refuses."""
        self.waiting(", ".join(self.ranks.hosts[1:]))
        found = self.ranks.leader.answers()
        for host, answer in zip(self.ranks.hosts[1:], found, strict=True):
            if refused := answer.get("refused"):
                code, fault, *advice = refused
                raise InputError(code, f"{host}: {fault}", *(own.replace("HOST:", f"{host}:") for own in advice))
        return found


def _check_alone() -> None:
    """InputError where the ranks hold a model already."""
    if _loaded and _loaded():
        gc.collect()
    if _loaded and _loaded():
        raise InputError(
            "ranks_unsupported", "several machines must hold one model at a time. Delete the first one before the next"
        )
