"""The one loop: read the prompts in chunks, then draw, feed, draw. It knows ids and logits, never text."""

from collections.abc import Callable, Collection, Iterator, Sequence

import mlx.core as mx

from mlx_qwen35.cache import Cache
from mlx_qwen35.errors import InputError
from mlx_qwen35.model import Model
from mlx_qwen35.sampling import Sampler

CLEAR_EVERY = 256  # steps between returning MLX's unused buffers to the system


def read(
    model: Model,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    step: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> mx.array:
    """Feed prompts of any lengths, one a row, in chunks of `step` columns; (B, D), each row's last hidden.

    progress is told the number of tokens after each chunk.
    """
    longest = max(map(len, prompts))
    last: mx.array | None = None
    for start in range(0, longest, step):
        chunk = [row[start : start + step] for row in prompts]
        width = max(map(len, chunk))
        lengths = [len(row) for row in chunk]
        padded = mx.array([[*row, *[0] * (width - len(row))] for row in chunk])
        hidden = model.hidden(padded, cache, None if min(lengths) == width else lengths)
        ends = mx.array([max(0, n - 1) for n in lengths])[:, None, None]
        here = mx.take_along_axis(hidden, ends, axis=1)[:, 0]
        last = here if last is None else mx.where(mx.array([n > 0 for n in lengths])[:, None], here, last)
        cache.evaluate()
        mx.eval(last)
        mx.clear_cache()
        progress(sum(lengths))
    return last


def decode(
    model: Model,
    cache: Cache,
    hidden: mx.array,
    sampler: Sampler,
    limits: Sequence[int],
    stop_ids: Collection[int],
    finished: Callable[[int], bool] = lambda row: False,
) -> Iterator[list[int | None]]:
    """Draw tokens after `read` and yield one for each row a step, None for rows that have ended.

    A row ends with a stop id, which is yielded, at its limit, or when finished(row) says so after its token was
    yielded. The next step is under way while a token is looked at. So the cache has read every token that was yielded,
    except, where all rows reached their limits, the last ones.

    Raises InputError when the first logits are not finite.
    """
    logits = model.logits(hidden)
    if not mx.isfinite(logits).all().item():
        raise InputError(
            "the logits of this checkpoint are not finite: it is damaged, or its values overflow this dtype. "
            "Try --dtype bfloat16 or float32, or convert it again"
        )
    running = [limit > 0 for limit in limits]
    tokens = sampler.draw(logits)
    mx.async_eval(tokens)
    for count in range(1, max(limits) + 1):
        following = None
        if count < max(limits):
            following = sampler.draw(_feed(model, cache, tokens, running))
            mx.async_eval(following)
        drawn = tokens.tolist()
        yield [token if active else None for token, active in zip(drawn, running, strict=True)]
        running = [
            active and token not in stop_ids and count < limit and not finished(row)
            for row, (active, token, limit) in enumerate(zip(running, drawn, limits, strict=True))
        ]
        if following is None or not any(running):
            return
        tokens = following
        if count % CLEAR_EVERY == 0:
            mx.clear_cache()


def _feed(model: Model, cache: Cache, tokens: mx.array, running: Sequence[bool]) -> mx.array:
    """One token a row -> (B, V) logits; rows that have ended read nothing."""
    lengths = None if all(running) else [int(active) for active in running]
    return model.logits(model.hidden(tokens[:, None], cache, lengths)[:, 0])
