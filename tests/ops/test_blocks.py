import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, draw

from combiner.ops import chunking
from combiner.ops.blocks import (
    Blocks,
    KeyGroup,
    attend_groups,
    attend_one,
    block_segment_ids,
    blocks_by_sequence,
    merge_blocks,
    split_blocks,
    transpose_grid,
)
from combiner.ops.chunking import Target
from combiner.ops.segments import PADDING_ID


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


def test_segment_ids_are_needed_only_where_padding_could_be_attended_to():
    nothing = {'valid': None, 'segments': None}
    assert block_segment_ids(1, 7, 3, causal=True, **nothing) is None
    assert block_segment_ids(1, 6, 3, causal=False, **nothing) is None
    found = block_segment_ids(1, 6, 3, causal=False, beyond_end=True, **nothing)
    np.testing.assert_array_equal(found != PADDING_ID, [[True] * 3] * 2)
    found = block_segment_ids(1, 4, 3, causal=False, **nothing)
    np.testing.assert_array_equal(found != PADDING_ID, [[True] * 3, [True, False, False]])
    valid = jnp.array([[True, False, True, True], [True, True, False, False]])
    found = block_segment_ids(2, 4, 3, causal=True, valid=valid, segments=None)
    np.testing.assert_array_equal((found != PADDING_ID).astype(int), [[1, 0, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])


def draw_groups():
    """Two blocks of three queries: their own keys, some of a side, and four that each of two sequences shares."""
    q, k, v = draw(2, 4, 3, 8)  # heads, blocks of two sequences, positions, head width
    side_k, side_v = draw(2, 4, 2, 8, count=2, seed=1)
    shared_k, shared_v = draw(2, 2, 4, 8, count=2, seed=2)
    own = jnp.tri(3, dtype=bool)[None]
    side = jnp.array([[False, True]])[None]
    visible = jnp.array([[[True, False, False, True]], [[False] * 4], [[True] * 4], [[False, True, True, False]]])
    ids = jnp.array([[1, 1, 2], [2, 2, 2], [1, 1, 1], [1, PADDING_ID, PADDING_ID]])
    groups = [KeyGroup(k, v, own, ids), KeyGroup(side_k, side_v, side), KeyGroup(shared_k, shared_v, visible)]
    return q, groups, ids


def test_groups_of_keys_are_attended_to_in_one_softmax():
    """Against one softmax over all keys, query by query."""
    q, groups, ids = draw_groups()
    attended = attend_groups(q, groups, ids)
    for head, block, position in np.ndindex(*q.shape[:3]):
        keys, values = [], []
        for group in groups:
            at = block if group.k.shape[1] == 4 else block // 2
            mask = jnp.broadcast_to(group.mask, (4, 3, group.k.shape[2]))[block, position]
            if group.segment_ids is not None:
                mask &= group.segment_ids[block] == ids[block, position]
            keys.append(group.k[head, at][mask])
            values.append(group.v[head, at][mask])
        logits = np.concatenate(keys) @ q[head, block, position] / 8**0.5
        weights = np.exp(logits) / np.exp(logits).sum()
        assert_close(attended[head, block, position], weights @ np.concatenate(values), 1e-5)


def test_a_query_without_keys_gets_zeros():
    q, (own, *_), _ = draw_groups()
    np.testing.assert_array_equal(attend_groups(q, [own._replace(mask=jnp.zeros((1, 1, 3), bool))]), jnp.zeros_like(q))


def test_one_query_attends_as_in_a_block():
    q, groups, _ = draw_groups()
    own = groups[0]._replace(segment_ids=None)
    expected = attend_groups(q, [own, groups[1]])
    masks = jnp.ones(3, bool), groups[1].mask[0, 0]
    one = [KeyGroup(group.k[:, 1], group.v[:, 1], mask) for group, mask in zip((own, groups[1]), masks, strict=True)]
    assert_close(attend_one(q[:, 1, 2], *one), expected[:, 1, 2], 1e-6)


@pytest.mark.parametrize('logits', [2**18, 1])
def test_blocks_are_mapped_whatever_the_step(logits, monkeypatch):
    monkeypatch.setattr(chunking, 'CHUNK_LOGITS', logits)
    monkeypatch.setattr(chunking, 'target', lambda: Target('cpu', 1))
    q, k, v = draw(2, 7, 3, 4)
    blocks = Blocks.of(q, 2)
    tokens = blocks.tokens(q, k, v, causal=True, segments=jnp.tile(jnp.arange(7), (2, 1)))
    shapes = []

    def total(tokens):
        shapes.append(tokens.q.shape)
        return tokens.v.sum(axis=2)  # h m d

    def add(tokens, sums):
        return tokens.q + sums[:, :, None] + tokens.segment_ids[..., None]

    sums = blocks.map(total, tokens, keys=2)
    assert sums.shape == (8, 3, 4)
    assert shapes[0] == ((3, 8, 2, 4) if logits > 1 else (3, 2, 2, 4))
    padded = jnp.pad(v, ((0, 0), (0, 1), (0, 0), (0, 0))).reshape(2, 4, 2, 3, 4).sum(axis=2)
    assert_close(sums, padded.reshape(8, 3, 4), 1e-6)
    expected = q + jnp.repeat(padded, 2, axis=1)[:, :7] + jnp.arange(7)[:, None, None]
    assert_close(blocks.attend(add, tokens, sums, keys=2), expected, 1e-6)
    np.testing.assert_array_equal(blocks.by_sequence(sums)[1, 0], padded[0, :, 1])
