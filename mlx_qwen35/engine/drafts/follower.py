"""The draft head's side of a conversation: what it has read, and the tokens that it proposes.

It reads pairs: the hidden state of a token, after the model's final norm, and the token that followed. A pair has one
entry of keys and values, at the position of its hidden state. So the head follows one token behind the model, and the
last hidden state waits for the next token. While nothing is drafted pairs are only collected, to be read all at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.cache import Cache, Snapshot
from mlx_qwen35.checkpoint.config import FULL
from mlx_qwen35.model.model import Model, Visual


class Pairs(NamedTuple):
    """Pairs that the head has not read yet."""

    hidden: mx.array  # (B, T, D)
    tokens: mx.array  # (B, T)
    counts: tuple[int, ...]  # real ones of each row, from the left


class DraftSnapshot(NamedTuple):
    """Where a DraftFollower was."""

    follower: "DraftFollower"
    cache: Snapshot
    fields: dict

    def restored(self) -> "DraftFollower":
        self.follower.cache.restore(self.cache)
        self.follower.__dict__.update(self.fields)
        return self.follower


class DraftFollower:
    """The MTP head's cache beside the B rows of a model's cache; it belongs to that cache and is rewound with it."""

    def __init__(self, model: Model, row_lengths: Sequence[int]):
        """For a cache whose rows have read so many tokens, of which the head will know nothing."""
        batch = len(row_lengths)
        layers = (FULL,) * model.config.mtp_num_hidden_layers
        self.cache = Cache(replace(model.config, layer_types=layers), model.dtype, batch)
        self.followed = tuple(row_lengths)  # tokens of each row that the model has read, as far as the head was told
        self.hidden: mx.array | None = None  # (B, D) of each row's last token; None before the first
        self.position: np.ndarray | None = None  # (3, B) of the first unread pair, where it does not go on counting
        self.unread: tuple[Pairs, ...] = ()
        self.ahead = False  # by one pair: that of the token which the model is about to read

    def reserve(self, T: int) -> None:
        self.cache.reserve(T)

    def snapshot(self) -> DraftSnapshot:
        fields = {name: value for name, value in self.__dict__.items() if name != "cache"}
        return DraftSnapshot(self, self.cache.snapshot(), fields)

    def arrays(self) -> list[mx.array]:
        found = [array for layer in self.cache.layers for array in layer.arrays()]
        found += [array for pairs in self.unread for array in pairs[:2]]
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
        """Read the pairs of a chunk of a prompt: tokens (B, T), which gave hidden (B, T, D).

        counts: real tokens of each row. first: the position of each row's first. visual, positions: as the model got
        them. An image's embeddings stand for its tokens here too.
        """
        self.flush(model)
        if self.hidden is None:  # the first token follows no hidden state
            self.cache.position = self.cache.position._replace(next_positions=tuple(first))
        begins = int(self.hidden is None)
        table = self._positions(tokens.shape[1], counts, first, positions)
        embeddings = model.embed(tokens, visual)[:, begins:]
        if embeddings.shape[1]:
            before = self._before(hidden)
            counted = [max(0, count - begins) for count in counts]
            self._run(model, embeddings, before, counted, table)
        self._wait(hidden, counts)

    def _positions(
        self, T: int, counts: Sequence[int], first: Sequence[int], positions: np.ndarray | None
    ) -> np.ndarray | None:
        """(3, B, T) of a chunk's pairs, each that of the token before, and T - 1 at the beginning; None to count on."""
        if positions is None and self.position is None:
            return None
        if positions is None:
            positions = np.broadcast_to(np.array(first)[:, None] + np.arange(T), (3, len(first), T))
        waiting = self.position
        if waiting is None:
            waiting = np.broadcast_to(np.array(self.cache.next_positions), positions.shape[:2])
        last = positions[:, np.arange(len(counts)), np.maximum(np.array(counts) - 1, 0)]
        self.position = np.where(np.array(counts) > 0, last, waiting)
        if self.hidden is None:
            return positions[..., :-1]
        return np.concatenate([waiting[..., None], positions[..., :-1]], axis=-1)

    def follow(self, tokens: mx.array, hidden: mx.array, counts: Sequence[int]) -> None:
        """Collect the pairs of tokens (B, T) that the model read after the prompt, which gave hidden (B, T, D).

        Of row i the first counts[i] are real; where the head is ahead, it has read the pair of the first.
        """
        if self.ahead:
            pairs = Pairs(hidden[:, :-1], tokens[:, 1:], tuple(max(0, count - 1) for count in counts))
        else:
            pairs = Pairs(self._before(hidden), tokens, tuple(counts))
        self.ahead = False
        if any(pairs.counts):
            self.unread += (pairs,)
        self._wait(hidden, counts)

    def flush(self, model: Model) -> None:
        """Read the pairs that were collected."""
        if self.unread:
            pairs = _joined(self.unread)
            self._run(model, model.embed(pairs.tokens), pairs.hidden, pairs.counts, self._counted(pairs))
            self.unread, self.position = (), None

    def _before(self, hidden: mx.array) -> mx.array:
        """(B, T, D) of tokens -> that of the token before each, of the very first there is none."""
        if self.hidden is None:
            return hidden[:, :-1]
        waiting = self.hidden[:, None]
        return waiting if hidden.shape[1] == 1 else mx.concatenate([waiting, hidden[:, :-1]], axis=1)

    def _wait(self, hidden: mx.array, counts: Sequence[int]) -> None:
        """Keep each row's last hidden state, in memory of its own."""
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
        """Tokens (B, 1) that the model is about to read -> guesses at the next `depth` ones, (B, depth).

        counts: 1 for each row that goes on, else 0. sample(logits (B, 1, V), drafted): a token (B, 1) of the head's
        logits, after the ones drafted so far.
        """
        pairs = _joined((*self.unread, Pairs(self.hidden[:, None], tokens, tuple(counts))))
        ends = mx.array([max(0, count - 1) for count in pairs.counts])
        y = self._run(model, model.embed(pairs.tokens), pairs.hidden, pairs.counts, self._counted(pairs), ends)
        self.unread, self.position, self.ahead = (), None, True
        before = self.cache.position
        drafted = [sample(model.logits(y), [])]
        while len(drafted) < depth:
            y = self._run(model, model.embed(drafted[-1]), y, counts)
            drafted.append(sample(model.logits(y), drafted))
        self.cache.position = before  # the columns of drafted tokens will be overwritten
        self.cache.compact()
        return mx.concatenate(drafted, axis=1)

    def _counted(self, pairs: Pairs) -> np.ndarray | None:
        """(3, B, T) positions of collected pairs, where the first one's is known; None to count on."""
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
        T = hidden.shape[1]
        with self.cache.forward(T, None if min(counts) == T else counts, positions) as context:
            rotary = model.rotary.table(context.positions)
            return model.mtp.weights(embeddings, hidden, rotary, context, self.cache.layers, at)


def _joined(parts: Sequence[Pairs]) -> Pairs:
    """Pairs behind one another in each row, holes only at the end."""
    if len(parts) == 1:
        return parts[0]
    hidden, tokens = (mx.concatenate([part[i] for part in parts], axis=1) for i in (0, 1))
    real = np.concatenate([np.arange(p.tokens.shape[1]) < np.array(p.counts)[:, None] for p in parts], axis=1)
    counts = tuple(map(int, real.sum(1)))
    if not real.all():
        order = mx.array(np.argsort(~real, axis=1, kind="stable")[:, : max(counts)])
        hidden = mx.take_along_axis(hidden, order[..., None], axis=1)
        tokens = mx.take_along_axis(tokens, order, axis=1)
    return Pairs(hidden, tokens, counts)
