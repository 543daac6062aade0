import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, draw, oracle

from combiner.baselines import bigbird
from combiner.baselines.bigbird import attend_bigbird, global_blocks, random_blocks
from combiner.core import registry

LENGTH = 23
SHAPE = (2, LENGTH, 2, 8)
SCATTERED = np.random.default_rng(0).random((2, LENGTH)) > 0.3
SIZES = ((3, 1, 2), (2, 2, 3), (4, 0, 0), (3, 0, 20), (5, 5, 1), (30, 2, 1))


SEED = jnp.array([1, 2], jnp.uint32)


def made(block, count, random):
    hyper = {'block': block, 'globals': count, 'random': random}
    return registry.make_mechanism('bigbird', hyper, causal=False, max_length=LENGTH)


def drawn_pattern(mechanism, length):
    chosen = mechanism.chosen(length, SEED)
    return bigbird.pattern(length, chosen, block=mechanism.block, count=mechanism.globals)


@pytest.mark.parametrize('valid', [None, SCATTERED], ids=['', 'padded'])
@pytest.mark.parametrize(('block', 'count', 'random'), SIZES)
def test_fast_equals_oracle_with_gradients(block, count, random, valid):
    dtype = jnp.bfloat16 if (block, valid is None) == (3, False) else jnp.float32
    *qkv, cotangent = draw(*SHAPE, count=4, dtype=dtype)
    chosen = made(block, count, random).chosen(LENGTH, SEED)

    inside = None if valid is None else jnp.asarray(valid)

    @jax.jit
    def run(q, k, v, cotangent):
        def attend(q, k, v):
            out = attend_bigbird(q, k, v, chosen, block=block, count=count, valid=inside)
            return out if inside is None else jnp.where(inside[..., None, None], out, 0)

        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(cotangent)

    actual = run(*qkv, cotangent)
    assert actual[0].dtype == dtype
    expected = oracle(drawn_pattern(made(block, count, random), LENGTH), *qkv, cotangent, valid)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize(('block', 'count', 'random'), SIZES)
def test_pattern(block, count, random):
    mechanism, number = made(block, count, random), np.arange(LENGTH) // block
    direct, near = drawn_pattern(mechanism, LENGTH).direct, abs(number[:, None] - number) <= 1
    assert direct[near].all()
    everywhere = np.isin(number, global_blocks(-(-LENGTH // block), count))
    assert direct[everywhere].all()
    assert direct[:, everywhere].all()
    candidates = ~near & ~everywhere & ~everywhere[:, None]
    blocks = (direct & candidates)[::block][:, ::block]
    np.testing.assert_array_equal(blocks.sum(axis=1), np.minimum(candidates[::block][:, ::block].sum(axis=1), random))
    assert mechanism.cost(LENGTH).terms >= direct.sum()


def test_global_blocks_are_the_first_and_the_last():
    """As in the code of Zaheer et al. (2020), which has two of them."""
    assert [global_blocks(6, count).tolist() for count in range(5)] == [[], [0], [0, 5], [0, 1, 5], [0, 1, 4, 5]]
    assert [global_blocks(blocks, 2).tolist() for blocks in (1, 2, 3)] == [[0], [0, 1], [0, 2]]
    direct = drawn_pattern(made(2, 2, 0), LENGTH).direct
    assert direct[:, [0, 1, LENGTH - 1]].all()
    assert direct[[0, 1, LENGTH - 1]].all()
    assert not direct[10, [2, 3, LENGTH - 2]].any()


def test_in_a_shorter_sequence_the_last_block_is_its_own():
    mechanism = made(2, 2, 3)
    for length in (LENGTH - 2, 9, 3):
        *qkv, cotangent = draw(2, length, 2, 8, count=4)
        actual = attend_bigbird(*qkv, mechanism.chosen(length, SEED), block=2, count=2)
        pattern = drawn_pattern(mechanism, length)
        assert pattern.direct[:, length - 1].all()
        assert_close(actual, oracle(pattern, *qkv, cotangent)[0], TOLERANCE[jnp.float32])


def test_random_blocks_are_drawn_evenly():
    keys = jax.random.split(jax.random.key(0), 2000)
    chosen = np.asarray(jax.vmap(lambda key: random_blocks(key, 9, 2, 2))(keys))
    assert (chosen[:, :, 0] != chosen[:, :, 1]).all()
    counts = np.bincount(chosen[:, 4].ravel(), minlength=9)
    assert (counts[[0, 3, 4, 5, 8]] == 0).all()
    assert (abs(counts[[1, 2, 6, 7]] - 1000) < 100).all()


def test_what_is_longer_than_planned_is_refused():
    with pytest.raises(ValueError, match='24 positions are more than max_length=23; set max_length to the longest'):
        made(3, 1, 2).chosen(24, SEED)
