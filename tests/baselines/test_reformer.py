import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw

from combiner.baselines.reformer import EPSILON, attend_reformer, hashes
from combiner.ops import chunking

LENGTH, CHUNK, ROUNDS = 23, 4, 3
SHAPE = (2, LENGTH, 2, 8)
SCATTERED = np.random.default_rng(0).random((2, LENGTH)) > 0.3


def rotations(heads: int = 2, buckets: int = 6):
    return draw(heads, ROUNDS, 8, buckets // 2, count=1, seed=5)[0]


def naive(q, v, buckets, valid, causal):
    """The rounds one by one, with matrices of all pairs, and a penalty of a token's logit with itself.

    The paper's 10^5 would leave float32 too few digits where a token attends to nothing else.
    """
    length, position = q.shape[1], jnp.arange(q.shape[1])
    buckets = jnp.where(valid[:, None, None], buckets, 10**6)
    before = (buckets[..., None, :] < buckets[..., :, None]) | (
        (buckets[..., None, :] == buckets[..., :, None]) & (position < position[:, None])
    )
    chunk = before.sum(axis=-1) // CHUNK
    visible = (chunk[..., :, None] - chunk[..., None, :] >= 0) & (chunk[..., :, None] - chunk[..., None, :] <= 1)
    support = (position <= position[:, None] if causal else jnp.ones((length, length), bool)) & valid[:, None, :]
    visible = visible & support[:, None, None] & valid[:, None, None, :, None]
    k = q / jnp.sqrt(jnp.mean(q**2, axis=-1, keepdims=True) + EPSILON) / jnp.sqrt(q.shape[-1])
    itself = jnp.eye(length, dtype=bool)
    number = jnp.where(itself, 1, visible.sum(axis=2, keepdims=True))
    logits = jnp.einsum('blhd,bmhd->bhlm', q, k)[:, :, None] - jnp.where(itself, 32, jnp.log(jnp.maximum(number, 1)))
    logits = jnp.where(visible, logits, -1e9)
    z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    rounds = jnp.einsum('bhrlm,bmhd->bhrld', jnp.where(visible, jnp.exp(logits - z), 0), v)
    share = jnp.exp(z - jax.nn.logsumexp(z, axis=2, keepdims=True))
    return jnp.where(valid[..., None, None], jnp.moveaxis((share * rounds).sum(axis=2), 1, 2), 0)


def program(attend):
    @functools.partial(jax.jit, static_argnames='causal')
    def run(q, v, buckets, valid, cotangent, causal):
        def masked(q, v):
            out = attend(q, v, buckets, valid=valid, causal=causal)
            return jnp.where(valid[..., None, None], out, 0)

        out, pull_back = jax.vjp(masked, q, v)
        return out, *pull_back(cotangent.astype(out.dtype))

    return run


oracle = program(naive)
fast = program(functools.partial(attend_reformer, chunk=CHUNK))


@causal_or_not
@pytest.mark.parametrize(
    ('dtype', 'valid'),
    [(jnp.float32, np.ones((2, LENGTH), bool)), (jnp.float32, SCATTERED), (jnp.bfloat16, SCATTERED)],
    ids=['float32', 'float32-padded', 'bfloat16-padded'],
)
def test_fast_equals_naive_with_gradients(dtype, valid, causal):
    q, v, cotangent = draw(*SHAPE, dtype=dtype)
    buckets = hashes(q, rotations())
    assert buckets.max() == 5
    actual = fast(q, v, buckets, valid, cotangent, causal)
    assert actual[0].dtype == dtype
    expected = oracle(*(x.astype(jnp.float32) for x in (q, v)), buckets, valid, cotangent.astype(jnp.float32), causal)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, TOLERANCE[dtype])


@causal_or_not
def test_float64_is_exact(causal):
    with jax.enable_x64(True):
        q, v, cotangent = draw(*SHAPE, dtype=jnp.float64)
        arguments = q, v, hashes(q, rotations()), SCATTERED, cotangent, causal
        actual, expected = fast(*arguments), oracle(*arguments)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == jnp.float64
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)  # of the oracle's own penalty


@causal_or_not
def test_steps_change_nothing(causal, monkeypatch):
    q, v, cotangent = draw(*SHAPE)
    arguments = (q, v, hashes(q, rotations()), SCATTERED, cotangent)
    expected = fast(*arguments, causal)
    monkeypatch.setattr(chunking, 'CHUNK_LOGITS', 1)
    actual = program(functools.partial(attend_reformer, chunk=CHUNK))(*arguments, causal)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


def test_tokens_that_point_the_same_way_share_a_bucket():
    (q,) = draw(*SHAPE, count=1)
    buckets = hashes(q, rotations())
    np.testing.assert_array_equal(hashes(3 * q, rotations()), buckets)
    np.testing.assert_array_equal(hashes(-q, rotations()), (buckets + 3) % 6)


def test_no_position_depends_on_later_ones_where_the_order_stays():
    q, v, cotangent = draw(*SHAPE)
    buckets = hashes(q, rotations())
    everything = np.ones((2, LENGTH), bool)
    expected, *_ = fast(q, v, buckets, everything, cotangent, True)
    for now in range(LENGTH):
        past = np.arange(LENGTH)[:, None, None] <= now
        actual, *_ = fast(*(jnp.where(past, x, 5 - x) for x in (q, v)), buckets, everything, cotangent, True)
        np.testing.assert_array_equal(actual[:, : now + 1], expected[:, : now + 1])


def test_large_logits_stay_finite():
    q, v, cotangent = draw(*SHAPE)
    for x in fast(1e4 * q, v, hashes(q, rotations()), SCATTERED, cotangent, True):
        assert np.isfinite(x).all()
