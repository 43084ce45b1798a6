"""What log-probabilities add to the launches of a step, for each row that asks.

What a step without them takes is pinned in test_draft_step.py.
"""

import mlx.core as mx
import pytest
from dispatches.recording import counted, zeros

from mlx_qwen35.engine.logprobs import LogprobScorer

VOCABULARY = 248_320
OWN = {"AsType": 1, "LogSumExp": 1, "GatherAxis": 1, "Subtract": 1}  # float32, normalizer, the token's logit
MOST = {"Negative": 1, "ArgPartition": 1, "GatherAxis": 2, "Subtract": 2}


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("top", "launches"), [(0, OWN), (5, OWN | MOST)], ids=["tokens", "most probable too"])
def test_a_row_that_asks_takes_what_is_pinned(top, launches, tokens):
    scorer = LogprobScorer(top, VOCABULARY - 100, lambda token: b"")
    sampled = zeros(tokens, dtype=mx.uint32)

    def scores(logits: mx.array) -> list[mx.array]:
        return list(scorer.score(logits, sampled))[: 3 if top else 1]

    assert counted(scores, zeros(tokens, VOCABULARY)) == launches
