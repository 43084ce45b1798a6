"""How probable a text is: the log-probability of each token, given those before it.

The prompt goes through the model in chunks, as in a prefill, and their hidden states through the LM head in pieces. The
logits of the whole text are never in memory: of the 4B they would be 1 MB a token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.budget.chunk import prefill_bytes
from mlx_qwen35.budget.plan import SAMPLING_ARRAYS, most_tokens, this_machine
from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.errors import InputError
from mlx_qwen35.kernels.attention import attention_impl
from mlx_qwen35.machine.memory import set_limits
from mlx_qwen35.machine.process import LOCK, refuse_fork
from mlx_qwen35.measure.predictions import Predictions
from mlx_qwen35.model.model import Model, not_finite
from mlx_qwen35.model.pace import Pace
from mlx_qwen35.options import spelled
from mlx_qwen35.prompt.processor import Processor
from mlx_qwen35.values import from_load, shown, whole

Progress = Callable[[int, int], object]  # called with the tokens done and the tokens in all
PIECE_ARRAYS = 4  # float32, of a piece's logits, at a time


@dataclass(frozen=True, eq=False)
class Score:
    """The log-probabilities of tokens, each given all tokens before it.

    context: the tokens that are read and not scored, at least 1. tokens: the n scored ones. logprobs: (n,) float32,
    natural logarithms, by float32 softmax over all rows of the LM head. greedy: (n,) bool, whether each token is the
    most probable one in its place.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: np.ndarray
    greedy: np.ndarray

    @property
    def sum(self) -> float:
        """The log-probability of all scored tokens together."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp(-sum / n)"""
        return float(np.exp(-self.sum / len(self.tokens)))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would give these tokens."""
        return bool(self.greedy.all())


def score(
    model: Model,
    processor: Processor,
    text: str | Sequence[int],
    continuation: str | Sequence[int] | None = None,
    *,
    prefill_step_size: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Score:
    """Score a text, or a continuation of one. Memory beyond the cache does not grow with the length.

    Args:
        model, processor: from `load`.
        text: raw text, whose control tokens are such, or token ids. All tokens but the first are scored.
        continuation: of the same kind. Then its tokens alone are scored, and `text` is their context. Strings are
            encoded together: what both have in one token, as a blank at the end of `text`, is scored.
        prefill_step_size: tokens of a chunk (default: by memory, context and chip).
        progress: called with the tokens done, and the tokens in all.

    Raises InputError for a text of fewer than 2 tokens, a continuation without one, tokens that the tokenizer does not
    have or that stand for images, and a text that context or memory has no room for.
    """
    refuse_fork()
    from_load("model", model, Model)
    from_load("processor", processor, Processor)
    tokens, first = _tokens(processor, text, continuation)
    with LOCK:
        set_limits(model.memory_limit)
        chunk = _chunk(model, len(tokens) - 1, prefill_step_size)
        found = predict(model, tokens, first, chunk, progress)
    return _score(tokens, first, found)


def likelihoods(model: Model, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
    """Score several continuations of one context, as `score` does each, while the context is read once.

    context, continuations: checked token ids, at least one each. Memory is that of `score` with the longest
    continuation: what was read of the context is shared. Raises InputError as `score` does.
    """
    refuse_fork()
    if not context or not all(continuations):
        raise InputError("text_too_short", "a context and each of its continuations must have at least 1 token")
    read = [[*context, *own] for own in continuations]
    first, length = len(context), max(map(len, read)) - 1
    with LOCK:
        set_limits(model.memory_limit)
        chunk = _chunk(model, length, None)
        cache = model.make_cache()
        cache.reserve(length)
        for start in range(0, first - 1, chunk):
            model.hidden(mx.array([list(context[start : min(start + chunk, first - 1)])]), cache, pace=Pace())
            cache.evaluate()
            mx.clear_cache()
        return [_score(own, first, predict(model, own[first - 1 :], 1, chunk, cache=cache.copy())) for own in read]


def _score(tokens: Sequence[int], first: int, found: Predictions) -> Score:
    """Of tokens[first:], by their predictions."""
    targets = tuple(tokens[first:])
    return Score(tuple(tokens[:first]), targets, found.logprobs.astype(np.float32), found.best == np.array(targets))


def predict(
    model: Model,
    tokens: Sequence[int],
    first: int,
    chunk: int,
    progress: Progress = lambda done, total: None,
    cache: Cache | None = None,
) -> Predictions:
    """The predictions of tokens[first:], each from all tokens before it; first is at least 1.

    chunk: tokens that go through the layers together. cache: of what stands before the tokens. InputError for logits
    that are not finite.
    """
    fed, targets = list(tokens[:-1]), np.array(tokens[first:])
    cache, found = model.make_cache() if cache is None else cache, Predictions(len(targets))
    cache.reserve(len(fed))
    piece = _piece(model, chunk)
    for start in range(0, len(fed), chunk):
        hidden = model.hidden(mx.array([fed[start : start + chunk]]), cache, pace=Pace())[0]
        cache.evaluate()
        mx.eval(hidden)
        mx.clear_cache()
        done = start + len(hidden)
        for begin in range(max(start, first - 1), done, piece):
            end = min(begin + piece, done)
            at = slice(begin + 1 - first, end + 1 - first)
            logits = model.logits(hidden[begin - start : end - start], model.active(cache)).astype(mx.float32)
            if not (mx.abs(logits) < mx.inf).all().item():
                raise not_finite(model, cache)
            found.add(at, 0, logits, targets[at])
        progress(done, len(fed))
    return found


def _piece(model: Model, chunk: int) -> int:
    """How many tokens go through the LM head together, in the memory that a chunk in the layers or sampling takes."""
    config = model.held
    impl = attention_impl(config.head_dim, model.dtype)
    room = prefill_bytes(config, chunk, chunk, model.dtype.size, impl)
    return max(room, SAMPLING_ARRAYS * 4 * config.vocab_size) // (PIECE_ARRAYS * 4 * config.vocab_size)


def _chunk(model: Model, length: int, given: int | None) -> int:
    """Tokens of a chunk. InputError where context or memory has no room for `length` tokens."""
    window = model.config.max_position_embeddings
    if length > window:
        raise InputError(
            "context_length_exceeded",
            f"a text must have at most {window + 1} tokens to be scored, those of the context and one more; this one "
            f"has {length + 1}. Score it in windows",
        )
    chunk = model.chunk(length) if given is None else min(whole("prefill_step_size", given, 1), length)
    machine = this_machine(model.held, model.dtype, model.memory_limit, model.kv)
    room = min(model.room, most_tokens(model.held, machine, chunk, [0]))
    if length > room:
        raise InputError(
            "memory_exceeded",
            f"memory has room for a context of {room:,} tokens; the text has {length + 1:,}. Score it in windows, "
            f"choose a folder with fewer bits, or raise {spelled('memory_limit')}",
        )
    return chunk


# --- what is scored ---------------------------------------------------------------------------------------------------


def split(processor: Processor, text: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of a raw text that are not scored, and those of its continuation that are; see `score`."""
    tokens, first = _tokens(processor, text, continuation)
    return tokens[:first], tokens[first:]


