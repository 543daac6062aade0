import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    KNOWN_AHEAD,
    TOLERANCE,
    assert_close,
    attend_with,
    causal_or_not,
    draw,
    padded_arrays,
    pattern_of,
    random_variables,
    sizes_of,
)
from cases import (
    oracle as in_float32,
)

import combiner
from combiner import reference
from combiner.core import registry
from combiner.core.module import make_attention
from combiner.core.pooled import Pooled
from combiner.ops.pooling import POOLS
from combiner.patterns import Mixture

LENGTH = 23
POOLED = [name for name in KNOWN_AHEAD if issubclass(registry.resolve(name), Pooled)]


def plainly(pool, prefix, params):
    """The pooling by its formula, span by span: from `x` and `members` of all spans to `[b, s, h, d]`."""

    def of_span(x, member):  # [l, h, d] and [l]: of no members at all, zeros
        return jnp.where(member.any(), of_members(x, (member | ~member.any())[:, None]), 0)

    def of_members(x, member):
        if pool == 'mean':
            return x.mean(axis=0, where=member[..., None])
        if pool == 'deepsets':
            hidden = jax.nn.relu(jnp.einsum('mhd,hdf->mhf', x, params[f'{prefix}_pool_inner_kernel']))
            total = hidden.sum(axis=0, where=member[..., None])
            return jnp.einsum('hf,hfd->hd', total, params[f'{prefix}_pool_outer_kernel']) / member.sum()
        logits = 30 * jnp.tanh(jnp.einsum('mhd,hd->mh', x, params[f'{prefix}_pool_query']) / 30)
        return jnp.einsum('mh,mhd->hd', jax.nn.softmax(logits, axis=0, where=member), x)

    return jax.vmap(jax.vmap(of_span, in_axes=(None, 0)))


def oracle(pool, pattern, *arguments):
    """`(out, (dparams, dq, dk, dv))` of the reference with the pooling's formula; one program serves all mechanisms."""
    if isinstance(pattern, Mixture):  # the mean of attentions has the mean of their gradients
        parts = [oracle(pool, part, *arguments) for part in pattern.parts]
        return jax.tree.map(lambda *results: sum(results) / len(results), *parts)
    return _oracle(pool, padded_arrays(pattern), *arguments)


@functools.partial(jax.jit, static_argnums=0)
def _oracle(pool, arrays, params, q, k, v, valid, cotangent):
    def attend(params, q, k, v):
        pools = tuple(plainly(pool, prefix, params) for prefix in ('query', 'key'))
        return reference.attend(q, k, v, pattern_of(arrays), valid=valid, pools=pools)

    out, pull_back = jax.vjp(attend, params, q, k, v)
    return out, pull_back(cotangent)


@causal_or_not
@pytest.mark.parametrize('pool', [pool for pool in POOLS if pool != 'max'])  # test_every_mechanism has the maximum
@pytest.mark.parametrize('name', POOLED)
def test_every_pooling_equals_its_formula_with_gradients(name, pool, causal):
    module = make_attention(name, sizes_of(name) | {'pool': pool}, width=16, heads=2, causal=causal)
    (x,) = draw(2, LENGTH, 16, count=1)
    q, k, v = draw(2, LENGTH, 2, 8)
    valid = jnp.asarray(np.random.default_rng(0).random((2, LENGTH)) > 0.3)
    (cotangent,) = draw(2, LENGTH, 2, 8, count=1, seed=3)
    cotangent = jnp.where(valid[..., None, None], cotangent, 0)
    params = random_variables(module, x, np.arange(LENGTH)[None])['params']
    of_pool = {name: leaf for name, leaf in params.items() if '_pool_' in name}

    @jax.jit
    def fast(of_pool, q, k, v):
        def attend(of_pool, q, k, v):
            return attend_with(module, {'params': params | of_pool}, q, k, v, valid=valid)

        out, pull_back = jax.vjp(attend, of_pool, q, k, v)
        return jnp.where(valid[..., None, None], out, 0), pull_back(cotangent)

    actual = fast(of_pool, q, k, v)
    expected = oracle(pool, module.mechanism.pattern(LENGTH), of_pool, q, k, v, valid, cotangent)
    jax.tree.map(lambda one, other: assert_close(one, other, TOLERANCE[jnp.float32]), actual, expected)


@pytest.mark.parametrize('width', [32, 128])
@pytest.mark.parametrize('name', POOLED)
def test_queries_that_differ_do_not_tie_in_bfloat16(name, width):
    """Times `1/√width`, an odd power of `1/√2`, two neighbours of these numbers round to the same: pooled unscaled."""
    close = np.random.default_rng(0).permuted(np.tile(np.arange(LENGTH), (2 * width, 1)), axis=1)
    q = jnp.asarray(1.5 + close.reshape(1, 2, width, LENGTH) / 128).transpose(0, 3, 1, 2).astype(jnp.bfloat16)
    _, k, v, cotangent = draw(1, LENGTH, 2, width, count=4, dtype=jnp.bfloat16)
    pattern = registry.make_mechanism(name, sizes_of(name)).pattern(LENGTH)

    @jax.jit
    def fast(q):
        attend = functools.partial(combiner.attend, k=k, v=v, name=name, causal=True, **sizes_of(name))
        return jax.vjp(attend, q)[1](cotangent)[0]

    assert_close(fast(q), in_float32(pattern, q, k, v, cotangent)[1], TOLERANCE[jnp.bfloat16])


@pytest.mark.parametrize('pool', ['deepsets', 'attention'])
def test_pooling_with_parameters_learns_them_by_head(pool):
    module = make_attention('combiner_fixed', {'pool': pool, 'block': 4}, width=16, heads=2)
    (x,) = draw(1, 8, 16, count=1)
    params = jax.eval_shape(module.init, jax.random.key(0), x, jnp.arange(8)[None])['params']
    own = {name: leaf.value.shape for name, leaf in params.items() if '_pool_' in name}
    if pool == 'attention':
        assert own == {'query_pool_query': (2, 8), 'key_pool_query': (2, 8)}
    else:
        assert own == {f'{x}_pool_{y}_kernel': (2, 8, 8) for x in ('query', 'key') for y in ('inner', 'outer')}


def test_attention_pooling_takes_any_logits():
    module = make_attention('combiner_fixed', {'pool': 'attention', 'block': 4}, width=8, heads=1)
    (x,) = draw(1, 8, 8, count=1)

    @jax.jit
    def run(x):
        out, params = module.init_with_output(jax.random.key(0), x, jnp.arange(8)[None])
        return out, jax.grad(lambda x: (module.apply(params, x, jnp.arange(8)[None]) ** 2).sum())(x)

    out, gradients = run(1e4 * x)
    assert jnp.isfinite(out).all()
    assert jnp.isfinite(gradients).all()
