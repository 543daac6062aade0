import jax.numpy as jnp
import numpy as np
from cases import assert_close, draw

from combiner.ops.pooling import PLAIN
from combiner.ops.segments import PADDING_ID
from combiner.ops.summaries import summarise, summary_masks


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
