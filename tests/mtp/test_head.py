"""The draft head against its numpy form: what it makes of prompts and of decoding, however these come.

The reference computes everything anew from hidden states, embeddings and positions of the whole text, so what is shown
beside the arithmetic is that each pair meets the right hidden state, embedding, position, and the pairs before it.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from conftest import load_text_model
from geometries import changed
from mtp.head_reference import Chain, HeadReference

from mlx_qwen35 import load
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.layer import KVRow
from mlx_qwen35.checkpoint.config import FULL, LINEAR
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.convert import convert
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.prefill import PromptRow, prefill
from mlx_qwen35.model.model import Model, Visual
from mlx_qwen35.model.mtp import MultiTokenPrediction
from mlx_qwen35.prompt.positions import Placeholder, positions

SEEDS = (0, 1)
TOLERANCE = 1e-4  # float32 against float64, numbers up to 4
ALONE = 2e-5  # of the same numbers formed in calls of other sizes
WIDTH = 128  # D
SMALL = changed(
    geometry("tiny"), num_hidden_layers=2, layer_types=[LINEAR, FULL], hidden_size=WIDTH, intermediate_size=192,
    num_attention_heads=4, num_key_value_heads=2, linear_num_key_heads=1, linear_num_value_heads=2,
)  # fmt: skip
PLACEHOLDER = 12
CHUNKS = (1, 7, 64, 1000)
PICTURES = {
    "inside": (30, [Placeholder(5, 2, 3)]),
    "two": (40, [Placeholder(3, 3, 2), Placeholder(11, 4, 5)]),
    "side by side": (24, [Placeholder(4, 2, 2), Placeholder(8, 1, 6)]),
    "first": (20, [Placeholder(0, 2, 4)]),
    "last": (26, [Placeholder(20, 2, 3)]),
    "a pixel last": (14, [Placeholder(4, 3, 3), Placeholder(13, 1, 1)]),
}


class Given(NamedTuple):
    """A text that the model has read: what the reference takes of it."""

    hidden: np.ndarray  # (T, D)
    embeddings: np.ndarray  # (T, D)
    positions: np.ndarray  # (3, T)

    def pairs(self) -> tuple[np.ndarray, ...]:
        return self.hidden[:-1], self.embeddings[1:], self.positions[:, :-1]


def text(length: int, seed: int = 0) -> PromptRow:
    return PromptRow(np.random.default_rng(seed).integers(20, 900, length).tolist())


def pictures(name: str) -> PromptRow:
    """A prompt with images, whose embeddings are of another size than those of tokens."""
    length, placeholders = PICTURES[name]
    tokens = list(text(length, 5).tokens)
    for placeholder in placeholders:
        tokens[placeholder.start : placeholder.stop] = [PLACEHOLDER] * (placeholder.height * placeholder.width)
    count = sum(p.height * p.width for p in placeholders)
    embeddings = np.random.default_rng(count).normal(size=(count, WIDTH)).astype(np.float32)
    return PromptRow(tokens, placeholders, mx.array(embeddings) / 10)


def given(model: Model, reference: HeadReference, row: PromptRow, after: Sequence[int] = ()) -> Given:
    """Of a prompt and tokens after it, from one pass of the model over all."""
    tokens = [*row.tokens, *after]
    table = positions(len(tokens), row.placeholders)
    embeddings = np.array(reference.embedding[tokens], np.float64)
    visual = None
    if row.embeddings is not None:
        columns = np.concatenate([np.arange(p.start, p.stop) for p in row.placeholders])
        embeddings[columns] = np.array(row.embeddings)
        visual = Visual(mx.zeros(len(columns), mx.int32), mx.array(columns), row.embeddings)
    hidden = model.hidden(mx.array([tokens]), None, None, visual, table[:, None])
    return Given(np.array(hidden[0].astype(mx.float32), np.float64), embeddings, table)


class Followed:
    """Prompts read by a model and its head, and then steps as the decode loop takes them, with outcomes of our choice.

    reads: for each row the outputs of the head for the pairs that it has read so far, drafts of its own left out.
    """

    def __init__(
        self,
        model: Model,
        rows: Sequence[PromptRow],
        step: int,
        monkeypatch: pytest.MonkeyPatch,
        cache: Cache | None = None,
    ):
        self.model = model
        self.reads: list[list[np.ndarray]] = [[] for _ in rows]
        self.logits: list[np.ndarray] = []  # (B, V) of each draft of the last proposal
        self.after: list[list[int]] = [[] for _ in rows]  # tokens read behind the prompt
        self.spied: list[tuple] = []
        real = MultiTokenPrediction.__call__

        def spy(head, embeddings, hidden, rotary, context, caches, at=None):
            y = real(head, embeddings, hidden, rotary, context, caches, at)
            self.spied.append((y, context.lengths))
            return y

        monkeypatch.setattr(MultiTokenPrediction, "__call__", spy)
        caches = [cache] if cache else [model.make_cache() for _ in rows]
        for own, row, reads in zip(caches, rows, self.reads, strict=True):
            own.follower = DraftFollower(model, own.row_lengths)
            self.spied.clear()
            prefill(model, own, row, step)
            for y, lengths in self.spied:
                assert lengths is None
                reads += list(np.array(y[0].astype(mx.float32)))
        self.cache = caches[0] if len(rows) == 1 else Cache.joined(caches)
        self.cache.follower = DraftFollower.joined(model, [own.follower for own in caches])

    @property
    def drafts(self) -> DraftFollower:
        return self.cache.follower

    def propose(self, tokens: Sequence[int], depth: int, counts: Sequence[int] | None = None) -> mx.array:
        self.logits = []

        def draw(logits: mx.array, drafted: list[mx.array]) -> mx.array:
            assert len(drafted) == len(self.logits)
            self.logits.append(np.array(logits[:, 0]))
            return mx.argmax(logits, axis=-1)

        return self.drafts.propose(self.model, mx.array(tokens)[:, None], counts or [1] * len(tokens), depth, draw)

    def accept(self, tokens: Sequence[int], guesses: mx.array, kept: Sequence[int]) -> None:
        """Read a token of each row and the guesses, and keep the first kept[i] of them all."""
        place, both = self.cache.position, mx.concatenate([mx.array(tokens)[:, None], guesses], axis=1)
        lengths = [both.shape[1] if n else 0 for n in kept]
        uneven = None if all(kept) else lengths
        hidden = self.model.hidden(both, self.cache, uneven, stepwise=True)
        self.cache.rollback(place, kept)
        self.drafts.follow(both, hidden, kept)
        for row, n in enumerate(kept):
            self.after[row] += both[row, :n].tolist()

    def plain(self, tokens: Sequence[int]) -> None:
        """Read a token of each row, with no drafts."""
        array = mx.array(tokens)[:, None]
        self.drafts.follow(array, self.model.hidden(array, self.cache), [1] * len(tokens))
        for row, token in enumerate(tokens):
            self.after[row].append(token)

    def keys_and_values(self, row: int = 0) -> np.ndarray:
        """(pairs, ...) of a row, in order."""
        arrays = self.drafts.cache.arrays(row)
        both = np.concatenate([np.array(arrays[f"layers.0.{name}"][0]) for name in ("keys", "values")])
        return both.swapaxes(0, 1)


@pytest.fixture(params=SEEDS)
def tiny(request, text_model, checkpoint_folder) -> tuple[Model, HeadReference]:
    return text_model(SMALL, request.param), HeadReference(checkpoint_folder(SMALL, request.param))


@pytest.fixture
def one(text_model, checkpoint_folder) -> tuple[Model, HeadReference]:
    return text_model(SMALL), HeadReference(checkpoint_folder(SMALL))


def assert_reads(followed: Followed, reference: HeadReference, known: Given, row: int = 0) -> None:
    want = reference.pairs(*known.pairs())
    ours = np.array(followed.reads[row])
    np.testing.assert_allclose(ours, want, atol=TOLERANCE, rtol=0)
    assert np.abs(want).max() > 1
    ours = np.array(followed.model.logits(mx.array(ours)[None]))[0]
    np.testing.assert_allclose(ours, reference.logits(want), atol=TOLERANCE, rtol=0)


def chain(reference: HeadReference, known: Given, token: int, depth: int) -> Chain:
    """The reference's drafts after a text and one token more, each at the position that text has there."""
    hidden, table = known.hidden, known.positions
    embeddings = np.concatenate([known.embeddings[1:], reference.embedding[[token]]])
    tokens: list[int] = []
    for _ in range(depth):
        y = reference.pairs(hidden, embeddings, table)
        tokens.append(int(reference.logits(y[-1]).argmax()))
        hidden = np.concatenate([hidden, y[-1:]])
        embeddings = np.concatenate([embeddings, reference.embedding[tokens[-1:]]])
        table = np.concatenate([table, np.full((3, 1), table.max() + 1)], axis=1)
    return Chain(np.array(tokens), reference.logits(hidden[len(known.hidden) :]), hidden[len(known.hidden) :])


