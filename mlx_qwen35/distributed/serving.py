"""What a rank that is not 0 does from its start to rank 0's end: open, load and obey. It prints nothing."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from mlx_qwen35.checkpoint.dtypes import DTYPES, dtype_name
from mlx_qwen35.distributed import survey
from mlx_qwen35.distributed.channel import Follower, Order
from mlx_qwen35.distributed.follower import ObeyingRank
from mlx_qwen35.distributed.group import Group
from mlx_qwen35.distributed.handshake import Facts
from mlx_qwen35.distributed.opening import Opened, open_described, room, share_of, weight_bytes
from mlx_qwen35.distributed.pipeline import PipelineSplit
from mlx_qwen35.distributed.split import Split
from mlx_qwen35.distributed.tensor import TensorSplit
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions, choose_dtype, load_model

Answer = Mapping[str, Any] | None


def obey(group: Group, follower: Follower) -> None:
    """Obey rank 0 until it has ended. What it can mend in what it asked for is answered; anything else is raised."""
    rank = _Rank(group)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rank 0 warns, of what was loaded here too
        while order := follower.take():
            try:
                answer = rank.obey(order)
            except InputError as error:
                answer = {"refused": [error.code, *error.args[1:]]}
            if answer is not None:
                follower.answer(answer)


class _Rank:
    """The state of a rank between orders."""

    def __init__(self, group: Group):
        self._group = group
        self._told: Mapping[str, Any] = {}
        self._opened: Opened | None = None
        self._obeying: ObeyingRank | None = None

    def obey(self, order: Order) -> Answer:
        own: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
            "open": self._open, "load": self._load, "room": self._room, "unload": self._unload,
        }  # fmt: skip
        if survey.is_of_survey(order):
            return survey.obey(self._group, order)
        if order.name in own:
            return own[order.name](order.fields)
        assert self._obeying, "a model was loaded"
        return self._obeying.obey(order)

    def _open(self, told: Mapping[str, Any]) -> Answer:
        self._unload({})
        self._told, self._opened = told, open_described(told)
        checkpoint = self._opened.checkpoint
        return {
            "facts": Facts.of(checkpoint, self._opened.adapters).as_json(),
            "dtype": dtype_name(choose_dtype(checkpoint, None)),
        }  # fmt: skip

    def _load(self, told: Mapping[str, Any]) -> Answer:
        opened, self._opened = self._opened, None
        assert opened, "a checkpoint was opened"
        checkpoint, rank = opened.checkpoint, self._group.rank
        layers = range(*told["layers"][rank]) if told["layers"] else None
        share = share_of(checkpoint, layers, rank, self._group.size)
        kv = LoadOptions(kv_bits=self._told["kv_bits"], kv_rotate=self._told["kv_rotate"])
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            model = load_model(
                checkpoint, DTYPES[told["dtype"]], told["name"], kv=kv.kv_format(checkpoint.config.text.head_dim),
                adapters=opened.adapters, share=share,
            )  # fmt: skip
        nbytes = weight_bytes(model)  # before the split puts its sums into the layers
        if layers:
            split: Split = PipelineSplit(model, self._group)
        else:
            split = TensorSplit(model, self._group, checkpoint.config.text.vocab_size)
        self._obeying = ObeyingRank(model, split, layers.start if layers else 0)
        return {"weights": nbytes, "warned": [str(one.message) for one in warned]}

    def _room(self, told: Mapping[str, Any]) -> Answer:
        assert self._obeying, "a model was loaded"
        model = self._obeying.model
        return {"tokens": room(model, told["chunk"], model.memory_limit)}

    def _unload(self, _: Mapping[str, Any]) -> Answer:
        self._obeying = None
        return None
