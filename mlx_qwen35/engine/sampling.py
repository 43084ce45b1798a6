"""Logits -> tokens.

The noise of a sample depends on its seed and on the token's position in its sequence alone. So a seed gives the same
text alone, in a batch, and with drafts.

A sequence may have constraints and the caller's own functions. They are told tokens by number, so such a row is
sampled after its last token is known on the host; the pass that gives its logits need not wait.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.engine.constraints.bits import holds, restricted
from mlx_qwen35.engine.constraints.door import Door
from mlx_qwen35.engine.distribution import normalise, penalise, warp
from mlx_qwen35.engine.presets import Sampling, check_seed
from mlx_qwen35.errors import InputError

Bits = list[np.ndarray | None]  # (W,) uint32 of each place, 32 tokens a word; None: any token
NO_TOKEN = -1  # in place of a token where none is allowed, or the caller's sampler chose none of the vocabulary
Processor = Callable[[mx.array, mx.array], mx.array]  # tokens (n,), logits (1, V) -> logits, as in mlx-lm
Choice = Callable[[mx.array], mx.array]  # log-probabilities (1, V) -> token (1,), as in mlx-lm


def noise(vocabulary: int, seed: int, position: int) -> mx.array:
    """(V,) float32 standard Gumbel noise, a function of seed and position, both below 2**32."""
    return mx.random.gumbel((vocabulary,), key=_key(seed, position))


def draws_xtc(sampling: Sampling, seed: int, position: int) -> mx.array:
    """() whether XTC applies to a token, a function of seed and position. It draws beside the token's `noise`."""
    _, own = mx.random.split(_key(seed, position))
    return mx.random.uniform(key=own) < sampling.xtc_probability


def _key(seed: int, position: int) -> mx.array:
    return mx.random.key(seed << 32 | position)


