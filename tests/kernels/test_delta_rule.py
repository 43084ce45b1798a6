"""The gated delta rule: a float64 recurrence is the definition, the three forms in MLX agree with it up to rounding."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels.gated_delta import (
    DeltaState,
    DeltaWeights,
    chunked_rule,
    doubling_inverse,
    gated_delta,
    sequential_rule,
    step_rule,
    unit_lower_inverse,
)

B, Hk, r, Dk, Dv = 2, 2, 3, 24, 16
LENGTHS = (1, 2, 63, 75, 130, 500)
CHUNKS = (1, 2, 4, 8, 16, 32, 64)


def inputs(T: int, kind: str = "random", seed: int = 0) -> dict[str, np.ndarray]:
    """float64 inputs of a rule; `kind` says what is special about them."""
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(B, T, Hk, Dk)) for _ in range(2))
    beta = rng.uniform(0.05, 0.95, (B, T, Hk * r))
    log_decay = -np.exp(rng.uniform(np.log(1e-4), np.log(3.0), (B, T, Hk * r)))
    if kind == "correlated":  # nearly the same key again and again, written strongly, never forgotten
        k = rng.normal(size=(B, 1, Hk, Dk)) + 0.05 * k
        beta = rng.uniform(0.88, 0.92, beta.shape)
        log_decay = -np.exp(rng.uniform(np.log(1e-5), np.log(1e-3), beta.shape))
    if kind == "slow":
        log_decay = -np.exp(rng.uniform(np.log(1e-5), np.log(1e-2), beta.shape))
    if kind == "fast":
        log_decay = -np.exp(rng.uniform(np.log(1.0), np.log(20.0), beta.shape))
    if kind == "forgetting at once":
        log_decay = np.where(rng.uniform(size=beta.shape) < 0.2, -200.0, log_decay)
    q /= np.linalg.norm(q, axis=-1, keepdims=True) * Dk**0.5
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, state = rng.normal(size=(B, T, Hk * r, Dv)), 0.3 * rng.normal(size=(B, Hk * r, Dv, Dk))
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta, "state": state}
    return {name: array.astype(np.float32).astype(np.float64) for name, array in arrays.items()}


def recurrence(q, k, v, log_decay, beta, state):
    """float64, one head and one token at a time: decay, predict, correct, read. State (Dv, Dk)."""
    out, final = np.zeros_like(v), np.zeros_like(state)
    for b in range(B):
        for h in range(Hk * r):
            S = state[b, h].copy()
            for t in range(q.shape[1]):
                key, query = k[b, t, h // r], q[b, t, h // r]
                S *= np.exp(log_decay[b, t, h])
                S += np.outer(beta[b, t, h] * (v[b, t, h] - S @ key), key)
                out[b, t, h] = S @ query
            final[b, h] = S
    return out, final


def run(rule, arrays: dict[str, np.ndarray], **options):
    out, state = rule(**{name: mx.array(array.astype(np.float32)) for name, array in arrays.items()}, **options)
    assert out.dtype == state.dtype == mx.float32
    return np.array(out), np.array(state)


def worst(ours, exact) -> float:
    """Largest error of output or state relative to the largest value of that array; NaN counts as infinite."""
    errors = [
        np.nan_to_num(np.abs(a - b), nan=np.inf).max() / np.abs(b).max() for a, b in zip(ours, exact, strict=True)
    ]
    return float(max(errors))


@pytest.fixture(scope="module")
def exact():
    known = {}

    def of(T, kind):
        if (T, kind) not in known:
            arrays = inputs(T, kind)
            known[T, kind] = arrays, recurrence(**arrays)
        return known[T, kind]

    return of


KINDS = ("random", "correlated", "slow", "fast", "forgetting at once")


def chunked_tolerance(kind: str) -> float:
    """Running sums of decays and a triangular inverse cost a digit. A log decay of -200 in the middle of a chunk costs
    more: later tokens meet as exp(G_i - G_j) with G near -2000, which float32 keeps to 1e-4."""
    return 5e-4 if kind == "forgetting at once" else 2e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 2, 63, 130])
def test_sequential_rule_is_the_recurrence(T, kind, exact):
    arrays, want = exact(T, kind)
    assert worst(run(sequential_rule, arrays), want) < 1e-5  # float32 keeps 6e-8; a hundred roundings in a row


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_rule_is_the_recurrence(T, kind, exact):
    arrays, want = exact(T, kind)
    assert worst(run(chunked_rule, arrays), want) < chunked_tolerance(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunked_rule_of_every_chunk_length_is_the_recurrence(chunk, kind, exact):
    arrays, want = exact(75, kind)
    assert worst(run(chunked_rule, arrays, chunk=chunk), want) < chunked_tolerance(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_step_rule_is_one_step_of_the_sequential_rule(kind, exact):
    arrays, _ = exact(63, kind)
    outputs, state = [], arrays["state"]
    for t in range(63):
        step = {name: array[:, t : t + 1] for name, array in arrays.items() if name != "state"} | {"state": state}
        out, state = run(step_rule, step)
        outputs.append(out)
    assert worst((np.concatenate(outputs, axis=1), state), run(sequential_rule, arrays)) < 1e-5


def test_chunked_rule_continues_where_it_stopped(exact):
    arrays, want = exact(130, "slow")
    state, outputs, start = arrays["state"], [], 0
    for stop in (1, 33, 34, 97, 130):
        part = {name: array[:, start:stop] for name, array in arrays.items() if name != "state"} | {"state": state}
        out, state = run(chunked_rule, part)
        outputs.append(out)
        start = stop
    assert worst((np.concatenate(outputs, axis=1), state), want) < 2e-5


@pytest.mark.parametrize("rule", [sequential_rule, chunked_rule])
def test_decay_of_every_token_by_e_to_minus_200_gives_no_nan(rule):
    arrays = inputs(75) | {"log_decay": np.full((B, 75, Hk * r), -200.0)}
    want = recurrence(**arrays)
    assert np.isfinite(want[1]).all()
    assert worst(run(rule, arrays), want) < 2e-5


def lower(L: int, correlated: bool = False) -> np.ndarray:
    """(5, L, L) strictly lower triangular, as the chunked rule forms it."""
    k = np.random.default_rng(L).normal(size=(5, L, 32))
    k = k[:, :1] + 0.05 * k if correlated else k
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    return np.tril(0.9 * k @ k.swapaxes(1, 2), -1).astype(np.float32)


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("L", CHUNKS)
@pytest.mark.parametrize("invert", [doubling_inverse, unit_lower_inverse])
def test_triangular_inverse_equals_lapack(invert, L, correlated):
    A = lower(L, correlated)
    want = np.linalg.inv(np.eye(L) + A.astype(np.float64))
    assert np.abs(np.array(invert(mx.array(A))) - want).max() < 1e-5  # entries of the inverse are of order 1


def test_these_correlated_keys_are_where_a_neumann_series_explodes():
    A = lower(64, correlated=True)
    series, power = np.eye(64, dtype=np.float32), np.eye(64, dtype=np.float32)
    for _ in range(63):
        power = -power @ A
        series = series + power
    assert np.abs(series - np.linalg.inv(np.eye(64) + A.astype(np.float64))).max() > 1e3


# --- the whole core: conv, gates, norms around the rule ---------------------------------------------------------------

K, EPS = 4, 1e-6
C = 2 * Hk * Dk + Hk * r * Dv


def core_inputs(T: int, seed: int = 1):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return mx.array(rng.normal(size=shape).astype(np.float32))

    Hv = Hk * r
    projected = draw(B, T, C), draw(B, T, Hv * Dv), draw(B, T, Hv), draw(B, T, Hv)
    weights = DeltaWeights(draw(K, C), draw(Hv), draw(Hv), 1 + 0.1 * draw(Dv), EPS)
    return projected, weights, DeltaState(draw(B, K - 1, C), 0.3 * draw(B, Hv, Dv, Dk))


def core_in_float64(projected, weights, memory):
    """The formulas of the reference, in numpy float64, for rows without padding."""
    qkv, z, b, a = (np.array(x, np.float64) for x in projected)
    conv, A_log, dt_bias, norm = (np.array(x, np.float64) for x in weights[:4])
    T = qkv.shape[1]
    tokens = np.concatenate([np.array(memory.conv_state, np.float64), qkv], axis=1)
    mixed = np.stack([(tokens[:, t : t + K] * conv).sum(1) for t in range(T)], axis=1)
    mixed /= 1 + np.exp(-mixed)
    q, k, v = np.split(mixed, [Hk * Dk, 2 * Hk * Dk], axis=-1)
    q, k, v = q.reshape(B, T, Hk, Dk), k.reshape(B, T, Hk, Dk), v.reshape(B, T, Hk * r, Dv)
    q /= np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6) * Dk**0.5
    k /= np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    log_decay = -np.exp(A_log) * np.logaddexp(0, a + dt_bias)
    out, state = recurrence(q, k, v, log_decay, 1 / (1 + np.exp(-b)), np.array(memory.recurrent_state, np.float64))
    z = z.reshape(out.shape)
    out = out / np.sqrt((out * out).mean(-1, keepdims=True) + EPS) * norm * z / (1 + np.exp(-z))
    return out.reshape(B, T, -1), tokens[:, -(K - 1) :], state


@pytest.mark.parametrize("scale", [1, 1e-3])  # at 1e-3 the epsilons of the norms are a part of the result
@pytest.mark.parametrize("T", [1, 2, 3, 63, 130])
def test_core_is_the_formulas_of_the_reference(T, scale):
    projected, weights, memory = core_inputs(T)
    projected = (scale * projected[0], *projected[1:])
    memory = DeltaState(scale * memory.conv_state, scale * memory.recurrent_state)
    out, new = gated_delta(*projected, weights, memory)
    want_out, want_window, want_state = core_in_float64(projected, weights, memory)
    assert np.abs(np.array(out) - want_out).max() < 1e-4  # the norm of small outputs magnifies their rounding
    assert np.abs(np.array(new.conv_state) - want_window).max() == 0
    assert np.abs(np.array(new.recurrent_state) - want_state).max() < 1e-5


@pytest.mark.parametrize("T", [2, 3, 40])
def test_padding_of_the_core_leaves_memory_as_the_real_tokens_left_it(T):
    projected, weights, memory = core_inputs(T)
    for lengths in ([T, T - 1], [0, 1], [1, 0]):
        valid = mx.arange(T) < mx.array(lengths)[:, None]
        spoiled = [mx.where(valid[..., None], x, mx.nan) for x in projected]
        out, new = gated_delta(*spoiled, weights, memory, mx.array(lengths, mx.int32))
        for row, length in enumerate(lengths):
            own = DeltaState(*(x[row : row + 1] for x in memory))
            if length:
                alone = [x[row : row + 1, :length] for x in projected]
                want, own = gated_delta(*alone, weights, own)
                assert mx.abs(out[row : row + 1, :length] - want).max().item() < 1e-5
            assert mx.array_equal(new.conv_state[row : row + 1], own.conv_state)
            assert mx.abs(new.recurrent_state[row : row + 1] - own.recurrent_state).max().item() < 1e-6


def test_zero_queries_and_keys_give_no_nan():
    projected, weights, memory = core_inputs(5)
    out, new = gated_delta(mx.zeros_like(projected[0]), *projected[1:], weights, memory)
    assert mx.isfinite(out).all().item() and mx.isfinite(new.recurrent_state).all().item()
