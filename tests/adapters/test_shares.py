"""An adapter beside a model that several machines hold: each has its part of it, and together they answer as one."""

import mlx.core as mx
import pytest
from adapters.random_adapters import every_map, made
from dividing import FOURS, SAME, difference, divided, loaded, of_pipeline, of_sums, piped, prompt
from geometries import changed

from mlx_qwen35.checkpoint.adapter import Adapter
from mlx_qwen35.checkpoint.arrays import lazy_arrays
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.names import HEAD, MTP, TABLE, TEXT, VISION
from mlx_qwen35.checkpoint.shapes import is_matrix
from mlx_qwen35.checkpoint.share import Share


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request, checkpoint_folder) -> Checkpoint:
    return open_checkpoint(checkpoint_folder(changed(FOURS, tie_word_embeddings=request.param)))


@pytest.fixture(scope="module")
def adapter(checkpoint) -> Adapter:
    return made(every_map(checkpoint), ranks=(2, 3, 4))


@pytest.fixture(scope="module")
def expected(checkpoint, adapter) -> mx.array:
    out = loaded(checkpoint, adapter=adapter)(prompt())
    mx.eval(out)
    assert difference(out, loaded(checkpoint)(prompt())) > 0.1
    return out


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_the_parts_added_up_answer_with_an_adapter_as_the_whole_does(size, checkpoint, adapter, expected):
    assert difference(of_sums(divided(checkpoint, size, adapter=adapter), prompt()), expected) < 2 * SAME


@pytest.mark.parametrize("ends", [(1, 4), pytest.param((1, 3, 4), marks=pytest.mark.full)])
def test_a_pipeline_answers_with_an_adapter_to_the_bit(ends, checkpoint, adapter, expected):
    assert mx.array_equal(of_pipeline(piped(checkpoint, *ends, adapter=adapter), prompt()), expected).item()


def test_an_adapter_of_other_layers_alone_is_loaded_all_the_same(checkpoint):
    adapter = made(every_map(checkpoint), only=lambda name: ".layers.3." in name)
    whole = loaded(checkpoint, adapter=adapter)(prompt())
    ranks = piped(checkpoint, 3, 4, adapter=adapter)
    assert mx.array_equal(of_pipeline(ranks, prompt()), whole).item()
    assert all(rank.adapters.fingerprint("own") == adapter.fingerprint for rank in ranks)


@pytest.mark.core(1)
def test_whole_tensors_of_an_adapter_are_cut_as_the_checkpoints_are(checkpoint, adapter):
    """A head of its own unties the model, as PEFT trains a table."""
    own = [name for name in checkpoint.shapes if name.startswith(TEXT)]
    replaced = {name: array + 0.02 for name, array in lazy_arrays(checkpoint, own).items()}
    replaced[HEAD] = lazy_arrays(checkpoint, [TABLE])[TABLE] - 0.02
    low = {n: p for n, p in adapter.pairs.items() if n not in replaced}
    adapter = Adapter(adapter.path, "peft", low, replaced, fingerprint="f" * 64)
    whole = loaded(checkpoint, adapter=adapter)(prompt())
    assert difference(of_sums(divided(checkpoint, 2, adapter=adapter), prompt()), whole) < 2 * SAME
    assert mx.array_equal(of_pipeline(piped(checkpoint, 1, 4, adapter=adapter), prompt()), whole).item()


def test_pairs_of_vision_encoder_and_draft_head_are_kept_whole(checkpoint):
    adapter = made(every_map(checkpoint, VISION, MTP))
    for share in (Share.tensor(checkpoint.config.text, 1, 2), Share.pipeline(checkpoint.config.text, range(2, 4))):
        pairs = share.of_adapter(adapter, checkpoint).pairs
        assert adapter.pairs and [*pairs] == [*adapter.pairs]
        assert all(pair.a is adapter.pairs[n].a and pair.b is adapter.pairs[n].b for n, pair in pairs.items())


def test_rows_are_cut_of_b_and_columns_of_a(checkpoint, adapter):
    share = Share.tensor(checkpoint.config.text, 1, 4)
    part = share.of(checkpoint)
    for name, pair in share.of_adapter(adapter, checkpoint).pairs.items():
        shape = part.entries[TABLE if name == HEAD else name].shape
        assert is_matrix(name, shape) and (len(pair.b), pair.a.shape[1]) == shape
        assert pair.scale == adapter.pairs[name].scale
