"""How fast a long forward pass hands its layers to a GPU."""

from collections import deque

import mlx.core as mx

from mlx_qwen35.backend import backend
from mlx_qwen35.budget.chunk import LAYERS_IN_FLIGHT


class Pace:
    """Hands layers to the GPU as their graphs are built, and waits so that at most LAYERS_IN_FLIGHT are computed.

    Otherwise MLX runs ahead by up to ten command buffers, whose arrays stay in memory. On the CPU it does not run
    ahead, and the order of a whole graph takes less memory (163 against 194 MB, 1,024 tokens, mid geometry).
    """

    def __init__(self) -> None:
        self.in_flight: deque[list[mx.array]] = deque()

    def __call__(self, arrays: list[mx.array]) -> None:
        if not backend().queues_layers:
            return
        mx.async_eval(arrays)
        self.in_flight.append(arrays)
        if len(self.in_flight) == LAYERS_IN_FLIGHT:
            mx.eval(self.in_flight.popleft())