class Sampler:
    """Samples the tokens of one sequence and counts them for the penalties.

    Args:
        seed: 0 to 2**32 - 1.
        position: the next token's position in the sequence.
        vocabulary: the tokenizer's size, see `distribution.process`.
        processors, choose: the caller's logits_processors and sampler.
        door: what tokens are allowed; None: any.
        prompt: the tokens before, for the processors.
    """

    def __init__(
        self,
        sampling: Sampling,
        seed: int,
        position: int,
        vocabulary: int,
        *,
        processors: Sequence[Processor] = (),
        choose: Choice | None = None,
        door: Door | None = None,
        prompt: Sequence[int] = (),
    ):
        self.sampling, self.vocabulary = sampling, vocabulary
        self.seed, self.position = check_seed(seed), position
        self.processors, self.choose, self.door = tuple(processors), choose, door
        self.counts: mx.array | None = None  # (1, V), if there are penalties
        self._tokens = list(prompt) if self.processors else []
        self._width = 0  # of logits: V
        self._noise: dict[int, mx.array] = {}  # (V,) by position, for the next tokens
        self._allowed: list[np.ndarray | Exception | None] = []  # the bits that the next tokens were sampled with

    def needs_tokens(self, ahead: int) -> bool:
        """Whether one of the `ahead` tokens behind those that the host knows can be sampled only once it knows more."""
        return bool(self.processors or (self.door and self.door.free < ahead))

    @property
    def separate(self) -> bool:
        """Whether its row is not sampled together with others."""
        return bool(self.processors) or self.choose is not None

    def no_token(self) -> InputError:
        """The error where there is none to go on with."""
        most = self.vocabulary - 1
        if self.choose:
            return InputError("option_invalid", f"sampler must choose a token from 0 to {most} that is not forbidden")
        return InputError(
            "option_invalid",
            f"a token from 0 to {most} must be left to go on with; constraint, logits_processors, logit_bias and the "
            "form that was asked for leave none together",
        )

    def accept(self, token: int) -> None:
        """The host knows the next token of the sequence."""
        if self.processors:
            self._tokens.append(token)
        if self.door:
            bits = self._allowed.pop(0) if self._allowed else None
            if isinstance(bits, Exception):
                raise bits
            if bits is not None and not holds(bits, token):
                raise self.no_token()  # a bias of minus infinity forbids the rest
            self.door.accept(token)

    def noise(self, position: int) -> mx.array:
        """The same array for a drafted token and for the sampled one."""
        if position not in self._noise:
            self._noise[position] = noise(self._width, self.seed, position)
        return self._noise[position]

    def counted(self, drafted: mx.array | None, m: int) -> mx.array:
        """(1, V) how often each token was generated, plus the first m of the drafted tokens (1, ...)."""
        counts = mx.zeros((1, self._width)) if self.counts is None else self.counts
        return counts if drafted is None or m == 0 else counts.at[mx.zeros((1, 1), mx.int32), drafted[:, :m]].add(1.0)

    def arrays(self) -> list[mx.array]:
        """What it holds."""
        return [*self._noise.values(), *([] if self.counts is None else [self.counts])]

    def clear(self) -> None:
        """Let go of every array, at the end of the sequence."""
        self.counts, self._noise = None, {}

    def set_width(self, width: int) -> None:
        """Logits have this many columns."""
        self._width = width

    def commit(self, tokens: mx.array, count: int | None = None) -> None:
        """Append the first `count` of the tokens (1, n); None: all."""
        n = tokens.shape[1]
        self.position += n if count is None else count
        near = range(self.position, self.position + n)
        self._noise = {position: noise for position, noise in self._noise.items() if position in near}
        if self.sampling.penalises:
            each = mx.ones((1, n)) if count is None else (mx.arange(n) < count).astype(mx.float32)[None]
            self.counts = self.counted(None, 0).at[mx.zeros((1, 1), mx.int32), tokens].add(each)

    def process(self, logits: mx.array, drafted: Sequence[int]) -> mx.array:
        """(n, V) penalised logits, each behind one more of the drafted tokens -> what the caller's processors leave."""
        rows = list(mx.split(logits, logits.shape[0]))
        for i in range(len(rows)):
            tokens = mx.array([*self._tokens, *drafted[:i]])
            for number, processor in enumerate(self.processors):
                rows[i] = _processed(processor(tokens, rows[i]), rows[i].shape, number)
        return mx.concatenate(rows)

    def bits(self, drafted: Sequence[int], n: int) -> Bits:
        """The tokens allowed at each of the next n places, between which the drafted tokens stand.

        A place behind a drafted token that is forbidden is never used. What goes wrong behind a drafted token counts
        only if that token is taken: `accept` raises it then.
        """
        found: Bits = [None] * n
        self._allowed = [None] * n
        if self.door is None or self.door.free >= n:
            return found
        accepted = 0
        try:
            for place in range(n):
                found[place] = self._allowed[place] = bits = self.door.bits()
                if bits is not None and not bits.any():
                    raise self.no_token()
                if place == len(drafted) or not (bits is None or holds(bits, drafted[place])):
                    break
                self.door.accept(drafted[place])
                accepted += 1
        except Exception as error:
            if not accepted:
                raise
            self._allowed[accepted] = error
        finally:
            if accepted:
                self.door.rollback(accepted)
        return found


def _processed(logits: Any, shape: tuple[int, ...], number: int) -> mx.array:
    """What one of the caller's logits_processors returned."""
    if not isinstance(logits, mx.array) or logits.shape != shape:
        got = f"of shape {logits.shape}" if isinstance(logits, mx.array) else type(logits).__name__
        raise InputError(
            "option_invalid",
            f"logits_processors must return an array of MLX of shape {shape}; number {number} returned {got}",
        )
    return logits


def sample(samplers: Sequence[Sampler], logits: mx.array) -> mx.array:
    """(B, V) -> (B,) the next token of each sequence, committed; lazy."""
    tokens = peek(samplers, logits[:, None], bits=[sampler.bits((), 1) for sampler in samplers])
    commit(samplers, tokens)
    return tokens[:, 0]


