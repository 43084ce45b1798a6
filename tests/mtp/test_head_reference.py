"""The numpy form of the draft head against transformers' own decoder layer and norms, all in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from geometries import changed
from mtp.head_reference import HeadReference, read_tensors

from mlx_qwen35.checkpoint.random import geometry

SEEDS = (0, 1)
TOLERANCE = 1e-11  # float64 against float64, outputs near 1; a wrong head differs by more than 1e-3
TEXT = np.tile(np.arange(24), (3, 1))
# 5 tokens of text, a picture of 2 x 3 merged patches, 4 tokens, a frame of 3 x 2 of later time, 3 tokens.
PICTURES = np.concatenate(
    (
        np.tile(np.arange(5), (3, 1)),
        5 + np.array([[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]),
        np.tile(np.arange(8, 12), (3, 1)),
        12 + np.array([[0] * 6, [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1]]),
        np.tile(np.arange(15, 18), (3, 1)),
    ),
    axis=1,
)
FAR = PICTURES + 200_000
POSITIONS = {"text": TEXT, "pictures": PICTURES, "far pictures": FAR}


def inputs(T: int, D: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of unit size and embeddings of the size that a table has, both (T, D)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(T, D)), 0.02 * rng.normal(size=(T, D))


@pytest.fixture
def transformers_head(monkeypatch: pytest.MonkeyPatch) -> Callable[[HeadReference, Path], Callable[..., np.ndarray]]:
    """(reference, folder) -> its `pairs` by transformers; what that widens to float32 is widened to float64 here."""
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    from checkpoint import DraftHead  # of examples/nano
    from transformers import Qwen3_5TextConfig

    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def build(reference: HeadReference, folder: Path) -> Callable[..., np.ndarray]:
        config = Qwen3_5TextConfig(**reference.config)
        config._attn_implementation = "sdpa"
        head, rotary = DraftHead(config).double().eval(), qwen.Qwen3_5TextRotaryEmbedding(config)
        tensors: dict[str, Any] = {}
        for file in folder.glob("*.safetensors"):
            tensors |= {k.removeprefix("mtp."): v for k, v in read_tensors(file).items() if k.startswith("mtp.")}
        head.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})

        @torch.no_grad()
        def pairs(hidden: np.ndarray, embeddings: np.ndarray, positions: np.ndarray) -> np.ndarray:
            h, e = (torch.from_numpy(array)[None] for array in (hidden, embeddings))
            return head(h, e, rotary(h, torch.from_numpy(positions)[:, None]))[0].numpy()

        return pairs

    return build


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_pairs_are_those_of_transformers_parts(checkpoint_folder, transformers_head, seed, positions):
    folder = checkpoint_folder(seed=seed)
    reference = HeadReference(folder)
    hidden, embeddings = inputs(positions.shape[1], reference.config["hidden_size"], seed)
    theirs = transformers_head(reference, folder)(hidden, embeddings, positions)
    np.testing.assert_allclose(reference.pairs(hidden, embeddings, positions), theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_pairs_agree_where_several_query_heads_share_a_key(checkpoint_folder, transformers_head, seed):
    folder = checkpoint_folder(changed(geometry("tiny"), num_attention_heads=4, num_key_value_heads=2), seed)
    reference = HeadReference(folder)
    hidden, embeddings = inputs(PICTURES.shape[1], reference.config["hidden_size"], seed)
    theirs = transformers_head(reference, folder)(hidden, embeddings, PICTURES)
    np.testing.assert_allclose(reference.pairs(hidden, embeddings, PICTURES), theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_chain_is_that_of_transformers_parts(checkpoint_folder, transformers_head, seed):
    folder = checkpoint_folder(seed=seed)
    reference = HeadReference(folder)
    hidden, embeddings = inputs(PICTURES.shape[1], reference.config["hidden_size"], seed)
    chain = reference.chain(hidden, embeddings, PICTURES, 3)
    # The finished chain as one reading: drafts and outputs shifted by one, positions going on from the last.
    later = PICTURES[:, -1:] + np.arange(1, 3)
    pairs = transformers_head(reference, folder)
    whole = pairs(
        np.concatenate((hidden, chain.hidden[:2])),
        np.concatenate((embeddings, reference.embedding[chain.tokens[:2]])),
        np.concatenate((PICTURES, later), axis=1),
    )
    logits = whole[-3:] @ reference.embedding.T
    np.testing.assert_allclose(chain.logits, logits, atol=TOLERANCE, rtol=0)
    assert chain.tokens.tolist() == logits.argmax(axis=-1).tolist()


def test_a_pair_does_not_see_later_pairs(checkpoint_folder):
    reference = HeadReference(checkpoint_folder())
    hidden, embeddings = inputs(PICTURES.shape[1], reference.config["hidden_size"], 0)
    whole = reference.pairs(hidden, embeddings, PICTURES)
    part = reference.pairs(hidden[:9], embeddings[:9], PICTURES[:, :9])
    np.testing.assert_allclose(whole[:9], part, atol=TOLERANCE, rtol=0)


def test_a_shift_of_all_positions_changes_nothing(checkpoint_folder):
    reference = HeadReference(checkpoint_folder())
    hidden, embeddings = inputs(PICTURES.shape[1], reference.config["hidden_size"], 0)
    moved = reference.pairs(hidden, embeddings, PICTURES + 1000)
    np.testing.assert_allclose(moved, reference.pairs(hidden, embeddings, PICTURES), atol=TOLERANCE, rtol=0)


def test_an_untied_head_gives_the_logits(checkpoint_folder):
    reference = HeadReference(checkpoint_folder(changed(geometry("tiny"), tie_word_embeddings=False)))
    y = np.eye(reference.config["hidden_size"])
    assert reference.head is not reference.embedding
    assert np.array_equal(reference.logits(y), reference.head.T)


def test_bfloat16_is_widened_exactly(checkpoint_folder):
    mx = pytest.importorskip("mlx.core")
    folder = checkpoint_folder()
    (file,) = folder.glob("*.safetensors")
    stored = mx.load(str(file))
    for name, array in read_tensors(file).items():
        assert np.array_equal(array, np.array(stored[name].astype(mx.float32))), name
