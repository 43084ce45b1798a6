"""Logits -> the distribution that a token is sampled from."""

import math

import mlx.core as mx

from mlx_qwen35.engine.presets import Sampling


def process(
    logits: mx.array,
    sampling: Sampling,
    counts: mx.array | None = None,
    vocabulary: int = 0,
    drawn: mx.array | None = None,
) -> mx.array:
    """(B, V) logits -> (B, V) float32 log-probabilities to sample from, -inf where cut off.

    In transformers' order: bias and penalties, temperature, top-k, top-p, min-p, each of the distribution before it.
    XTC comes last.

    Args:
        counts: (B, V) how often each token was generated; None for no token or no penalty.
        vocabulary: the tokenizer's size. The LM head's rows beyond it are padding, never sampled; 0: there are none.
        drawn: (B,) whether XTC applies, see `sampling.draws_xtc`; None: to no row.
    """
    return warp(penalise(logits, sampling, counts, vocabulary), sampling, drawn)


def warp(logits: mx.array, sampling: Sampling, drawn: mx.array | None = None) -> mx.array:
    """(B, V) float32 logits -> log-probabilities after temperature, top-k, top-p, min-p and XTC."""
    if sampling.temp == 0:
        best = mx.argmax(logits, axis=-1, keepdims=True)
        return mx.where(mx.arange(logits.shape[-1]) == best, 0.0, -mx.inf)
    logits = logits / sampling.temp
    if 0 < sampling.top_k < logits.shape[-1]:
        ids = mx.argpartition(-logits, kth=sampling.top_k - 1, axis=-1)[..., : sampling.top_k]
        best = _cut(normalise(mx.take_along_axis(logits, ids, axis=-1)), sampling)
        logprobs = mx.put_along_axis(mx.full(logits.shape, -mx.inf), ids, best, axis=-1)
    else:
        logprobs = _cut(normalise(logits), sampling)
    return logprobs if drawn is None else mx.where(drawn[:, None], _without_top_choices(logprobs, sampling), logprobs)


def penalise(logits: mx.array, sampling: Sampling, counts: mx.array | None, vocabulary: int) -> mx.array:
    """Bias and penalties, in float32. The vocabulary's padding becomes -inf."""
    logits = logits.astype(mx.float32)
    if 0 < vocabulary < logits.shape[-1]:
        logits = mx.where(mx.arange(logits.shape[-1]) < vocabulary, logits, -mx.inf)
    if sampling.logit_bias:
        ids = mx.array(list(sampling.logit_bias))
        logits = logits.at[:, ids].add(mx.array(list(sampling.logit_bias.values()), mx.float32))
    if counts is None or not sampling.penalises:
        return logits
    generated, factor = counts > 0, sampling.repetition_penalty
    scaled = mx.where(logits < 0, logits * factor, logits / factor)
    logits = mx.where(generated, scaled, logits)
    return logits - sampling.presence_penalty * generated - sampling.frequency_penalty * counts


def normalise(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _cut(logprobs: mx.array, sampling: Sampling) -> mx.array:
    """Top-p, then min-p, each normalised again. A row's most probable token always stays."""
    if sampling.top_p < 1:
        order = mx.argsort(logprobs, axis=-1)
        sums = mx.cumsum(mx.take_along_axis(mx.exp(logprobs), order, axis=-1), axis=-1)  # from the least probable on
        stays = (sums > 1 - sampling.top_p) | (mx.arange(order.shape[-1]) == order.shape[-1] - 1)
        stays = mx.put_along_axis(mx.zeros(order.shape, mx.bool_), order, stays, axis=-1)
        logprobs = normalise(mx.where(stays, logprobs, -mx.inf))
    if sampling.min_p > 0:
        least = logprobs.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
        drops = logprobs < least
        if (keep := sampling.min_tokens_to_keep) > 1:
            best = mx.argpartition(-logprobs, kth=min(keep, logprobs.shape[-1]) - 1, axis=-1)[..., :keep]
            drops = mx.put_along_axis(drops, best, mx.array(False), axis=-1)
        logprobs = normalise(mx.where(drops, -mx.inf, logprobs))
    return logprobs


def _without_top_choices(logprobs: mx.array, sampling: Sampling) -> mx.array:
    """XTC: of the tokens above the threshold only the least probable one stays, and those that are exempt."""
    probabilities = mx.exp(logprobs)
    top = mx.where(probabilities > sampling.xtc_threshold, probabilities, mx.inf)
    excluded = probabilities > top.min(axis=-1, keepdims=True)
    if exempt := sampling.xtc_special_tokens:
        excluded[..., mx.array(list(exempt))] = False
    return normalise(mx.where(excluded, -mx.inf, logprobs))
