import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, draw, random_variables

from combiner.baselines.transient_global import EPSILON, attend_transient_global, summarise_input
from combiner.core import registry
from combiner.core.module import make_attention

LENGTH = 23
SHAPE = (2, LENGTH, 2, 8)
SCATTERED = np.random.default_rng(0).random((2, LENGTH)) > 0.3
SCATTERED[1, 3:9] = False
SIZES = ((4, 3, 8), (5, 11, 4), (1, 1, 32), (30, 40, 8))


def naive(q, k, v, x, scale, kernels, pattern, valid):
    blocks = jnp.asarray(pattern.spans)[None] & valid[:, None]
    total = jnp.einsum('bnl,ble->bne', blocks, x)
    summary = total / jnp.sqrt(jnp.mean(total**2, axis=-1, keepdims=True) + EPSILON) * scale
    more_k, more_v = (jnp.einsum('bne,ehd->bnhd', summary, kernel) for kernel in kernels)
    logits = jnp.einsum('bihd,bjhd->bhij', q, jnp.concatenate([k, more_k], axis=1)) / jnp.sqrt(q.shape[-1])
    direct = jnp.asarray(pattern.direct) & valid[:, None]
    uses = jnp.asarray(pattern.uses) & blocks.any(axis=-1)[:, None]
    weights = jax.nn.softmax(jnp.where(jnp.concatenate([direct, uses], axis=-1)[:, None], logits, -1e9), axis=-1)
    return jnp.einsum('bhij,bjhd->bihd', weights, jnp.concatenate([v, more_v], axis=1))


def fast(q, k, v, x, scale, kernels, valid, **sizes):
    summaries = summarise_input(jnp.where(valid[..., None], x, 0), scale, sizes['block'])
    more = (jnp.einsum('bne,ehd->bnhd', summaries, kernel.astype(jnp.float32)).astype(q.dtype) for kernel in kernels)
    return attend_transient_global(q, k, v, *more, **sizes, valid=valid)


def results(attend, *inputs, cotangent, valid):
    def zeroed(*inputs):
        return jnp.where(valid[..., None, None], attend(*inputs), 0)

    out, pull_back = jax.vjp(zeroed, *inputs)
    return jax.tree.leaves((out, *pull_back(cotangent.astype(out.dtype))))


@pytest.mark.parametrize(('block', 'radius', 'chunk'), SIZES)
def test_fast_equals_naive_with_gradients(block, radius, chunk):
    dtype = jnp.bfloat16 if block == 5 else jnp.float32
    *qkv, cotangent = draw(*SHAPE, count=4, dtype=dtype)
    (x,), kernels = draw(2, LENGTH, 6, count=1, seed=1), draw(6, 2, 8, count=2, seed=2)
    (scale,) = draw(6, count=1, seed=3)
    sizes = {'block': block, 'radius': radius, 'chunk': chunk}
    pattern = registry.make_mechanism('transient_global', sizes, causal=False).pattern(LENGTH)

    @jax.jit
    def both(valid):
        def run(*inputs):
            return fast(*inputs, valid=valid, **sizes)

        def oracle(*inputs):
            return naive(*inputs, pattern=pattern, valid=valid)

        wide = [x.astype(jnp.float32) for x in qkv]
        options = {'cotangent': cotangent.astype(jnp.float32), 'valid': valid}
        return results(run, *qkv, x, scale, kernels, **options), results(oracle, *wide, x, scale, kernels, **options)

    actual, expected = both(SCATTERED)
    assert actual[0].dtype == dtype
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize(('block', 'radius', 'chunk'), SIZES)
def test_pattern_and_cost(block, radius, chunk):
    sizes = {'block': block, 'radius': radius, 'chunk': chunk}
    mechanism = registry.make_mechanism('transient_global', sizes, causal=False)
    for length in (1, 2, 7, LENGTH, 40):
        pattern = mechanism.pattern(length)
        near = abs(np.arange(length)[:, None] - np.arange(length)) <= radius
        np.testing.assert_array_equal(pattern.coverage(), 1 + near)
        assert mechanism.cost(length) == pattern.cost()


def test_summaries_are_not_rotated():
    """Windows do not change where all positions shift, by themselves; queries turn, and summaries do not."""
    hyper = {'block': 4, 'radius': 3}
    module = make_attention('transient_global', hyper, causal=False, width=16, heads=2, rotary=True)
    (x,), positions = draw(2, LENGTH, 16, count=1), jnp.arange(LENGTH)[None]
    variables = random_variables(module, x, positions)
    shifted, unshifted = jax.jit(lambda: [module.apply(variables, x, positions + shift) for shift in (5, 0)])()
    assert (abs(shifted - unshifted) > 1e-3).any()
