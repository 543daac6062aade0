import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw, random_variables

from combiner.baselines.sinkhorn import attend_sinkhorn, balance, pool
from combiner.core import registry
from combiner.core.module import make_attention

LENGTH, BLOCK, ITERATIONS = 23, 5, 3
BLOCKS = 5
SHAPE = (2, LENGTH, 2, 8)
SCATTERED = np.random.default_rng(0).random((2, LENGTH)) > 0.3
SCATTERED[1, 5:15] = False


def naive_balance(scores, pairs, causal):
    """Products of matrices, one entry after the other."""
    matrix = jnp.where(pairs, jnp.exp(scores), 0)
    for _ in range(ITERATIONS):
        sums = matrix.sum(axis=-1, keepdims=True)
        matrix = matrix / jnp.where(sums > 0, sums, 1)
        rows = [matrix[..., : i + 1 if causal else None, :].sum(axis=-2) for i in range(matrix.shape[-2])]
        sums = jnp.stack(rows, axis=-2)
        matrix = matrix / jnp.where(sums > 0, sums, 1)
    return matrix


def naive(q, k, v, scores, valid, causal):
    """Over all pairs of a query and a position: a matrix of what each position of the sorted block is made of."""
    row, column = np.divmod(np.arange(LENGTH), BLOCK)
    here = jnp.asarray(row == np.arange(BLOCKS)[:, None])
    some = (valid[:, None] & here).any(axis=2)
    pairs = some[:, None, :, None] & some[:, None, None]
    if causal:
        pairs = pairs & (np.arange(BLOCKS)[:, None] > np.arange(BLOCKS))
    sorting = naive_balance(scores, pairs, causal)
    # Seen from position i, slot c is the sum over j of `parts[i, c, j]`.
    parts = sorting[:, :, row][..., row][:, :, :, None] * (column == np.arange(BLOCK)[:, None])[:, None].swapaxes(0, 1)
    parts = parts * valid[:, None, None, None]
    there = (
        pairs[:, :, row][..., row][:, :, :, None] & (column == np.arange(BLOCK)[:, None]) & valid[:, None, None, None]
    )
    sorted_k, sorted_v = (jnp.einsum('bhicj,bjhd->bhicd', parts, x) for x in (k, v))
    q = q / jnp.sqrt(q.shape[-1])
    own = (row[:, None] == row) & (np.tri(LENGTH, dtype=bool) if causal else True) & valid[:, None, None]
    logits = jnp.concatenate(
        [
            jnp.where(own, jnp.einsum('bihd,bjhd->bhij', q, k), -1e9),
            jnp.where(there.any(axis=-1), jnp.einsum('bihd,bhicd->bhic', q, sorted_k), -1e9),
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum('bhij,bjhd->bihd', weights[..., :LENGTH], v)
    out += jnp.einsum('bhic,bhicd->bihd', weights[..., LENGTH:], sorted_v)
    return jnp.where(valid[..., None, None], out, 0)


def program(attend):
    @functools.partial(jax.jit, static_argnames='causal')
    def run(q, k, v, scores, valid, cotangent, causal):
        def masked(q, k, v, scores):
            out = attend(q, k, v, scores, valid=valid, causal=causal)
            return jnp.where(valid[..., None, None], out, 0)

        out, pull_back = jax.vjp(masked, q, k, v, scores)
        return out, *pull_back(cotangent.astype(out.dtype))

    return run


oracle = program(naive)
fast = program(functools.partial(attend_sinkhorn, block=BLOCK, iterations=ITERATIONS))


@causal_or_not
@pytest.mark.parametrize(
    ('dtype', 'valid'),
    [(jnp.float32, np.ones((2, LENGTH), bool)), (jnp.float32, SCATTERED), (jnp.bfloat16, SCATTERED)],
    ids=['float32', 'float32-padded', 'bfloat16-padded'],
)
def test_fast_equals_naive_with_gradients(dtype, valid, causal):
    *qkv, cotangent = draw(*SHAPE, count=4, dtype=dtype)
    (scores,) = draw(2, 2, BLOCKS, BLOCKS, count=1)
    actual = fast(*qkv, scores, valid, cotangent, causal)
    assert actual[0].dtype == dtype
    expected = oracle(*(x.astype(jnp.float32) for x in qkv), scores, valid, cotangent.astype(jnp.float32), causal)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, TOLERANCE[dtype])


def test_balancing_makes_rows_and_columns_sum_to_one():
    (scores,) = draw(1, 2, 4, 4, count=1)
    balanced = balance(scores, jnp.ones((1, 1, 4, 4), bool), iterations=50, causal=False)
    assert_close(balanced.sum(axis=2), np.ones((1, 2, 4)), 1e-5)
    assert_close(balanced.sum(axis=3), np.ones((1, 2, 4)), 1e-5)


def test_a_low_temperature_sorts():
    scores = jnp.log(jnp.asarray([[0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.9, 0.05, 0.05]]))[None, None] / 0.02
    balanced = balance(scores, jnp.ones((1, 1, 3, 3), bool), iterations=50, causal=False)
    assert_close(balanced[0, 0], [[0, 1, 0], [0, 0, 1], [1, 0, 0]], 1e-5)


def test_pooling_by_hand():
    x = jnp.arange(1.0, 8)[None, :, None]
    assert pool(x, 3, causal=False)[0, :, 0].tolist() == [6, 15, 7]
    assert pool(x, 3, causal=True)[0, :, 0].tolist() == [1, 10, 28]


def test_noise_is_of_training_only_and_seeded():
    module = make_attention('sinkhorn', {'block': BLOCK}, width=16, heads=2, max_length=LENGTH)
    x, positions = draw(1, LENGTH, 16, count=1)[0], jnp.arange(LENGTH)[None]
    variables = random_variables(module, x, positions)

    @jax.jit
    def run(seed):
        apply = functools.partial(module.apply, variables, x, positions, rngs={'dropout': jax.random.key(seed)})
        return apply(), apply(deterministic=False)

    (still, one), (again, same), (unmoved, other) = run(0), run(0), run(1)
    np.testing.assert_array_equal(still, again)
    np.testing.assert_array_equal(still, unmoved)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert (one != still).any()
    np.testing.assert_array_equal(one[:, :BLOCK], still[:, :BLOCK])  # the first block has no neighbour before it


def test_what_is_longer_than_planned_is_refused():
    module = make_attention('sinkhorn', {'block': BLOCK}, width=16, heads=2, max_length=LENGTH)
    x = jnp.zeros((1, 26, 16))
    with pytest.raises(ValueError, match='6 blocks of 5 are more than max_length=23; set max_length to the longest'):
        jax.eval_shape(module.init, jax.random.key(0), x, jnp.arange(26)[None])


def test_a_temperature_and_a_length_are_asked_for_each_by_its_name():
    for temperature in (0.0, -1.0, float('nan')):
        with pytest.raises(ValueError, match=f'Sinkhorn: temperature={temperature} .*: set it above 0'):
            registry.make_mechanism('sinkhorn', {'temperature': temperature})
    with pytest.raises(ValueError, match=r'for each block: set max_length(\n|$)'):
        make_attention('sinkhorn', width=16, heads=2).init(
            jax.random.key(0), jnp.zeros((1, 4, 16)), jnp.arange(4)[None]
        )
