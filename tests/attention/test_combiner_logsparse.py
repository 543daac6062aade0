import functools

import jax
import jax.numpy as jnp
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw

import combiner

NAMES = ('combiner_logsparse', 'logsparse')


@causal_or_not
@pytest.mark.parametrize('name', NAMES)
def test_the_length_of_a_chunk_changes_nothing(name, causal):
    qkv = draw(1, 23, 1, 4)

    @jax.jit
    def attend(*qkv):
        run = functools.partial(combiner.attend, *qkv, name=name, causal=causal)
        return run(chunk=8), [run(chunk=chunk) for chunk in (1, 2, 4, 32, 64)]

    expected, others = attend(*qkv)
    for actual in others:
        assert_close(actual, expected, TOLERANCE[jnp.float32])


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('chunk', [0, -2, 6])
def test_a_chunk_is_a_power_of_two(name, chunk):
    with pytest.raises(ValueError, match=f'chunk must be a power of two, got {chunk}'):
        combiner.attend(*draw(1, 4, 1, 4), name, causal=True, chunk=chunk)
