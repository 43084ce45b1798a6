"""Hidden states with YaRN against transformers: text from position 0 and from 1,048,000, and three axes apart.

Images with YaRN are a case of vision_cases.py.
"""

from dataclasses import replace

import mlx.core as mx
import pytest
from parity import cases

from mlx_qwen35.model.rotary import Rotary

TOLERANCE = 1e-4  # at a standard deviation of 1

PLACES = cases.places(cases.YARN)


def hidden(model, places, chunk: int = cases.LAYER_TOKENS) -> mx.array:
    ids, cache = mx.array(cases.tokens(cases.YARN, cases.LAYER_TOKENS))[None], model.make_cache()
    parts = [slice(start, start + chunk) for start in range(0, cases.LAYER_TOKENS, chunk)]
    return mx.concatenate([model.hidden(ids[:, p], cache, positions=places[:, None, p])[0] for p in parts])


@pytest.mark.parametrize("chunk", [cases.LAYER_TOKENS, 37])
@pytest.mark.parametrize("name", PLACES)
def test_hidden_states_equal_transformers(name, chunk, parity_model, reference):
    ours = hidden(parity_model(cases.YARN), PLACES[name], chunk)
    assert ours.std().item() > 0.5
    assert reference(cases.YARN).error(f"hidden, {name}", ours) < TOLERANCE


@pytest.mark.parametrize("name", PLACES)
def test_without_yarn_they_would_differ(name, parity_model, reference, monkeypatch):
    model = parity_model(cases.YARN)
    monkeypatch.setattr(model, "rotary", Rotary(replace(model.config.rope, yarn=None)))
    assert reference(cases.YARN).error(f"hidden, {name}", hidden(model, PLACES[name])) > 100 * TOLERANCE


def test_the_table_equals_transformers(parity_model, reference):
    cos, sin = parity_model(cases.YARN).rotary.table(mx.array(cases.positions(cases.YARN)))
    for name, table in (("cos", cos), ("sin", sin)):
        whole = mx.concatenate([table, table], axis=-1)[:, 0].reshape(-1, 2 * table.shape[-1])
        assert reference(cases.YARN).error(name, whole[:40]) < 1e-5