def peek(
    samplers: Sequence[Sampler],
    logits: mx.array,
    drafted: mx.array | None = None,
    *,
    drafting: bool = False,
    bits: Sequence[Bits] = (),
) -> mx.array:
    """(B, n, V) -> (B, n) the next tokens, not committed; lazy.

    drafted: (B, m) tokens assumed to come first. The last of the n tokens follows all of them, the one before it all
    but the last, and so on. drafting: the logits are the draft head's, whose tokens nothing restricts. bits: the
    tokens allowed at each of the n places of each row, see `Sampler.bits`; empty: any.
    """
    plain = drafting or not any(sampler.separate for sampler in samplers)
    if plain and all(sampler.sampling == samplers[0].sampling for sampler in samplers):
        return _peek(samplers, logits, drafted, drafting, bits)
    rows = [slice(row, row + 1) for row in range(len(samplers))]
    return mx.concatenate(
        [_peek(samplers[r], logits[r], None if drafted is None else drafted[r], drafting, bits[r]) for r in rows]
    )


def commit(samplers: Sequence[Sampler], tokens: mx.array, counts: Sequence[int] | None = None) -> None:
    """Append the first counts[i] of row i's tokens (B, n) to its sequence; None appends all."""
    for row, sampler in enumerate(samplers):
        own = tokens if len(samplers) == 1 else tokens[row : row + 1]
        sampler.commit(own, None if counts is None else counts[row])


def _peek(
    samplers: Sequence[Sampler], logits: mx.array, drafted: mx.array | None, drafting: bool, bits: Sequence[Bits]
) -> mx.array:
    """`peek` for rows of the same sampling."""
    first, sampling = samplers[0], samplers[0].sampling
    B, n, V = logits.shape
    before = 1 - n + (0 if drafted is None else drafted.shape[1])  # drafted tokens before the first of the n
    for sampler in samplers:
        sampler.set_width(V)
    flat, counts = logits.reshape(B * n, V), None
    if sampling.penalises and (drafted is not None or any(sampler.counts is not None for sampler in samplers)):
        guesses = [None if drafted is None else drafted[row : row + 1] for row in range(B)]
        all_counts = [s.counted(d, before + i) for s, d in zip(samplers, guesses, strict=True) for i in range(n)]
        counts = all_counts[0] if len(all_counts) == 1 else mx.concatenate(all_counts)
    flat = penalise(flat, sampling, counts, first.vocabulary)
    own = first.separate and not drafting
    if own and first.processors:
        flat = first.process(flat, [] if drafted is None else np.array(drafted[0]).tolist())
    if any(allowed is not None for row in bits for allowed in row):
        flat = restricted(flat, [allowed for row in bits for allowed in row])
    if own and first.choose:
        tokens = mx.concatenate([_chosen(first.choose(normalise(row))) for row in mx.split(flat, n)])
    elif sampling.temp == 0:
        tokens = mx.argmax(flat, axis=-1)
    else:
        places = [(s, s.position + before + i) for s in samplers for i in range(n)]
        drawn = [draws_xtc(sampling, s.seed, place) for s, place in places] if sampling.xtc_probability else []
        gumbel = mx.stack([s.noise(place) for s, place in places])
        tokens = mx.argmax(warp(flat, sampling, mx.stack(drawn) if drawn else None) + gumbel, axis=-1)
    if own:
        valid = (tokens >= 0) & (tokens < (first.vocabulary or V)) & (flat.max(-1) > -mx.inf)
        tokens = mx.where(valid, tokens.astype(mx.int32), NO_TOKEN)
    return tokens.reshape(B, n)


def _chosen(token: Any) -> mx.array:
    """What the caller's sampler returned, as (1,)."""
    if not isinstance(token, mx.array) or token.size != 1 or not mx.issubdtype(token.dtype, mx.integer):
        raise InputError(
            "option_invalid", f"sampler must return one token, an array of MLX of shape (1,) and integers; got {token}"
        )
    return token.reshape(1).astype(mx.int32)
