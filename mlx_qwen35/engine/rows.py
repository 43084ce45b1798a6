"""The running rows: sequences that go through the model together, one pass after the other.

Each row has its own keys and values; the DeltaNet states of all rows stand in one array. So rows join and leave without
a copy of keys and values, and no row can reach another: a sequence gets what it would get alone.

A pass feeds each row its last token, with drafts those too, and gives it as many tokens as were accepted, and one more.
Without drafts the next pass is fed before the tokens of this one are known, so that the device is never idle.
"""

import itertools
import operator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.cache.layer import CachePosition
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.drafts.speculate import Speculation
from mlx_qwen35.engine.logprobs import Scores
from mlx_qwen35.engine.sampling import NO_TOKEN, Bits, commit, peek, sample
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.model.model import Model, not_finite


@dataclass
class Pass:
    """One forward pass, lazy, and the tokens sampled from its logits."""

    inputs: mx.array  # (B, 1 + depth): the last sampled token, then the drafted ones
    lengths: list[int]  # input tokens of each row; the rest is padding
    hidden: mx.array  # (B, 1 + depth, D): the hidden states of the inputs
    logits: mx.array  # (B, 1 + depth, V)
    position: CachePosition  # of the cache before the pass
    before: Cache | None = None  # the cache before the pass, if tokens were drafted, until its tokens are known
    sampled: mx.array | None = None  # (B, 1 + depth): the token after each input token
    finite: mx.array | None = None  # (B, 1 + depth) boolean: whether all logits of that token are finite
    scores: list[Scores | None] = field(default_factory=list)  # of each row's sampled tokens; None: it does not ask
    tokens: list[list[int]] = field(default_factory=list)  # of each row: accepted drafts and one more; empty: not known
    begun: list[int] = field(default_factory=list)  # tokens that each sequence had before those, once they are known

    @property
    def depth(self) -> int:
        return self.inputs.shape[1] - 1

    def arrays(self) -> list[mx.array]:
        found = [self.inputs, self.hidden, self.logits, self.sampled, self.finite]
        found += [array for scores in self.scores for array in scores or ()]
        return [array for array in found if array is not None]

    def select(self, rows: Many[int]) -> "Pass":
        """These rows alone."""
        index = mx.array(list(rows))
        return Pass(
            self.inputs[index], [self.lengths[row] for row in rows], self.hidden[index], self.logits[index],
            CachePosition(*(tuple(own[row] for row in rows) for own in self.position)),
            self.before and self.before.select(rows),
            None if self.sampled is None else self.sampled[index],
            None if self.finite is None else self.finite[index],
            [self.scores[row] for row in rows] if self.scores else [],
            [self.tokens[row] for row in rows] if self.tokens else [],
            [self.begun[row] for row in rows] if self.begun else [],
        )  # fmt: skip


