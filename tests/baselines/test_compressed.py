import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, draw

from combiner import patterns
from combiner.baselines.compressed import Gates, attend_compressed
from combiner.core import registry
from combiner.ops import chunking
from combiner.ops.pooling import LOGIT_CAP

LENGTH = 23
SHAPE = (2, LENGTH, 2, 8)
SIZES = ((4, 6), (5, 5), (3, 2), (1, 1), (4, 40), (8, 9))
SCATTERED = np.random.default_rng(0).random((2, LENGTH)) > 0.3
SCATTERED[1, 2:9] = False


def make(block, window):
    return registry.make_mechanism('compressed', {'block': block, 'window': window})


def gated_mean(x, gate, members):
    logits = LOGIT_CAP * jnp.tanh(jnp.einsum('bjhd,hd->bhj', x, gate) / LOGIT_CAP)
    logits = jnp.where(members, logits[:, :, None], -1e9)
    weights = jnp.where(members, jax.nn.softmax(logits, axis=-1), 0)
    return jnp.einsum('bhnj,bjhd->bnhd', weights, x)


def naive(q, k, v, gates, pattern, valid):
    members = jnp.asarray(pattern.spans)[None, None] & valid[:, None, None]
    span_k, span_v = (gated_mean(x, gate, members) for x, gate in zip((k, v), gates, strict=True))
    direct = jnp.asarray(pattern.direct) & valid[:, None, :]
    uses = jnp.asarray(pattern.uses)[None, None] & members.any(axis=-1)[:, :, None]
    logits = jnp.einsum('bihd,bjhd->bhij', q, jnp.concatenate([k, span_k], axis=1)) / jnp.sqrt(q.shape[-1])
    visible = jnp.concatenate([direct[:, None], uses], axis=-1)
    weights = jax.nn.softmax(jnp.where(visible, logits, -1e9), axis=-1)
    out = jnp.einsum('bhij,bjhd->bihd', weights, jnp.concatenate([v, span_v], axis=1))
    return jnp.where(valid[..., None, None], out, 0)


def run(attend, *inputs):
    @jax.jit
    def both(q, k, v, gates, cotangent, valid):
        def masked(*inputs):
            return jnp.where(valid[..., None, None], attend(*inputs, valid=valid), 0)

        out, pull_back = jax.vjp(masked, q, k, v, gates)
        return out, *pull_back(cotangent.astype(out.dtype))

    return jax.tree.leaves(both(*inputs))


@pytest.mark.parametrize(('block', 'window'), SIZES)
def test_fast_equals_naive_with_gradients(block, window):
    pattern = make(block, window).pattern(LENGTH)
    dtype = jnp.bfloat16 if (block, window) == SIZES[1] else jnp.float32
    *qkv, cotangent = draw(*SHAPE, count=4, dtype=dtype)
    gates = Gates(*draw(2, 8, count=2, seed=3))
    attend = functools.partial(attend_compressed, block=block, window=window, chunk=8)
    actual = run(attend, *qkv, gates, cotangent, SCATTERED)
    assert actual[0].dtype == dtype
    qkv, cotangent = [x.astype(jnp.float32) for x in qkv], cotangent.astype(jnp.float32)
    expected = run(functools.partial(naive, pattern=pattern), *qkv, gates, cotangent, SCATTERED)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, TOLERANCE[dtype])


def test_steps_change_nothing(monkeypatch):
    *qkv, cotangent = draw(*SHAPE, count=4)
    gates = Gates(*draw(2, 8, count=2, seed=3))
    attend = functools.partial(attend_compressed, block=4, window=6, chunk=8)
    everything = np.ones((2, LENGTH), bool)
    expected = run(attend, *qkv, gates, cotangent, everything)
    monkeypatch.setattr(chunking, 'CHUNK_LOGITS', 1)
    for one, other in zip(run(attend, *qkv, gates, cotangent, everything), expected, strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@pytest.mark.parametrize(('block', 'window'), SIZES)
def test_support_and_cost(block, window):
    for length in range(1, 40):
        pattern = make(block, window).pattern(length)
        support, coverage = patterns.support(length, causal=True), pattern.coverage()
        assert ((coverage > 0) == support).all()
        assert (coverage <= 2).all()
        assert ((pattern.uses.astype(int) @ pattern.spans).sum(axis=1) % block == 0).all()  # closed blocks only
        assert make(block, window).cost(length) == pattern.cost()


def test_by_hand():
    pattern = make(3, 4).pattern(9)
    assert np.flatnonzero(pattern.direct[8]).tolist() == [5, 6, 7, 8]
    used = [np.flatnonzero(pattern.spans[n]).tolist() for n in np.flatnonzero(pattern.uses[8])]
    assert used == [[0, 1, 2], [3, 4, 5]]
    assert not pattern.uses[3].any()


def test_default_sizes():
    assert registry.make_mechanism('compressed', {'window': 20}).sizes(100) == (16, 20)
    assert registry.make_mechanism('compressed', {'block': 20}).sizes(100) == (20, 20)
    sizes = registry.make_mechanism('compressed', max_length=16384).sizes(1)
    assert sizes in ((64, 64), (128, 128))
    with pytest.raises(ValueError, match='window=3 is too short for block=5; choose a window >= block - 1'):
        make(5, 3).sizes(100)