def assert_proposes(followed: Followed, reference: HeadReference, row: PromptRow, token: int, depth: int) -> mx.array:
    """Propose after one row's text and one token more; the drafts, which are the reference's."""
    known = given(followed.model, reference, row, followed.after[0])
    want = chain(reference, known, token, depth)
    guesses = followed.propose([token], depth)
    assert guesses.tolist() == [want.tokens.tolist()]
    np.testing.assert_allclose(np.concatenate(followed.logits), want.logits, atol=TOLERANCE, rtol=0)
    return guesses


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.core(3)
@pytest.mark.parametrize("step", CHUNKS)
def test_pairs_of_a_prompt_are_those_of_the_reference(tiny, monkeypatch, step):
    model, reference = tiny
    row = text(70)
    assert_reads(Followed(model, [row], step, monkeypatch), reference, given(model, reference, row))


def test_a_prompt_of_one_token_has_no_pair_yet(one, monkeypatch):
    model, reference = one
    followed = Followed(model, [text(1)], 64, monkeypatch)
    assert followed.reads == [[]] and followed.drafts.cache.row_lengths == [0]
    assert_proposes(followed, reference, text(1), 7, 3)


@pytest.mark.parametrize("row", [text(70), pictures("two")], ids=["text", "pictures"])
def test_keys_and_values_do_not_depend_on_the_chunks(one, row):
    with pytest.MonkeyPatch.context() as patch:
        first, *others = (Followed(one[0], [row], step, patch).keys_and_values() for step in CHUNKS)
    assert first.shape[0] == len(row.tokens) - 1
    for other in others:
        np.testing.assert_allclose(other, first, atol=ALONE, rtol=0)


