import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw

import combiner


def direct(q, k, v, block, overlap, causal):
    """The definition, position by position."""
    length, attended = q.shape[0], []
    for i in range(length):
        start = i // block * block
        end = i + 1 if causal else min(length, start + block + overlap)
        reached = slice(max(0, start - overlap), end)
        attended.append(jax.nn.softmax(k[reached] @ q[i] / np.sqrt(q.shape[1])) @ v[reached])
    return jnp.stack(attended)


@causal_or_not
@pytest.mark.parametrize(('block', 'overlap'), [(4, 0), (4, 6), (40, 5)])
def test_it_is_its_definition(block, overlap, causal):
    *qkv, cotangent = draw(1, 13, 1, 4, count=4)

    @jax.jit
    def both(*qkv):
        fast, pull_fast = jax.vjp(
            lambda *qkv: combiner.attend(*qkv, 'local', causal=causal, block=block, overlap=overlap), *qkv
        )
        slow, pull_slow = jax.vjp(
            lambda *qkv: direct(*(x[0, :, 0] for x in qkv), block, overlap, causal)[None, :, None], *qkv
        )
        return (fast, *pull_fast(cotangent)), (slow, *pull_slow(cotangent))

    for one, other in zip(*both(*qkv), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


def test_pattern_by_hand():
    pattern = combiner.pattern('local', 8, causal=True, block=3, overlap=1)
    assert [np.flatnonzero(row).tolist() for row in pattern.direct[[2, 3, 5, 7]]] == [
        [0, 1, 2],
        [2, 3],
        [2, 3, 4, 5],
        [5, 6, 7],
    ]
    own_block_only = combiner.pattern('local', 5, causal=False, block=3)
    assert own_block_only.direct.astype(int).tolist() == [[1, 1, 1, 0, 0]] * 3 + [[0, 0, 0, 1, 1]] * 2


@pytest.mark.parametrize(
    ('sizes', 'message'),
    [({'block': 0}, 'block must be at least 1, got 0'), ({'overlap': -1}, 'overlap must be at least 0, got -1')],
)
def test_sizes_that_make_no_block(sizes, message):
    with pytest.raises(ValueError, match=message):
        combiner.attend(*draw(1, 4, 1, 8), 'local', causal=True, **sizes)


def test_long_inputs_in_little_memory():
    x = jax.ShapeDtypeStruct((1, 16384, 8, 64), jnp.float32)
    gradient = jax.grad(lambda *qkv: combiner.attend(*qkv, 'local', causal=True, overlap=64).sum(), (0, 1, 2))
    assert jax.jit(gradient).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes < 1e9
