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
from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.engine.drafts.follower import DraftFollower
from mlx_qwen35.engine.drafts.speculate import Speculation
from mlx_qwen35.engine.sampling import NONE, commit, peek
from mlx_qwen35.engine.sequence import Sequence
from mlx_qwen35.errors import InputError
from mlx_qwen35.model.model import Model
from mlx_qwen35.options import spelled


@dataclass
class Pass:
    """One forward pass, lazy, and the tokens sampled from its logits."""

    inputs: mx.array  # (B, 1 + depth): the last sampled token, then the drafted ones
    lengths: list[int]  # input tokens of each row; the rest is padding
    hidden: mx.array  # (B, 1 + depth, D): the hidden states of the inputs
    logits: mx.array  # (B, 1 + depth, V)
    position: CachePosition  # of the cache before the pass
    taken: list[int]  # tokens of each row that its sequence has taken
    before: Cache | None = None  # the cache before the pass, if tokens were drafted
    sampled: mx.array | None = None  # (B, 1 + depth): the token after each input token
    finite: mx.array | None = None  # (B, 1 + depth) boolean: whether all logits of that token are finite
    tokens: list[list[int]] = field(default_factory=list)  # of each row: its accepted drafts and one more, once known

    @property
    def depth(self) -> int:
        return self.inputs.shape[1] - 1

    def select(self, rows: Many[int]) -> None:
        """Go on with these rows alone; of a pass without drafts."""
        index = mx.array(list(rows))
        self.inputs, self.hidden, self.logits = self.inputs[index], self.hidden[index], self.logits[index]
        self.lengths, self.taken = ([own[row] for row in rows] for own in (self.lengths, self.taken))
        self.position = CachePosition(*(tuple(own[row] for row in rows) for own in self.position))
        self.sampled = None if self.sampled is None else self.sampled[index]
        self.finite = None if self.finite is None else self.finite[index]


