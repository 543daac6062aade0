import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, draw

from combiner.ops.pooling import AFTER, BEFORE, OTHERS, PLAIN

RELATIONS = [
    pytest.param(BEFORE, lambda i, j: j < i, id='before'),
    pytest.param(AFTER, lambda i, j: j > i, id='after'),
    pytest.param(OTHERS, lambda i, j: j != i, id='others'),
]


@pytest.mark.parametrize('pool', PLAIN)
@pytest.mark.parametrize('size', [1, 2, 7])
@pytest.mark.parametrize(('relation', 'is_related'), RELATIONS)
def test_every_position_pools_its_related_positions(relation, is_related, size, pool):
    (x,) = draw(2, 3, size, 4, count=1)
    inside = np.random.default_rng(0).random((3, size)) > 0.3
    pool = PLAIN[pool].q

    def one_by_one(x):
        here = np.arange(size)
        pooled = [pool(x, jnp.asarray(inside & is_related(i, here))) for i in range(size)]
        return jnp.stack(pooled, axis=2)

    (cotangent,) = draw(2, 3, size, 4, count=1, seed=1)
    found = []
    for function in (lambda x: relation.pool(pool, x, jnp.asarray(inside)), one_by_one):
        out, pull_back = jax.vjp(jax.jit(function), x)
        found.append((out, *pull_back(cotangent)))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@pytest.mark.parametrize(('relation', 'is_related'), RELATIONS)
def test_equal_maxima_share_the_gradient(relation, is_related):
    x = jnp.array([[3.0], [1.0], [3.0], [2.0], [3.0]])
    cotangent = jnp.array([[1.0], [10.0], [100.0], [1000.0], [10000.0]])
    _, pull_back = jax.vjp(relation.maximum, x)
    (gradient,) = pull_back(cotangent)
    here = np.arange(5)
    reached = [i for i in here if is_related(i, here).any()]
    assert_close(gradient.sum(), cotangent[np.array(reached)].sum(), 1e-6)
    assert gradient[1] == 0
