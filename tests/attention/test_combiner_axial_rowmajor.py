import functools

import jax
import jax.numpy as jnp
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw, random_variables

import combiner
from combiner import reference
from combiner.attention.combiner_axial_rowmajor import CombinerAxialRowmajor, project_keys
from combiner.core.module import Attention


def projected(length, **settings):
    module = Attention(CombinerAxialRowmajor(columns=4, key='projected', **settings), width=16, heads=2)
    (x,) = draw(2, length, 16, count=1)
    return module, x, random_variables(module, x, jnp.arange(length)[None])


@causal_or_not
@pytest.mark.parametrize('length', [12, 14])
def test_projected_keys_equal_the_oracle(length, causal):
    module, x, params = projected(length, causal=causal)
    pattern = module.mechanism.pattern(length)

    @jax.jit
    def oracle(params, x):
        def span_keys(values):
            present = jnp.asarray(pattern.anchors >= 0)[None, :, None]
            return project_keys(values, jnp.where(present, x[:, pattern.anchors], 0), params['params'])

        q, k, v = module.apply(params, x, jnp.arange(length)[None], method='_project')
        return module.apply(params, reference.attend(q, k, v, pattern, key=span_keys), method='_merge')

    actual = jax.jit(module.apply)(params, x, jnp.arange(length)[None])
    assert_close(actual, oracle(params, x), TOLERANCE[jnp.float32])


def test_padding_does_not_change_projected_keys():
    module, x, params = projected(14, causal=False)
    padded = jnp.pad(x, ((0, 0), (0, 2), (0, 0)), constant_values=jnp.nan)
    valid = jnp.broadcast_to(jnp.arange(16) < 14, (2, 16))
    apply = jax.jit(module.apply)
    actual = apply(params, padded, jnp.arange(16)[None], valid=valid)
    assert_close(actual[:, :14], apply(params, x, jnp.arange(14)[None]), TOLERANCE[jnp.float32])


def test_projected_keys_decode():
    module, x, params = projected(18, max_length=18)
    counts = jnp.array([6, 3])

    @jax.jit
    def start(x):
        prefill = functools.partial(module.apply, params, method='prefill', mutable=['cache'])
        return module.apply(params, x, jnp.arange(18)[None]), prefill(x[:, :6], jnp.arange(6)[None], counts, 18)[1]

    expected, cache = start(x)
    decode = jax.jit(
        lambda cache, x, index: module.apply({**params, **cache}, x, index, method='decode', mutable=['cache'])
    )
    for step in range(12):
        index, rows = counts + step, jnp.arange(2)
        attended, cache = decode(cache, x[rows, index][:, None], index)
        assert_close(attended[:, 0], expected[rows, index], 1e-5)


@pytest.mark.parametrize(('key', 'kept'), [('token', False), ('attended', False), ('projected', True)])
def test_only_projected_keys_keep_the_input_in_the_cache(key, kept):
    module = Attention(CombinerAxialRowmajor(columns=4, key=key, max_length=18), width=16, heads=2)
    x, positions = jnp.zeros((2, 6, 16)), jnp.arange(6)[None]
    params = random_variables(module, x, positions)
    prefill = functools.partial(module.apply, params, x, positions, method='prefill', mutable=['cache'])
    cache = jax.eval_shape(lambda counts: prefill(counts, 18)[1], jnp.array([6, 3]))['cache']['state']
    assert (cache.x is not None) == kept


def test_projected_keys_need_the_module():
    with pytest.raises(ValueError, match=r'use the Linen module .*CombinerAxialRowmajor.*, or choose token or'):
        combiner.attend(*draw(1, 8, 2, 4), 'combiner_axial_rowmajor', causal=True, key='projected')


def test_unknown_key():
    with pytest.raises(ValueError, match="unknown key 'pooled'; choose token, attended, projected"):
        combiner.attend(*draw(1, 8, 2, 4), 'combiner_axial_rowmajor', causal=True, key='pooled')
