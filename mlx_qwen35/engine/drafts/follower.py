"""The draft head's side of a conversation: its cache, and the tokens that it drafts.

Its inputs are pairs: a token's hidden state, after the model's final norm, and the next token. A pair has one entry of
keys and values, at the position of its hidden state. So the head follows one token behind the model, and the last
hidden state waits for the next token. While nothing is drafted pairs are only collected, and run together later.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.checkpoint.config import FULL
from mlx_qwen35.model.model import Model, Visual


class Pairs(NamedTuple):
    """Collected pairs."""

    hidden: mx.array  # (B, T, D)
    tokens: mx.array  # (B, T)
    counts: tuple[int, ...]  # pairs of each row; the rest is padding


class DraftFollower:
    """The MTP head's cache beside the B rows of a model's cache, with which it returns to snapshots."""

    def __init__(self, model: Model, row_lengths: Sequence[int], adapters: Sequence[str] | None = None):
        """row_lengths: tokens in the model's cache, which the head will not see. adapters: of its rows."""
        batch = len(row_lengths)
        layers = (FULL,) * model.config.mtp_num_hidden_layers
        self.cache = Cache(replace(model.config, layer_types=layers), model.dtype, batch, model.kv, adapters)
        self.followed = tuple(row_lengths)  # the tokens that it follows, of each row
        self.hidden: mx.array | None = None  # (B, D) of each row's last token; None before the first
        self.position: np.ndarray | None = None  # (3, B) of the first pending pair; None continues from the cache's
        self.pending: tuple[Pairs, ...] = ()
        self.ahead = False  # whether it has run the pair of the token that the model is about to run

    def reserve(self, T: int) -> None:
        self.cache.reserve(T)

    def copy(self) -> "DraftFollower":
        """A follower with the same content, which goes on apart."""
        return self._with(self.cache.copy())

    def select(self, rows: Sequence[int]) -> "DraftFollower":
        """A follower of these rows alone."""
        index = mx.array(list(rows))
        follower = self._with(self.cache.select(rows))
        follower.followed = tuple(self.followed[row] for row in rows)
        follower.hidden = None if self.hidden is None else self.hidden[index]
        follower.position = None if self.position is None else self.position[:, list(rows)]
        follower.pending = tuple(
            Pairs(pairs.hidden[index], pairs.tokens[index], tuple(pairs.counts[row] for row in rows))
            for pairs in self.pending
        )
        return follower

    @staticmethod
    def joined(model: Model, followers: Sequence["DraftFollower"]) -> "DraftFollower":
        """A follower of the rows of several, each of which has followed a prompt."""
        for follower in followers:
            follower.flush(model)
        if len(followers) == 1:
            return followers[0]
        joined = followers[0]._with(Cache.joined([follower.cache for follower in followers]))
        joined.followed = sum((follower.followed for follower in followers), ())
        joined.hidden = mx.concatenate([follower.hidden for follower in followers if follower.hidden is not None])
        if any(follower.position is not None for follower in followers):
            joined.position = np.concatenate([follower.first_pending() for follower in followers], axis=1)
        return joined

    def first_pending(self) -> np.ndarray:
        """(3, B) positions of the first pending pair."""
        if self.position is not None:
            return self.position
        return np.broadcast_to(np.array(self.cache.next_positions), (3, self.cache.batch))

    def _with(self, cache: Cache) -> "DraftFollower":
        follower = DraftFollower.__new__(DraftFollower)
        follower.__dict__.update(self.__dict__ | {"cache": cache})
        return follower

    def arrays(self) -> list[mx.array]:
        found = self.cache.held()
        found += [array for pairs in self.pending for array in (pairs.hidden, pairs.tokens)]
        return found if self.hidden is None else [*found, self.hidden]

    # --- following the model ---

    def prefill(
        self,
        model: Model,
        tokens: mx.array,
        hidden: mx.array,
        counts: Sequence[int],
        first: Sequence[int],
        visual: Visual | None = None,
        positions: np.ndarray | None = None,
    ) -> None:
        """Run the pairs of a chunk of a prompt: tokens (B, T) and their hidden states (B, T, D).

        counts: tokens of each row; the rest is padding. first: the position of each row's first. visual, positions: as
        for the model.
        """
        self.flush(model)
        if self.hidden is None:  # the first token follows no hidden state
            self.cache.position = self.cache.position._replace(next_positions=tuple(first))
        begins = int(self.hidden is None)
        table = self._positions(tokens.shape[1], counts, first, positions)
        embeddings = model.embed(tokens, visual, model.active(self.cache))[:, begins:]
        if embeddings.shape[1]:
            before = self._previous(hidden)
            counted = [max(0, count - begins) for count in counts]
            self._run(model, embeddings, before, counted, table)
        self._advance(hidden, counts)

    def _positions(
        self, T: int, counts: Sequence[int], first: Sequence[int], positions: np.ndarray | None
    ) -> np.ndarray | None:
        """(3, B, T) of a chunk's pairs, each the token's before; T - 1 of the first chunk. None continues."""
        if positions is None and self.position is None:
            return None
        if positions is None:
            positions = np.broadcast_to(np.array(first)[:, None] + np.arange(T), (3, len(first), T))
        before = self.first_pending()
        last = positions[:, np.arange(len(counts)), np.maximum(np.array(counts) - 1, 0)]
        self.position = np.where(np.array(counts) > 0, last, before)
        if self.hidden is None:
            return positions[..., :-1]
        return np.concatenate([before[..., None], positions[..., :-1]], axis=-1)

    def follow(self, tokens: mx.array, hidden: mx.array, counts: Sequence[int]) -> None:
        """Collect the pairs of tokens (B, T) that the model ran after the prompt, and of their hidden states (B, T, D).

        counts: tokens of each row; the rest is padding. Where the head is ahead, it has run the pair of the first.
        """
        if self.ahead:
            pairs = Pairs(hidden[:, :-1], tokens[:, 1:], tuple(max(0, count - 1) for count in counts))
        else:
            pairs = Pairs(self._previous(hidden), tokens, tuple(counts))
        self.ahead = False
        if any(pairs.counts):
            self.pending += (pairs,)
        self._advance(hidden, counts)

    def flush(self, model: Model) -> None:
        """Run the collected pairs."""
        if self.pending:
            pairs = _concatenated(self.pending)
            embeddings = model.embed(pairs.tokens, None, model.active(self.cache))
            self._run(model, embeddings, pairs.hidden, pairs.counts, self._pending_positions(pairs))
            self.pending, self.position = (), None

    def _previous(self, hidden: mx.array) -> mx.array:
        """(B, T, D) of tokens -> (B, T, D) of the tokens before them; T - 1 for the first chunk."""
        if self.hidden is None:
            return hidden[:, :-1]
        last = self.hidden[:, None]
        return last if hidden.shape[1] == 1 else mx.concatenate([last, hidden[:, :-1]], axis=1)

    def _advance(self, hidden: mx.array, counts: Sequence[int]) -> None:
        """Store each row's last hidden state, in memory of its own."""
        last = mx.array([max(0, count - 1) for count in counts])
        found = mx.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0] if hidden.shape[1] > 1 else hidden[:, 0]
        if self.hidden is not None and 0 in counts:
            found = mx.where(mx.array(list(counts))[:, None] > 0, found, self.hidden)
        self.hidden = found
        self.followed = tuple(n + m for n, m in zip(self.followed, counts, strict=True))

    # --- drafting ---

    def propose(
        self,
        model: Model,
        tokens: mx.array,
        counts: Sequence[int],
        depth: int,
        sample: Callable[[mx.array, list[mx.array]], mx.array],
    ) -> mx.array:
        """Tokens (B, 1) that the model is about to run -> `depth` drafts of the next ones, (B, depth).

        counts: 1 for each running row, else 0. sample(logits (B, 1, V), drafted): a token (B, 1) after those drafted
        so far.
        """
        assert self.hidden is not None, "there is a prompt"
        pairs = _concatenated((*self.pending, Pairs(self.hidden[:, None], tokens, tuple(counts))))
        ends = mx.array([max(0, count - 1) for count in pairs.counts])
        positions = self._pending_positions(pairs)
        adapters = model.active(self.cache)
        embeddings = model.embed(pairs.tokens, None, adapters)
        y = self._run(model, embeddings, pairs.hidden, pairs.counts, positions, ends)
        self.pending, self.position, self.ahead = (), None, True
        before = self.cache.position
        drafted = [sample(model.logits(y, adapters), [])]
        while len(drafted) < depth:
            y = self._run(model, model.embed(drafted[-1], None, adapters), y, counts)
            drafted.append(sample(model.logits(y, adapters), drafted))
        self.cache.rollback(before, [0] * len(counts))
        return mx.concatenate(drafted, axis=1)

    def _pending_positions(self, pairs: Pairs) -> np.ndarray | None:
        """(3, B, T) positions of collected pairs; None continues from the cache's."""
        if self.position is None:
            return None
        following = np.maximum(self.cache.next_positions, self.position.max(0) + 1)
        T = pairs.tokens.shape[1]
        rest = np.broadcast_to(following[:, None] + np.arange(T - 1), (3, len(following), T - 1))
        return np.concatenate([self.position[..., None], rest], axis=-1)

    def _run(
        self,
        model: Model,
        embeddings: mx.array,
        hidden: mx.array,
        counts: Sequence[int],
        positions: np.ndarray | None = None,
        at: mx.array | None = None,
    ) -> mx.array:
        assert model.mtp is not None
        T = hidden.shape[1]
        lengths = None if min(counts) == T else counts
        with self.cache.forward(T, lengths, positions, False, model.active(self.cache)) as context:
            rotary = model.rotary.table(context.positions)
            return model.mtp.part(embeddings, hidden, rotary, context, self.cache.layers, at)


def _concatenated(parts: Sequence[Pairs]) -> Pairs:
    """Pairs one after the other in each row, with padding only at the end."""
    if len(parts) == 1:
        return parts[0]
    hidden = mx.concatenate([part.hidden for part in parts], axis=1)
    tokens = mx.concatenate([part.tokens for part in parts], axis=1)
    mask = np.concatenate([np.arange(p.tokens.shape[1]) < np.array(p.counts)[:, None] for p in parts], axis=1)
    counts = tuple(map(int, mask.sum(1)))
    if not mask.all():
        order = mx.array(np.argsort(~mask, axis=1, kind="stable")[:, : max(counts)])
        hidden = mx.take_along_axis(hidden, order[..., None], axis=1)
        tokens = mx.take_along_axis(tokens, order, axis=1)
    return Pairs(hidden, tokens, counts)
