import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw

import combiner
from combiner.core import registry


def direct(q, k, v, stride, causal):
    """The definition, position by position."""
    length, attended = len(q), []
    for i in range(length):
        last = range(max(0, i - stride + 1), i + 1 if causal else min(length, i + stride))
        every = range(i % stride, i + 1 if causal else length, stride)
        reached = np.array(sorted({*last, *every}))
        attended.append(jax.nn.softmax(k[reached] @ q[i] / np.sqrt(q.shape[1])) @ v[reached])
    return jnp.stack(attended)


@causal_or_not
@pytest.mark.parametrize('stride', [1, 4, 40])
def test_it_is_its_definition(stride, causal):
    *qkv, cotangent = draw(1, 13, 1, 4, count=4)

    @jax.jit
    def both(*qkv):
        fast, pull_fast = jax.vjp(lambda *qkv: combiner.attend(*qkv, 'strided', causal=causal, stride=stride), *qkv)
        slow, pull_slow = jax.vjp(lambda *qkv: direct(*(x[0, :, 0] for x in qkv), stride, causal)[None, :, None], *qkv)
        return (fast, *pull_fast(cotangent)), (slow, *pull_slow(cotangent))

    for one, other in zip(*both(*qkv), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


def test_pattern_by_hand():
    pattern = combiner.pattern('strided', 12, causal=True, stride=3)
    assert [np.flatnonzero(row).tolist() for row in pattern.direct[[1, 4, 11]]] == [
        [0, 1],
        [1, 2, 3, 4],
        [2, 5, 8, 9, 10, 11],
    ]
    both = combiner.pattern('strided', 12, causal=False, stride=3)
    assert np.flatnonzero(both.direct[4]).tolist() == [1, 2, 3, 4, 5, 6, 7, 10]


def test_the_stride_follows_from_the_cost():
    made = registry.make_mechanism('strided', causal=True)
    assert made.cost(1024) == made.pattern(1024).cost()
    assert made.cost(4096).total < 2.2 * made.cost(1024).total * 4  # like l^1.5
    with pytest.raises(ValueError, match='stride must be at least 1, got 0'):
        combiner.attend(*draw(1, 4, 1, 8), 'strided', causal=True, stride=0)


def test_long_inputs_in_little_memory():
    x = jax.ShapeDtypeStruct((1, 16384, 8, 64), jnp.float32)
    gradient = jax.grad(lambda *qkv: combiner.attend(*qkv, 'strided', causal=True, stride=128).sum(), (0, 1, 2))
    assert jax.jit(gradient).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes < 8e9
