"""Hidden states of the last tokens behind a long context, against transformers; needs torch.

Both caches hold the same random keys and values, which were never computed. The DeltaNet states begin at zero.
"""

import mlx.core as mx
import numpy as np
import pytest
from parity import cases

from mlx_qwen35.cache.layer import CachePosition, KVCache

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TOKENS = 64
ONE_HEAD = cases.Case(
    "one_head", 5, prompt=0,
    text={
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 1, "num_key_value_heads": 1,
        "head_dim": 64, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
        },
    },
)  # fmt: skip


@pytest.mark.parametrize(
    "columns", [1000, pytest.param(16_384, marks=pytest.mark.full), pytest.param(262_144, marks=pytest.mark.full)]
)
def test_the_last_rows_behind_a_long_context_are_those_of_transformers(columns, rng, parity_folder, parity_model):
    from parity.reference import load_text_model
    from transformers import DynamicCache

    model, other = parity_model(ONE_HEAD), load_text_model(ONE_HEAD, parity_folder(ONE_HEAD)).model
    held = columns - TOKENS
    keys, values = (rng.standard_normal((1, 1, held, 64), np.float32) for _ in range(2))
    ids = [int(token) for token in cases.tokens(ONE_HEAD, TOKENS)]

    cache, theirs = model.make_cache(), DynamicCache(config=other.config)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, KVCache):
            layer.reserve([held])
            layer.append(mx.array(keys), mx.array(values), (held,))
            theirs.update(torch.from_numpy(keys), torch.from_numpy(values), index)
    cache.position = CachePosition((held,), (held,))

    ours = np.array(model.hidden(mx.array([ids]), cache)[0])
    with torch.no_grad():
        expected = other(
            input_ids=torch.tensor([ids]), past_key_values=theirs, position_ids=torch.arange(held, columns)[None]
        ).last_hidden_state[0]
    assert expected.std() > 0.5
    assert np.abs(ours - expected.numpy()).max() < 1e-4