@pytest.mark.core(5)
@pytest.mark.parametrize("step", [1, 4, 64])
@pytest.mark.parametrize("name", PICTURES)
def test_pairs_of_a_prompt_with_images_are_those_of_the_reference(one, monkeypatch, name, step):
    model, reference = one
    row = pictures(name)
    assert_reads(Followed(model, [row], step, monkeypatch), reference, given(model, reference, row))


# --- drafts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_drafts_are_those_of_the_reference(tiny, monkeypatch, depth):
    followed = Followed(tiny[0], [text(33)], 64, monkeypatch)
    assert_proposes(followed, tiny[1], text(33), 500, depth)


@pytest.mark.core(4)
@pytest.mark.parametrize("step", [7, 64])
@pytest.mark.parametrize("name", PICTURES)
def test_drafts_after_a_prompt_with_images_are_those_of_the_reference(one, monkeypatch, name, step):
    followed = Followed(one[0], [pictures(name)], step, monkeypatch)
    assert_proposes(followed, one[1], pictures(name), 500, 3)


KEPT = (("inside", 0), ("last", 3))
STEPS = (  # depth, kept of the token and the drafts; depth 0: a plain step
    (3, 1), (3, 4), (2, 2), (0, 1), (1, 2), (0, 1), (0, 1), (3, 3), (1, 1), (2, 3), (3, 1),
)  # fmt: skip


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("row", "first"),
    [
        pytest.param(row, first, id=f"{name}-{first}", marks=[] if (name, first) in KEPT else [pytest.mark.full])
        for name, row in (("text", text(21)), ("inside", pictures("inside")), ("last", pictures("last")))
        for first in (0, 3)
    ],
)
def test_drafts_are_those_of_the_reference_whatever_was_kept_before(one, monkeypatch, row, first):
    model, reference = one
    followed = Followed(model, [row], 8, monkeypatch)
    for i, (depth, kept) in enumerate(STEPS[first:]):
        token = 100 + i
        if not depth:
            followed.plain([token])
            continue
        guesses = assert_proposes(followed, reference, row, token, depth)
        followed.accept([token], guesses, [kept])
    assert followed.drafts.followed == tuple(followed.cache.row_lengths)
    assert len(followed.after[0]) == sum(kept for _, kept in STEPS[first:])