class Rows:
    """The running sequences, a row each."""

    def __init__(self, model: Model):
        self.model = model
        self.sequences: list[Sequence] = []
        self.cache: Cache | None = None  # of as many rows
        self.speculation = Speculation(model)
        self.current: Pass | None = None  # fed, and its tokens not all handed out
        self._following: Pass | None = None  # fed behind the current one
        self._depth: int | None = None  # of drafts in the pass that is fed next, where it was decided

    # --- passes ---

    def begin(self, sequence: Sequence, hidden: mx.array) -> None:
        """Give a sequence its first token. hidden (1, D): of its last prompt token."""
        logits = self.model.logits(hidden)[:, None]
        token = peek([sequence.sampler], logits)
        commit([sequence.sampler], token)
        if not mx.isfinite(logits).all().item():
            assert sequence.own is not None
            raise not_finite(sequence.own, 0, self.model)
        mx.eval(token, sequence.sampler.arrays())
        self._take(sequence, np.array(token).item())

    def run(self, paused: float, ahead: bool) -> list[list[int]]:
        """Finish one pass, and return the new tokens of each row.

        A row with a logit that is not finite has none, and an error. paused: seconds that the caller took. ahead:
        whether the next pass is begun, where that needs nothing of the host.
        """
        if self.current is None:
            self.current = self._feed(mx.array([s.last for s in self.sequences])[:, None], self._next_depth())
        if self.current.sampled is None:
            self._sample(self.current)
        if self._following is None:
            self._depth = self._next_depth()
            if ahead and self.current.depth == self._depth == 0 and any(s.left > 1 for s in self.sequences):
                assert self.current.sampled is not None
                self._following = self._feed(self.current.sampled, 0, ahead=1)
        self.current.tokens = self._receive()
        self.speculation.record(self.current.lengths, self.current.tokens, paused)
        return self.current.tokens

    def hand(self, row: int, token: int) -> None:
        """Give a row's sequence its next token of the current pass."""
        assert self.current is not None
        self.current.taken[row] += 1
        self._take(self.sequences[row], token)

    def _take(self, sequence: Sequence, token: int) -> None:
        try:
            if token == NONE:
                raise InputError(
                    "option_invalid",
                    f"sampler must choose tokens from 0 to {sequence.sampler.vocabulary - 1}, and constraint and "
                    "logits_processors must leave one with a finite logit; there is none to go on with",
                )
            sequence.take(token)
        except Exception as error:  # of a constraint
            sequence.fail(error)

    def _next_depth(self) -> int:
        depth, self._depth = self.speculation.depth() if self._depth is None else self._depth, None
        return depth

    def _feed(self, tokens: mx.array, depth: int, ahead: int = 0) -> Pass:
        """A pass over (B, 1) tokens and up to `depth` drafted ones. If it is interrupted all is as before.

        ahead: sampled tokens of each row that the host does not know yet. A row that ends with them is fed nothing.
        """
        assert self.cache is not None
        left = [max(0, sequence.left - ahead) for sequence in self.sequences]
        depth = min(depth, max(left) - 1)
        lengths = [min(1 + self.speculation.most(row, depth), n) for row, n in enumerate(left)]
        before, speculation = self.cache.copy(), self.speculation.copy()
        try:
            if depth:
                samplers = [sequence.sampler for sequence in self.sequences]
                tokens = self.speculation.propose(tokens, [min(1, n) for n in lengths], depth, samplers)
            return self._pass(tokens, lengths, before)
        except BaseException:
            self.cache, self.speculation = before, speculation
            raise

    def _pass(self, tokens: mx.array, lengths: list[int], before: Cache) -> Pass:
        """One pass over the first lengths[i] of row i's tokens (B, 1 + depth)."""
        assert self.cache is not None
        depth, position = tokens.shape[1] - 1, self.cache.position
        uneven = None if min(lengths) == 1 + depth else lengths
        hidden = self.model.hidden(tokens, self.cache, uneven, stepwise=depth > 0)
        if not depth:
            self.speculation.follow(tokens, hidden, lengths)
        made = Pass(
            tokens, lengths, hidden, self.model.logits(hidden), position, [0] * len(lengths), before if depth else None
        )
        if any(sequence.sampler.waits for sequence in self.sequences):
            mx.async_eval(made.logits, self.cache.held())
        else:
            self._sample(made)
        return made

    def _sample(self, made: Pass) -> None:
        """Sample the tokens of a pass, and submit everything that it leaves, so that no thread holds a graph."""
        assert self.cache is not None
        drafted = made.inputs[:, 1:] if made.depth else None
        made.sampled = self._peek(made.logits, drafted)
        made.finite = (mx.abs(made.logits) < mx.inf).all(-1)
        samplers = [sequence.sampler for sequence in self.sequences]
        if not made.depth:
            commit(samplers, made.sampled)
        held = [array for sampler in samplers for array in sampler.arrays()]
        mx.async_eval(made.sampled, made.finite, self.cache.held(), self.speculation.arrays(), held)

    def _peek(self, logits: mx.array, drafted: mx.array | None) -> mx.array:
        """`sampling.peek`; an error of one row's own functions ends that row."""
        if not any(sequence.sampler.alone for sequence in self.sequences):
            return peek([sequence.sampler for sequence in self.sequences], logits, drafted)
        sampled = []
        for row, sequence in enumerate(self.sequences):
            own = slice(row, row + 1)
            try:
                sampled.append(peek([sequence.sampler], logits[own], None if drafted is None else drafted[own]))
            except Exception as error:
                sequence.fail(error)
                sampled.append(mx.argmax(logits[own], axis=-1))
        return mx.concatenate(sampled)

    def _receive(self) -> list[list[int]]:
        """Wait for the current pass. The tokens of each row are its accepted drafts and one more."""
        assert self.current is not None
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
            assert self.cache is not None
            self.sequences[row].fail(not_finite(self.cache, row, self.model))
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

    # --- between passes ---

    def settle(self) -> None:
        """Bring cache, samplers and draft head to the tokens that the sequences have taken.

        The last token of a row is in the cache if the next pass is fed already, else that pass will bring it.
        """
        made, following = self.current, self._following
        if made is None or self.cache is None or not (made.tokens or made.depth or following):
            return  # nothing was taken of a pass that is under way
        self.current, self._following = following, None
        if following:
            self._depth = None  # which was that pass's
        if made.depth:
            accepted = [max(0, len(own) - 1) for own in made.tokens or [[] for _ in made.lengths]]
            kept = [n and 1 + min(m, k) for n, m, k in zip(made.lengths, made.taken, accepted, strict=True)]
            self.cache.rollback(made.position, kept)
            if made.sampled is not None:
                commit([s.sampler for s in self.sequences], made.sampled, made.taken)
            self.speculation.follow(made.inputs, made.hidden, kept)
        elif following and not all(made.taken):  # interrupted: the cache has a token that nobody took
            for row, token in enumerate(np.array(made.sampled)[:, 0].tolist()):
                if following.lengths[row] and not made.taken[row] and not self.sequences[row].error:
                    self._take(self.sequences[row], token)

    def join(self, sequences: Many[Sequence]) -> None:
        """Rows for sequences whose prompts are prefilled and whose first token is taken. No pass is under way."""
        assert self.current is None
        caches = [sequence.take_cache() for sequence in sequences]
        followers = [cache.follower for cache in caches if isinstance(cache.follower, DraftFollower)]
        self.speculation.join([sequence.drafts for sequence in sequences], followers)
        own = [self.cache] if self.cache else []
        self.cache = Cache.joined([*own, *caches]) if len(own) + len(caches) > 1 else caches[0]
        self.cache.follower = None
        self.sequences += sequences
        self._depth = None
        mx.async_eval(self.cache.held())

    def leave(self, rows: Many[int]) -> list[Cache]:
        """Take these rows out, each as a cache of its own with its draft head's. The pass under way goes on."""
        assert self.cache is not None
        stay = [row for row in range(len(self.sequences)) if row not in rows]
        left = []
        for row in rows:
            follower = self.speculation.follower_of(row)
            cache = self.cache if len(self.sequences) == 1 else self.cache.select([row])
            cache.follower = follower
            left.append(cache)
        self.speculation.select(stay)
        self.cache = self.cache.select(stay) if stay else None
        if self.current and stay:
            self.current.select(stay)
        self.current = self.current if stay else None
        self.sequences = [self.sequences[row] for row in stay]
        self._depth = None
        if self.cache:
            mx.async_eval(self.cache.held())
        return left


def not_finite(cache: Cache, row: int, model: Model) -> InputError:
    """The error of a row whose logits are not finite. It names the first layer whose cache is not finite."""
    layer = cache.first_not_finite(row)
    origin = "the last layer or the LM head made them so" if layer is None else f"they begin in or before layer {layer}"
    return InputError(
        "logits_not_finite",
        f"logits must be finite, and are not; {origin}. Activations left the range of {dtype_name(model.dtype)}, or "
        f"the checkpoint is damaged. Try {spelled('dtype', 'bfloat16')}, then float32, or convert it again. "
        "mlx_qwen35.doctor --model MODEL --probe shows the largest activation of each layer",
    )
