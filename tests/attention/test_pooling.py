import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KNOWN_AHEAD, TOLERANCE, assert_close, causal_or_not, draw

from combiner import reference
from combiner.attention import registry
from combiner.attention.pooled import PooledAttention
from combiner.attention.pooling import POOLS

LENGTH = 23
POOLED = [name for name in KNOWN_AHEAD if issubclass(registry.resolve(name), PooledAttention)]


def plainly(pool, prefix, params):
    """The pooling by its formula, member by member: from `x` and `members` of all spans to `[b, s, h, d]`."""

    def pooled(x, members):
        rows = []
        for row, spans in zip(x, members, strict=True):
            rows.append(jnp.stack([one(row[np.flatnonzero(span)]) for span in np.asarray(spans)]))
        return jnp.stack(rows)

    def one(x):  # members, heads, head width
        if not len(x):
            return jnp.zeros(x.shape[1:])
        if pool == 'max':
            return x.max(axis=0)
        if pool == 'mean':
            return x.mean(axis=0)
        if pool == 'deepsets':
            hidden = jax.nn.relu(jnp.einsum('mhd,hdf->mhf', x, params[f'{prefix}_pool_inner_kernel']))
            return jnp.einsum('mhf,hfd->hd', hidden, params[f'{prefix}_pool_outer_kernel']) / len(x)
        logits = 30 * jnp.tanh(jnp.einsum('mhd,hd->mh', x, params[f'{prefix}_pool_query']) / 30)
        return jnp.einsum('mh,mhd->hd', jax.nn.softmax(logits, axis=0), x)

    return pooled


@causal_or_not
@pytest.mark.parametrize('pool', POOLS)
@pytest.mark.parametrize('name', POOLED)
def test_every_pooling_equals_its_formula_with_gradients(name, pool, causal):
    sizes = {size: 5 for size in ('block', 'columns') if size in registry.hyper_parameters(name)}
    module = registry.make(name, sizes | {'pool': pool}, width=16, heads=2, causal=causal)
    (x,) = draw(2, LENGTH, 16, count=1)
    q, k, v = draw(2, LENGTH, 2, 8)
    valid = jnp.asarray(np.random.default_rng(0).random((2, LENGTH)) > 0.3)
    params = jax.jit(module.init)(jax.random.key(0), x, jnp.arange(LENGTH)[None])['params']
    params = jax.tree.map(lambda leaf: leaf.value, params, is_leaf=lambda leaf: hasattr(leaf, 'value'))

    @jax.jit
    def fast(params, q, k, v):
        return module.apply({'params': params}, x, q, k, v, valid=valid, method='attend_from')

    def oracle(params, q, k, v):
        pools = tuple(plainly(pool, prefix, params) for prefix in ('query', 'key'))
        return reference.attend(q, k, v, module.pattern(LENGTH), valid=valid, pools=pools)

    (cotangent,) = draw(2, LENGTH, 2, 8, count=1, seed=3)
    cotangent = jnp.where(valid[..., None, None], cotangent, 0)
    actual, pull_back = jax.vjp(fast, params, q, k, v)
    expected, pull_back_plainly = jax.vjp(oracle, params, q, k, v)
    assert_close(jnp.where(valid[..., None, None], actual, 0), expected, TOLERANCE[jnp.float32])
    for one, other in zip(
        jax.tree.leaves(pull_back(cotangent)), jax.tree.leaves(pull_back_plainly(cotangent)), strict=True
    ):
        assert_close(one, other, TOLERANCE[jnp.float32])


@pytest.mark.parametrize('pool', ['deepsets', 'attention'])
def test_pooling_with_parameters_learns_them_by_head(pool):
    module = registry.make('combiner_fixed', {'pool': pool, 'block': 4}, width=16, heads=2)
    (x,) = draw(1, 8, 16, count=1)
    params = jax.eval_shape(module.init, jax.random.key(0), x, jnp.arange(8)[None])['params']
    own = {name: leaf.value.shape for name, leaf in params.items() if '_pool_' in name}
    if pool == 'attention':
        assert own == {'query_pool_query': (2, 8), 'key_pool_query': (2, 8)}
    else:
        assert own == {f'{x}_pool_{y}_kernel': (2, 8, 8) for x in ('query', 'key') for y in ('inner', 'outer')}


def test_attention_pooling_takes_any_logits():
    module = registry.make('combiner_fixed', {'pool': 'attention', 'block': 4}, width=8, heads=1)
    (x,) = draw(1, 8, 8, count=1)
    out, params = module.init_with_output(jax.random.key(0), 1e4 * x, jnp.arange(8)[None])
    gradients = jax.grad(lambda x: (module.apply(params, x, jnp.arange(8)[None]) ** 2).sum())(1e4 * x)
    assert jnp.isfinite(out).all()
    assert jnp.isfinite(gradients).all()