class Rows:
    """The running sequences, a row each."""

    def __init__(self, model: Model):
        self.model = model
        self.sequences: list[Sequence] = []
        self.cache: Cache | None = None  # of as many rows
        self.speculation = Speculation(model)
        self.current: Pass | None = None  # fed, and its tokens not all taken
        self._following: Pass | None = None  # fed behind the current one
        self._depth: int | None = None  # of drafts in the pass that is fed next, where it was decided

    # --- a pass ---

    def begin(self, sequence: Sequence, hidden: mx.array) -> None:
        """Give a sequence its first token. hidden (1, D): of its last prompt token."""
        logits = self.model.logits(hidden, self.model.adapters.active([sequence.adapter]))
        token = sample([sequence.sampler], logits)
        if not mx.isfinite(logits).all().item():
            assert sequence.own is not None
            raise not_finite(self.model, sequence.own)
        scores = sequence.scorer.score(logits, token) if sequence.scorer else None
        mx.eval(token, sequence.sampler.arrays(), scores)
        _take(sequence, np.array(token).item(), scores)

    def run(self, paused: float, ahead: bool) -> None:
        """Finish one pass, and begin the next where that needs nothing of the host.

        A row with a logit that is not finite ends with an error. paused: seconds since the last pass that
        the caller took, or a prompt. ahead: whether the next pass may begin.
        """
        if self.current is None:
            self.current = self._feed(mx.array([s.last for s in self.sequences])[:, None], self._next_depth())
        if self.current.sampled is None:
            self._sample(self.current)
        if self._following is None:
            self._depth = self._next_depth()
            if ahead and self.current.depth == self._depth == 0 and any(s.left > 1 for s in self.sequences):
                assert self.current.sampled is not None
                self._following = self._feed(self.current.sampled, 0, unknown=1)
        tokens = self._receive()
        self.current.begun, self.current.before = [len(s.tokens) for s in self.sequences], None
        self.current.tokens = tokens
        self.speculation.record(self.current.lengths, tokens, paused)

    @property
    def untaken(self) -> list[list[int]]:
        """The tokens of the current pass that each sequence has still to take; all empty: it needs another pass."""
        if self.current is None or not self.current.tokens:
            return [[] for _ in self.sequences]
        rows = zip(self.sequences, self.current.tokens, self.current.begun, strict=True)
        return [[] if s.finished else tokens[len(s.tokens) - begun :] for s, tokens, begun in rows]

    def take(self) -> list[Sequence]:
        """Give each sequence its next token. Returns those that have one more, or ended in the pass."""
        changed = [sequence for sequence in self.sequences if sequence.finished]
        for row, (sequence, tokens) in enumerate(zip(self.sequences, self.untaken, strict=True)):
            if tokens:
                assert self.current is not None
                place = len(sequence.tokens) - self.current.begun[row]
                _take(sequence, tokens[0], self.current.scores[row], place)
                changed.append(sequence)
        return changed

    def _next_depth(self) -> int:
        depth, self._depth = self.speculation.depth() if self._depth is None else self._depth, None
        return depth

    def _feed(self, tokens: mx.array, depth: int, unknown: int = 0) -> Pass:
        """A pass over (B, 1) tokens and up to `depth` drafted ones. If it is interrupted all is as before.

        unknown: sampled tokens of each row that the host does not know yet. A row that ends with them is fed nothing.
        """
        assert self.cache is not None
        left = [max(0, sequence.left - unknown) for sequence in self.sequences]
        lengths = [min(1 + self.speculation.most(row, depth), n) for row, n in enumerate(left)]
        depth = max(lengths) - 1
        before, speculation = self.cache.copy(), self.speculation.copy()
        try:
            if depth:
                samplers = [sequence.sampler for sequence in self.sequences]
                tokens = self.speculation.propose(tokens, [min(1, n) for n in lengths], depth, samplers)
            return self._pass(tokens, lengths, before, unknown)
        except BaseException:
            self.cache, self.speculation = before, speculation
            raise

    def _pass(self, tokens: mx.array, lengths: list[int], before: Cache, unknown: int = 0) -> Pass:
        """One pass over the first lengths[i] of row i's tokens (B, 1 + depth). unknown: as in `_feed`."""
        assert self.cache is not None
        depth, position = tokens.shape[1] - 1, self.cache.position
        uneven = None if min(lengths) == 1 + depth else lengths
        hidden = self.model.hidden(tokens, self.cache, uneven, stepwise=depth > 0)
        if not depth:
            self.speculation.follow(tokens, hidden, lengths)
        logits = self.model.logits(hidden, self.model.active(self.cache))
        made = Pass(tokens, lengths, hidden, logits, position, before if depth else None)
        if any(sequence.sampler.needs_tokens(unknown + 1 + depth) for sequence in self.sequences):
            mx.async_eval(made.logits)
        else:
            self._sample(made)
        return made

    def _sample(self, made: Pass) -> None:
        """Sample the tokens of a pass, and submit it."""
        made.sampled = self._peek(made.logits, made.inputs[:, 1:] if made.depth else None)
        made.finite = (mx.abs(made.logits) < mx.inf).all(-1)
        if not made.depth:
            commit([sequence.sampler for sequence in self.sequences], made.sampled)
        scorers = enumerate(sequence.scorer for sequence in self.sequences)
        made.scores = [s.score(made.logits[row], made.sampled[row]) if s else None for row, s in scorers]
        mx.async_eval(made.sampled, made.finite, made.scores)

    def _peek(self, logits: mx.array, drafted: mx.array | None) -> mx.array:
        """`sampling.peek`; an error of one row's own functions ends that row."""
        n, samplers = logits.shape[1], [sequence.sampler for sequence in self.sequences]
        wait = drafted is not None and any(sampler.needs_tokens(n) for sampler in samplers)
        known = np.array(drafted).tolist() if wait else [[] for _ in samplers]
        bits = [_bits(sequence, known[row], n) for row, sequence in enumerate(self.sequences)]
        if not any(sampler.separate for sampler in samplers):
            return peek(samplers, logits, drafted, bits=bits)
        sampled = []
        for row, sequence in enumerate(self.sequences):
            own = slice(row, row + 1)
            try:
                guesses = None if drafted is None else drafted[own]
                sampled.append(peek([sequence.sampler], logits[own], guesses, bits=bits[own]))
            except Exception as error:
                sequence.fail(error)
                sampled.append(mx.argmax(logits[own], axis=-1))
        return mx.concatenate(sampled)

    def _receive(self) -> list[list[int]]:
        """Wait for the current pass. The tokens of each row are its accepted drafts and one more."""
        assert self.current is not None and self.cache is not None
        tokens, bad = self._accepted(self.current)
        if bad and self.current.depth:  # a drafted token may overflow, and infinity passes through attention weights
            made, before = self.current, self.current.before
            assert before is not None
            self.cache = before
            self.current = self._pass(made.inputs[:, :1], [min(1, n) for n in made.lengths], before)
            if self.current.sampled is None:
                self._sample(self.current)
            tokens, bad = self._accepted(self.current)
        for row in bad:
            tokens[row] = []
            self.sequences[row].fail(not_finite(self.model, self.cache, row))
        return tokens

    def _accepted(self, made: Pass) -> tuple[list[list[int]], list[int]]:
        """The tokens of each row, and the rows with a logit that is not finite."""
        sampled, finite, inputs = (np.array(array).tolist() for array in (made.sampled, made.finite, made.inputs))
        tokens: list[list[int]] = []
        for row, length in enumerate(made.lengths):
            drafted = inputs[row][1:length]
            accepted = sum(itertools.takewhile(bool, map(operator.eq, drafted, sampled[row])))
            tokens.append(sampled[row][: accepted + 1] if length else [])
        return tokens, [row for row, own in enumerate(tokens) if not all(finite[row][: len(own)])]

    def settle(self) -> None:
        """Behind a pass: keep of it what the sequences have taken, in cache, samplers and draft head.

        A row's last token is in the cache if the next pass is fed already; else that pass brings it.
        """
        made, following = self.current, self._following
        if made is None or self.cache is None:
            return
        if made.depth:
            accepted = [max(0, len(own) - 1) for own in made.tokens or [[] for _ in made.lengths]]
            begun = made.begun or [len(s.tokens) for s in self.sequences]  # interrupted: nothing of it was taken
            taken = [len(s.tokens) - n for s, n in zip(self.sequences, begun, strict=True)]
            kept = [n and 1 + min(m, k) for n, m, k in zip(made.lengths, taken, accepted, strict=True)]
            if self.cache.position != made.position.after(kept):
                self.cache.rollback(made.position, kept)
            if made.sampled is not None:
                commit([s.sampler for s in self.sequences], made.sampled, taken)
            self.speculation.follow(made.inputs, made.hidden, kept)
        elif following and not made.tokens:  # interrupted: the cache has a token that no sequence has taken
            rows = zip(self.sequences, np.array(made.sampled), made.scores, following.lengths, strict=True)
            for sequence, token, scores, fed in rows:
                if fed and not sequence.error:
                    _take(sequence, int(token[0]), scores)
        self.current, self._following = following, None
        if following:
            self._depth = None  # which was that pass's

    # --- rows ---

    def join(self, sequences: Many[Sequence]) -> None:
        """Rows for sequences that have their first token. No pass is under way."""
        assert self.current is None
        caches = [sequence.take_cache() for sequence in sequences]
        followers = [cache.follower for cache in caches if isinstance(cache.follower, DraftFollower)]
        self.speculation.join([sequence.drafts for sequence in sequences], followers)
        every = [self.cache, *caches] if self.cache else caches
        self.cache = Cache.joined(every) if len(every) > 1 else every[0]
        self.cache.follower = None
        self.sequences += sequences
        self._depth = None

    def select(self, rows: Many[int]) -> "Rows":
        """These rows alone, with their part of the pass under way."""
        if len(rows) == len(self.sequences):
            return self
        picked = Rows(self.model)
        if rows:
            assert self.cache is not None
            picked.sequences = [self.sequences[row] for row in rows]
            picked.cache, picked.speculation = self.cache.select(rows), self.speculation.select(rows)
            picked.current = self.current and self.current.select(rows)
            picked._following = self._following and self._following.select(rows)
        return picked

    def caches(self) -> list[Cache]:
        """A cache of each row, with its draft head's."""
        assert self.cache is not None
        single = len(self.sequences) == 1
        caches = [self.cache] if single else [self.cache.select([row]) for row in range(len(self.sequences))]
        for row, cache in enumerate(caches):
            cache.follower = self.speculation.follower_of(row)
        return caches

    def arrays(self) -> list[mx.array]:
        """Every array that is held."""
        held = [array for sequence in self.sequences for array in sequence.sampler.arrays()]
        held += [array for made in (self.current, self._following) if made for array in made.arrays()]
        return held + self.speculation.arrays() + (self.cache.held() if self.cache else [])


def _take(sequence: Sequence, token: int, scores: Scores | None, place: int = 0) -> None:
    """Give a sequence its next token, the one at `place` of those scored; an error of its constraint ends it."""
    try:
        if token == NO_TOKEN:
            raise sequence.sampler.no_token()
        if sequence.scorer and scores:
            sequence.logprobs.append(sequence.scorer.told(token, scores, place))
        sequence.take(token)
    except Exception as error:
        sequence.fail(error)


def _bits(sequence: Sequence, drafted: list[int], n: int) -> Bits:
    """`Sampler.bits`; an error of its constraint ends the sequence."""
    try:
        return sequence.sampler.bits(drafted, n)
    except Exception as error:
        sequence.fail(error)
        return [None] * n