def test_pairs_that_wait_are_read_when_another_part_of_the_conversation_comes(one, monkeypatch):
    model, reference = one
    followed = Followed(model, [pictures("last")], 8, monkeypatch)
    for token in (100, 101, 102):
        followed.plain([token])
    assert len(followed.drafts.pending) == 3
    more = pictures("inside")
    prefill(model, followed.cache, more, 7)
    before, (length, _) = pictures("last"), PICTURES["last"]
    placeholders = [*before.placeholders, *(p._replace(start=p.start + length + 3) for p in more.placeholders)]
    tokens = [*before.tokens, 100, 101, 102, *more.tokens]
    whole = PromptRow(tokens, placeholders, mx.concatenate([before.embeddings, more.embeddings]))
    followed.after = [[]]
    assert_proposes(followed, reference, whole, 500, 3)


def test_a_head_that_comes_late_knows_what_it_has_read_at_its_positions(one, monkeypatch):
    model, reference = one
    cache = model.make_cache()
    before, row = pictures("inside"), text(19)
    prefill(model, cache, before, 64)
    followed = Followed(model, [row], 64, monkeypatch, cache)
    whole = PromptRow([*before.tokens, *row.tokens], before.placeholders, before.embeddings)
    known = given(model, reference, whole)
    n = len(before.tokens)
    late = Given(known.hidden[n:], known.embeddings[n:], known.positions[:, n:])
    assert_reads(followed, reference, late)
    assert followed.drafts.cache.next_positions == [known.positions[0, -1]]  # that of the pair of the last token
    want = chain(reference, late, 500, 2)
    assert followed.propose([500], 2).tolist() == [want.tokens.tolist()]
    np.testing.assert_allclose(np.concatenate(followed.logits), want.logits, atol=TOLERANCE, rtol=0)


# --- batches ---------------------------------------------------------------------------------------------------------

BATCH = [text(40), pictures("two"), pictures("last"), text(1, 2)]


@pytest.mark.parametrize("step", [1, 7, 64])
def test_each_row_of_a_batch_has_the_pairs_of_the_reference(one, monkeypatch, step):
    model, reference = one
    followed = Followed(model, BATCH, step, monkeypatch)
    for i, row in enumerate(BATCH):
        if len(row.tokens) > 1:
            assert_reads(followed, reference, given(model, reference, row), i)
        assert len(followed.reads[i]) == len(row.tokens) - 1


@pytest.mark.core(1)
@pytest.mark.parametrize("columns", [256, 1])
def test_each_row_of_a_batch_drafts_what_it_drafts_alone(one, monkeypatch, columns):
    monkeypatch.setattr(KVRow, "STEP", columns)
    model, reference = one
    followed = Followed(model, BATCH, 7, monkeypatch)
    for i, depth in enumerate((3, 2, 0, 1, 3, 0, 0, 3, 3, 2, 3)):
        tokens = [100 + 10 * i + row for row in range(len(BATCH))]
        if not depth:
            followed.plain(tokens)
            continue
        kept = np.random.default_rng(i).integers(0, depth + 2, len(BATCH)).tolist()
        guesses = followed.propose(tokens, depth, [min(1, n) for n in kept])
        for row, n in enumerate(kept):
            if n and i in (1, 4, 10):
                want = chain(reference, given(model, reference, BATCH[row], followed.after[row]), tokens[row], depth)
                assert guesses[row].tolist() == want.tokens.tolist()
                logits = np.array([each[row] for each in followed.logits])
                np.testing.assert_allclose(logits, want.logits, atol=TOLERANCE, rtol=0)
        followed.accept(tokens, guesses, kept)
    known = [len(row.tokens) + len(after) for row, after in zip(BATCH, followed.after, strict=True)]
    assert list(followed.drafts.followed) == followed.cache.row_lengths == known


