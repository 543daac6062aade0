"""What every mechanism must satisfy; a new one is tested by being registered."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw, every_mechanism, mechanism_pattern, oracle_key

import combiner
from combiner import reference
from combiner.attention import registry

LENGTH = 23
SCATTERED = jnp.asarray(np.random.default_rng(0).random((2, LENGTH)) > 0.4)


def with_gradients(*attends):
    """Of each function the output, and the gradients for a random cotangent; one program: compiling takes the time."""

    def run(q, k, v):
        (cotangent,) = draw(*q.shape, count=1, seed=7, dtype=q.dtype)
        outs = []
        for attend in attends:
            out, pull_back = jax.vjp(attend, q, k, v)
            outs.append((out, *pull_back(cotangent)))
        return outs

    return jax.jit(run)


@causal_or_not
@pytest.mark.parametrize(
    ('dtype', 'valid'),
    [(jnp.float32, None), (jnp.float32, SCATTERED), (jnp.bfloat16, SCATTERED)],
    ids=['float32', 'float32-padded', 'bfloat16-padded'],
)
@every_mechanism
def test_fast_equals_oracle_with_gradients(name, hyper, valid, dtype, causal):
    q, k, v = draw(2, LENGTH, 2, 8, dtype=dtype)
    pattern = mechanism_pattern(name, LENGTH, causal=causal, hyper=hyper)

    def fast(q, k, v):
        return combiner.attend(q, k, v, name, causal=causal, valid=valid, **hyper)

    def oracle(q, k, v):
        return reference.attend(q, k, v, pattern, valid=valid, **oracle_key(hyper))

    actual, expected = with_gradients(fast, oracle)(q, k, v)
    assert actual[0].dtype == dtype
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, TOLERANCE[dtype])


@causal_or_not
@every_mechanism
def test_any_length(name, hyper, causal):
    @jax.jit
    def differences():
        found = []
        for length in (1, 2, 4, 5, 6, 17):
            q, k, v = draw(1, length, 1, 4)
            pattern = mechanism_pattern(name, length, causal=causal, hyper=hyper)
            expected = reference.attend(q, k, v, pattern, **oracle_key(hyper))
            found.append(abs(combiner.attend(q, k, v, name, causal=causal, **hyper) - expected).max())
        return jnp.stack(found)

    assert (differences() < TOLERANCE[jnp.float32]).all()


@every_mechanism
def test_the_future_is_not_seen(name, hyper):
    before, after = draw(1, LENGTH, 2, 8), draw(1, LENGTH, 2, 8, seed=1)
    attend = jax.jit(lambda q, k, v: combiner.attend(q, k, v, name, causal=True, **hyper))
    expected = attend(*before)
    for now in range(LENGTH - 1):
        past = jnp.arange(LENGTH)[:, None, None] <= now
        actual = attend(*(jnp.where(past, old, 100 * new) for old, new in zip(before, after, strict=True)))
        np.testing.assert_array_equal(actual[:, : now + 1], expected[:, : now + 1], f'position {now}')


@causal_or_not
@every_mechanism
def test_nan_in_padding_does_not_spread(name, hyper, causal):
    q, k, v = draw(2, LENGTH, 2, 8)
    spoilt = [jnp.where(SCATTERED[..., None, None], x, jnp.nan) for x in (q, k, v)]
    run = with_gradients(lambda q, k, v: combiner.attend(q, k, v, name, causal=causal, valid=SCATTERED, **hyper))
    for actual, expected in zip(run(*spoilt)[0], run(q, k, v)[0], strict=True):
        np.testing.assert_array_equal(actual, expected)


@causal_or_not
@every_mechanism
def test_padding_alone_gives_zeros_and_finite_gradients(name, hyper, causal):
    q, k, v = draw(2, LENGTH, 2, 8)
    valid = jnp.arange(2)[:, None] == jnp.zeros((1, LENGTH))

    def attend(q, k, v):
        return combiner.attend(q, k, v, name, causal=causal, valid=valid, **hyper)

    ((out, *gradients),) = with_gradients(attend)(q, k, v)
    np.testing.assert_array_equal(out[1], 0)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[1], 0)
        assert jnp.isfinite(gradient).all()
        assert (gradient[0] != 0).any()


@causal_or_not
@every_mechanism
def test_padding_changes_nothing(name, hyper, causal):
    sizes = {size: 5 for size in ('block', 'columns') if size in registry.hyper_parameters(name)}
    q, k, v = draw(2, LENGTH, 2, 8)
    padded = [jnp.pad(x, ((0, 0), (0, 9), (0, 0), (0, 0)), constant_values=3) for x in (q, k, v)]
    valid = jnp.broadcast_to(jnp.arange(LENGTH + 9) < LENGTH, (2, LENGTH + 9))
    attend = jax.jit(partial(combiner.attend, name=name, causal=causal, **{**hyper, **sizes}))
    actual, expected = attend(*padded, valid=valid), attend(q, k, v)
    assert_close(actual[:, :LENGTH], expected, TOLERANCE[jnp.float32])


@causal_or_not
@every_mechanism
def test_weights_are_an_average(name, hyper, causal):
    q, k, _ = draw(1, LENGTH, 2, 8)
    out = jax.jit(lambda q, k: combiner.attend(q, k, jnp.ones_like(q), name, causal=causal, **hyper))(q, k)
    assert_close(out, jnp.ones_like(q), TOLERANCE[jnp.float32])


@every_mechanism
def test_large_logits_stay_finite(name, hyper):
    q, k, v = draw(1, LENGTH, 2, 8)
    run = with_gradients(lambda q, k, v: combiner.attend(1e4 * q, k, v, name, causal=True, **hyper))
    for x in run(q, k, v)[0]:
        assert jnp.isfinite(x).all()


@causal_or_not
@every_mechanism
def test_grouped_queries(name, hyper, causal):
    q, k, v = draw(2, LENGTH, 4, 8)
    k, v = k[:, :, :2], v[:, :, :2]
    attend = jax.jit(partial(combiner.attend, name=name, causal=causal, **hyper))
    repeated = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    np.testing.assert_array_equal(attend(q, k, v), attend(q, *repeated))


@every_mechanism
def test_vmap(name, hyper):
    q, k, v = draw(3, 2, LENGTH, 2, 8)
    attend = jax.jit(lambda q, k, v: combiner.attend(q, k, v, name, causal=True, **hyper))
    expected = jnp.stack([attend(*one) for one in zip(q, k, v, strict=True)])
    assert_close(jax.jit(jax.vmap(attend))(q, k, v), expected, TOLERANCE[jnp.float32])


@causal_or_not
@every_mechanism
def test_dropout_is_unbiased(name, hyper, causal):
    q, k, v = draw(1, 12, 1, 4)
    attend = combiner.attention_fn(name, causal=causal, **hyper)
    keys = jax.random.split(jax.random.key(0), 2000)
    dropped = jax.jit(jax.vmap(lambda key: attend(q, k, v, dropout_rng=key, dropout_rate=0.5, deterministic=False)))(
        keys
    )
    expected = jax.jit(attend)(q, k, v)
    spread = dropped.std(axis=0) / np.sqrt(len(keys))
    assert (spread > 0).all()
    assert (abs(dropped.mean(axis=0) - expected) < 5 * spread + 1e-6).all()


@every_mechanism
def test_decoding_equals_the_parallel_form(name, hyper):
    module = registry.make(name, hyper, width=16, heads=2, rotary=True, planned_length=LENGTH)
    (x,) = draw(3, LENGTH, 16, count=1)
    positions = jnp.arange(LENGTH)[None]
    expected, params = jax.jit(module.init_with_output)(jax.random.key(0), x, positions)
    counts = jnp.array([1, 7, 10])
    prefill = jax.jit(
        lambda x: module.apply(params, x, positions[:, :10], counts, LENGTH, method='prefill', mutable=['cache'])
    )
    decode = jax.jit(
        lambda cache, x, index: module.apply({**params, **cache}, x, index, method='decode', mutable=['cache'])
    )
    attended, cache = prefill(x[:, :10])
    assert_close(attended, expected[:, :10], TOLERANCE[jnp.float32])
    rows = jnp.arange(3)
    for index in [counts + step for step in range(LENGTH - 10)]:
        attended, cache = decode(cache, x[rows, index][:, None], index)
        assert_close(attended[:, 0], expected[rows, index], TOLERANCE[jnp.float32])