def _tokens(processor: Processor, text: Any, continuation: Any) -> tuple[list[int], int]:
    """All tokens, and how many of them are not scored."""
    if continuation is None:
        tokens = _encoded(processor, "text", text)
        if len(tokens) < 2:
            raise InputError(
                "text_too_short", f"the text must be at least 2 tokens long, got {len(tokens)}: the first one predicts"
            )
        return tokens, 1
    if isinstance(text, str) != isinstance(continuation, str):
        raise InputError("prompt_invalid", "text and continuation must be both text, or both lists of token ids")
    before = _encoded(processor, "text", text)
    if isinstance(text, str):
        tokens = _encoded(processor, "text", text + continuation)
    else:
        tokens = [*before, *_encoded(processor, "continuation", continuation)]
    first = sum(takewhile(bool, map(eq, before, tokens)))
    if not 0 < first < len(tokens):
        raise InputError(
            "text_too_short",
            f"text and continuation must have at least 1 token each; they have {first} and {len(tokens) - first}. For "
            "no context give the end token",
        )
    return tokens, first


def _encoded(processor: Processor, name: str, given: Any) -> list[int]:
    if isinstance(given, str):
        return list(processor.encode_text(given).tokens) if given else []
    listed = given.tolist() if isinstance(given, np.ndarray | mx.array) else given
    if not isinstance(listed, list | tuple) or any(isinstance(item, Mapping) for item in listed):
        raise InputError(
            "prompt_invalid",
            f"{name} must be text or a list of token ids, got {shown(given)}; messages become text by "
            "processor.render(messages)",
        )
    return processor.check_tokens(listed)