# --- other checkpoints -----------------------------------------------------------------------------------------------


def test_a_head_of_4_bits_is_that_of_its_own_matrices(tmp_path, monkeypatch):
    folder = convert("nano", tmp_path / "packed", quantize=True, q_bits=4, q_group_size=32)
    reference, packed = HeadReference(resolve("nano")), 0
    stored = {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}
    own = {"mtp." + name.split("mtp.")[-1].removesuffix(".weight"): name for name in stored if "mtp." in name}

    def matrix(name: str, like: np.ndarray) -> np.ndarray:
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" not in stored:
            return like
        weight, *others = (stored[f"{stem}.{part}"] for part in ("weight", "scales", "biases"))
        scales, biases = (other.astype(mx.float32) for other in others)
        bits, group = weight.shape[1] * 32 // like.shape[1], like.shape[1] // scales.shape[1]
        return np.array(mx.dequantize(weight, scales, biases, group, bits), np.float64)

    for name, array in list(reference.weights.items()):
        found = matrix(own["mtp." + name.removesuffix(".weight")], array)
        packed += found is not array
        reference.weights[name] = found
    (embedding,) = (name for name in stored if name.endswith("embed_tokens.weight"))
    reference.head = reference.embedding = matrix(embedding, reference.embedding)
    model, _ = load(folder)
    row = PromptRow(np.random.default_rng(3).integers(20, 900, 40).tolist())
    followed = Followed(model, [row], 7, monkeypatch)
    known = given(model, reference, row)
    assert packed >= 7
    want = reference.pairs(*known.pairs())
    np.testing.assert_allclose(np.array(followed.reads[0]), want, atol=1e-3, rtol=0)
    wanted = chain(reference, known, 500, 3)
    assert followed.propose([500], 3).tolist() == [wanted.tokens.tolist()]
    np.testing.assert_allclose(np.concatenate(followed.logits), wanted.logits, atol=1e-3, rtol=0)
    whole = HeadReference(resolve("nano")).pairs(*known.pairs())
    assert np.abs(want - whole).max() > 1e-2  # what packing changes is far more than the tolerance


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_a_head_in_half_is_near_the_reference(checkpoint_folder, monkeypatch, dtype):
    model, reference = load_text_model(checkpoint_folder(SMALL), dtype), HeadReference(checkpoint_folder(SMALL))
    row = text(12)
    followed = Followed(model, [row], 64, monkeypatch)
    want = reference.pairs(*given(model, reference, row).pairs())
    found = followed.reads[0]
    np.testing.assert_allclose(np.array(found), want, atol=0.05 if dtype == mx.float16 else 0.2, rtol=0)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 8))
def test_texts_of_many_lengths_and_steps_of_many_kinds_follow_the_reference(checkpoint_folder, monkeypatch, seed):
    folder = checkpoint_folder(SMALL, seed)
    model, reference, rng = load_text_model(folder), HeadReference(folder), np.random.default_rng(seed)
    for row, step in itertools.product([text(int(rng.integers(1, 80)), seed), *map(pictures, PICTURES)], (3, 10)):
        followed: Any = Followed(model, [row], step, monkeypatch)
        for token, depth in enumerate(rng.integers(0, 4, 12).tolist(), 100):
            if depth:
                guesses = assert_proposes(followed, reference, row, token, depth)
                followed.accept([token], guesses, [int(rng.integers(1, depth + 2))])
            else:
                followed.plain([token])
