import jax.numpy as jnp
import numpy as np
from cases import assert_close, draw

from combiner.ops.blocks import block_segment_ids
from combiner.ops.pooling import PLAIN
from combiner.ops.segments import PADDING_ID, edge_id, same_segment
from combiner.ops.spans import decode_spans, encode_tokens, merge_neighbours, summarise, summary_masks


def test_padding_has_the_padding_id():
    segments = jnp.array([[5, 5, 2]])
    assert block_segment_ids(1, 3, 2, causal=True, valid=None, segments=None) is None
    assert block_segment_ids(1, 3, 2, causal=False, valid=None, segments=None).tolist() == [[0, 0], [0, PADDING_ID]]
    assert block_segment_ids(1, 2, 2, causal=False, valid=None, segments=None) is None
    found = block_segment_ids(1, 2, 2, causal=False, valid=None, segments=None, beyond_end=True)
    assert found.tolist() == [[0, 0]]
    valid = jnp.array([[True, False, True]])
    assert block_segment_ids(1, 3, 2, causal=True, valid=valid, segments=segments).tolist() == [
        [5, PADDING_ID],
        [2, PADDING_ID],
    ]


def test_the_edge_id_is_the_last_or_first_id_that_is_no_padding():
    segment_ids = jnp.array([[3, 3, 1, PADDING_ID], [PADDING_ID, 2, 4, 4], [PADDING_ID] * 4])
    assert edge_id(segment_ids, last=True).tolist() == [1, 4, PADDING_ID]
    assert edge_id(segment_ids, last=False).tolist() == [3, 2, PADDING_ID]


def test_merged_neighbours_pool_the_members_of_one_segment():
    q, k = draw(1, 2, 8, 4, count=2)  # one head, two blocks of eight positions
    segment_ids = np.array([[3, 3, 1, PADDING_ID, 1, 9, 9, PADDING_ID], [PADDING_ID] * 4 + [2, 2, PADDING_ID, 6]])
    for pools in PLAIN.values():
        for last in (True, False):
            pairs = merge_neighbours(encode_tokens(q, k, jnp.asarray(segment_ids), pools), 2, pools, last=last)
            spans = merge_neighbours(pairs, 4, pools, last=last)
            query, key = decode_spans(spans, pools, q.dtype)
            for block, shared in enumerate([9, 6] if last else [3, 2]):
                assert spans.segment_ids[block, 0] == shared
                members = segment_ids[block] == shared
                for x, pooled, pool, scale in ((q, query, pools.q, 4**-0.5), (k, key, pools.k, 1.0)):
                    expected = scale * pool(x[:, block, np.flatnonzero(members)])
                    np.testing.assert_allclose(pooled[:, block, 0], expected, rtol=1e-6)


def test_a_span_without_members_is_zero():
    q, k = draw(1, 1, 2, 4, count=2)
    pools = PLAIN['max']
    spans = merge_neighbours(encode_tokens(q, k, jnp.array([[PADDING_ID, PADDING_ID]]), pools), 2, pools, last=True)
    for x in decode_spans(spans, pools, q.dtype):
        np.testing.assert_array_equal(x, 0)


def test_positions_with_equal_segment_ids_attend_to_each_other():
    mask = jnp.array([[True, False], [True, True]])
    assert same_segment(None, None, mask) is mask
    assert same_segment(jnp.array([1, 2]), jnp.array([2, 1]), mask).tolist() == [[False, False], [True, False]]


def test_no_block_attends_to_a_block_without_members():
    inside = jnp.array([[True, False, True], [True, False, False], [True, True, False], [False, False, False]])
    ids = jnp.where(inside, 0, PADDING_ID)
    (mask,) = summary_masks(ids, batch=2, blocks=2, causal=False, packed=False)
    np.testing.assert_array_equal(mask.members, inside)
    np.testing.assert_array_equal(mask.visible[:, 0].astype(int), [[0, 1], [1, 0], [0, 0], [1, 0]])


def test_the_summary_of_a_document_is_of_the_end_of_a_block_next_to_it():
    segments = jnp.array([[7, 7, 4], [4, 4, 9]])
    last, first = summary_masks(segments, batch=1, blocks=2, causal=False, packed=True)
    np.testing.assert_array_equal(last.members.astype(int), [[0, 0, 1], [0, 0, 1]])
    np.testing.assert_array_equal(last.visible.astype(int), [[[0, 0]] * 3, [[1, 0], [1, 0], [0, 0]]])
    np.testing.assert_array_equal(first.members.astype(int), [[1, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(first.visible.astype(int), [[[0, 0], [0, 0], [0, 1]], [[0, 0]] * 3])
    inside = jnp.array([[True, True, False], [False, True, True]])
    ids = jnp.where(inside, segments, PADDING_ID)
    (mask,) = summary_masks(ids, batch=1, blocks=2, causal=True, packed=True)
    np.testing.assert_array_equal(mask.members.astype(int), [[1, 1, 0], [0, 0, 1]])
    assert not mask.visible.any()


def test_summary_of_members_only():
    q, k, v = draw(2, 5, 4)
    members = jnp.array([[True, True, False, True, False], [False] * 5])
    key, value = summarise(q, k, v, members, pools=PLAIN['max'])
    chosen = np.array([0, 1, 3])
    logits = np.asarray(k[0, chosen]) @ np.asarray(q[0, chosen]).max(0) / 4**0.5
    weights = np.exp(logits) / np.exp(logits).sum()
    assert_close(key, np.stack([np.asarray(k[0, chosen]).max(0), np.zeros(4)]), 1e-6)
    assert_close(value, np.stack([weights @ np.asarray(v[0, chosen]), np.zeros(4)]), 1e-6)
