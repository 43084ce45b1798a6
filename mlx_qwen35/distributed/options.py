"""The options of a model over several machines."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_qwen35.budget.splitting import AUTO, SPLITS
from mlx_qwen35.distributed.hosts import check_hosts
from mlx_qwen35.options import check_fields, option


@dataclass(frozen=True)
class RankOptions:
    """Over which machines a model is split, and how."""

    hosts: Sequence[str] | None = option(
        help="split the model over this machine and these, which ssh reaches without a password, and which have the "
        "same model, MLX and mlx_qwen35; HOST:/PATH/OF/PYTHON where Python lies elsewhere there; 127.0.0.1 is another "
        "process of this machine; or a file of mlx.distributed_config", flag="with", check=check_hosts,
        metavar="HOST[,HOST]",
    )  # fmt: skip
    split: str = option(
        AUTO, help="tensor gives each machine a part of every layer, pipeline some of the layers whole; auto is tensor "
        "over jaccl (RDMA), else pipeline (default: auto)", choices=SPLITS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)
