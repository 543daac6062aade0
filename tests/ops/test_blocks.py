import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, draw

from combiner.ops.blocks import blocks_by_sequence, merge_blocks, split_blocks, split_valid, summarise, transpose_grid
from combiner.ops.pooling import PLAIN


@pytest.mark.parametrize('size', [1, 3, 7, 10])
def test_merge_undoes_split(size):
    (x,) = draw(2, 7, 3, 4, count=1)
    blocks = split_blocks(x, size)
    rows = -(-7 // size)
    assert blocks.shape == (3, 2 * rows, size, 4)
    np.testing.assert_array_equal(blocks[1, rows, 0], x[1, 0, 1])
    np.testing.assert_array_equal(merge_blocks(blocks, 7), x)
    np.testing.assert_array_equal(blocks_by_sequence(blocks, rows)[1, 2, 0], blocks[2, rows])


def test_grid_transposed_twice_is_the_grid():
    (grid,) = draw(3, 2 * 5, 4, 6, count=1)
    columns = transpose_grid(grid, 5)
    assert columns.shape == (3, 2 * 4, 5, 6)
    np.testing.assert_array_equal(columns[1, 4 + 2, 3], grid[1, 5 + 3, 2])
    np.testing.assert_array_equal(transpose_grid(columns, 4), grid)


def test_blocks_hold_something():
    (x,) = draw(1, 4, 1, 2, count=1)
    with pytest.raises(ValueError, match='at least 1 position, got 0'):
        split_blocks(x, 0)


def test_validity_is_needed_only_where_padding_could_be_seen():
    assert split_valid(None, 1, 7, 3, causal=True) is None
    assert split_valid(None, 1, 6, 3, causal=False) is None
    np.testing.assert_array_equal(split_valid(None, 1, 4, 3, causal=False), [[True] * 3, [True, False, False]])
    valid = jnp.array([[True, False, True, True], [True, True, False, False]])
    inside = split_valid(valid, 2, 4, 3, causal=True)
    np.testing.assert_array_equal(inside.astype(int), [[1, 0, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])


def test_summary_of_members_only():
    q, k, v = draw(2, 5, 4)
    members = jnp.array([[True, True, False, True, False], [False] * 5])
    key, value = summarise(q, k, v, members, pools=PLAIN['max'])
    chosen = np.array([0, 1, 3])
    logits = np.asarray(k[0, chosen]) @ np.asarray(q[0, chosen]).max(0) / 4**0.5
    weights = np.exp(logits) / np.exp(logits).sum()
    assert_close(key, np.stack([np.asarray(k[0, chosen]).max(0), np.zeros(4)]), 1e-6)
    assert_close(value, np.stack([weights @ np.asarray(v[0, chosen]), np.zeros(4)]), 1e-6)
