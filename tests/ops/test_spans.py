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


def test_the_edge_is_the_last_or_first_label_of_somebody():
    labels = jnp.array([[3, 3, 1, PADDING_ID], [PADDING_ID, 2, 4, 4], [PADDING_ID] * 4])
    assert edge_id(labels, last=True).tolist() == [1, 4, PADDING_ID]
    assert edge_id(labels, last=False).tolist() == [3, 2, PADDING_ID]


def test_a_fold_pools_the_members_of_one_segment():
    q, k = draw(1, 2, 8, 4, count=2)  # one head, two blocks of eight positions
    labels = np.array([[3, 3, 1, PADDING_ID, 1, 9, 9, PADDING_ID], [PADDING_ID] * 4 + [2, 2, PADDING_ID, 6]])
    for pools in PLAIN.values():
        for last in (True, False):
            pairs = merge_neighbours(encode_tokens(q, k, jnp.asarray(labels), pools), 2, pools, last=last)
            spans = merge_neighbours(pairs, 4, pools, last=last)
            query, key = decode_spans(spans, pools, q.dtype)
            for block, shared in enumerate([9, 6] if last else [3, 2]):
                assert spans.segment_ids[block, 0] == shared
                members = labels[block] == shared
                for x, pooled, pool, scale in ((q, query, pools.q, 4**-0.5), (k, key, pools.k, 1.0)):
                    expected = scale * pool(x[:, block, np.flatnonzero(members)])
                    np.testing.assert_allclose(pooled[:, block, 0], expected, rtol=1e-6)


def test_a_span_without_members_is_zero():
    q, k = draw(1, 1, 2, 4, count=2)
    pools = PLAIN['max']
    spans = merge_neighbours(encode_tokens(q, k, jnp.array([[PADDING_ID, PADDING_ID]]), pools), 2, pools, last=True)
    for x in decode_spans(spans, pools, q.dtype):
        np.testing.assert_array_equal(x, 0)


def test_labels_that_are_equal_see_each_other():
    mask = jnp.array([[True, False], [True, True]])
    assert same_segment(None, None, mask) is mask
    assert same_segment(jnp.array([1, 2]), jnp.array([2, 1]), mask).tolist() == [[False, False], [True, False]]


def test_nobody_sees_a_block_without_members():
    inside = jnp.array([[True, False, True], [True, False, False], [True, True, False], [False, False, False]])
    ids = jnp.where(inside, 0, PADDING_ID)
    (view,) = summary_masks(ids, batch=2, blocks=2, causal=False, packed=False)
    np.testing.assert_array_equal(view.members, inside)
    np.testing.assert_array_equal(view.visible[:, 0].astype(int), [[0, 1], [1, 0], [0, 0], [1, 0]])


def test_segments_are_seen_through_the_end_of_a_block_that_touches_them():
    segments = jnp.array([[7, 7, 4], [4, 4, 9]])
    last, first = summary_masks(segments, batch=1, blocks=2, causal=False, packed=True)
    np.testing.assert_array_equal(last.members.astype(int), [[0, 0, 1], [0, 0, 1]])
    np.testing.assert_array_equal(last.visible.astype(int), [[[0, 0]] * 3, [[1, 0], [1, 0], [0, 0]]])
    np.testing.assert_array_equal(first.members.astype(int), [[1, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(first.visible.astype(int), [[[0, 0], [0, 0], [0, 1]], [[0, 0]] * 3])
    inside = jnp.array([[True, True, False], [False, True, True]])
    ids = jnp.where(inside, segments, PADDING_ID)
    (view,) = summary_masks(ids, batch=1, blocks=2, causal=True, packed=True)
    np.testing.assert_array_equal(view.members.astype(int), [[1, 1, 0], [0, 0, 1]])
    assert not view.visible.any()


def test_summary_of_members_only():
    q, k, v = draw(2, 5, 4)
    members = jnp.array([[True, True, False, True, False], [False] * 5])
    key, value = summarise(q, k, v, members, pools=PLAIN['max'])
    chosen = np.array([0, 1, 3])
    logits = np.asarray(k[0, chosen]) @ np.asarray(q[0, chosen]).max(0) / 4**0.5
    weights = np.exp(logits) / np.exp(logits).sum()
    assert_close(key, np.stack([np.asarray(k[0, chosen]).max(0), np.zeros(4)]), 1e-6)
    assert_close(value, np.stack([weights @ np.asarray(v[0, chosen]), np.zeros(4)]), 1e-6)
