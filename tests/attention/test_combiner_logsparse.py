import functools

import jax
import jax.numpy as jnp
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw

import combiner
from combiner import reference
from combiner.attention.combiner_logsparse import CombinerLogsparse

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


@pytest.mark.parametrize(('name', 'hyper'), [('combiner_logsparse', {'chunk': 8}), ('combiner_tree', {'branch': 4})])
def test_spans_beyond_the_end_have_no_part_in_gradients(name, hyper):
    """Three blocks: the last one has no right sibling, of which a mean would be 0/0."""
    valid = jnp.ones((1, 24), bool)

    @jax.jit
    def gradients(*qkv):
        def loss(*qkv):
            out = combiner.attend(*qkv, name, causal=False, pool='mean', **hyper)
            return (out**2).sum()

        def oracle(*qkv):
            pattern = combiner.pattern(name, 24, causal=False, **hyper)
            return (reference.attend(*qkv, pattern, valid=valid, pools=(mean, mean)) ** 2).sum()

        return [jax.grad(f, (0, 1, 2))(*qkv) for f in (loss, oracle)]

    def mean(x, members):
        return jnp.einsum('blhd,bsl->bshd', x, members / members.sum(axis=-1, keepdims=True))

    for actual, expected in zip(*gradients(*draw(1, 24, 1, 4)), strict=True):
        assert_close(actual, expected, TOLERANCE[jnp.float32])


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('chunk', [0, -2, 6])
def test_a_chunk_is_a_power_of_two(name, chunk):
    must = 'at least 1' if chunk < 1 else 'a power of two'
    with pytest.raises(ValueError, match=f'chunk must be {must}, got {chunk}'):
        combiner.attend(*draw(1, 4, 1, 4), name, causal=True, chunk=chunk)


@pytest.mark.parametrize(('length', 'parts', 'block'), [(50, 4, 16), (64, 4, 16), (1, 8, 1), (100, 2, 64)])
def test_parts_of_short_sequences_are_not_padded_to_a_chunk(length, parts, block):
    assert CombinerLogsparse(chunk=None).context_block(length, parts) == block
    assert CombinerLogsparse(chunk=64).context_block(length, parts) == block
