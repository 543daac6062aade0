import jax.numpy as jnp
import numpy as np

from combiner.ops.blocks import summary_masks
from combiner.ops.segments import PADDING_ID


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
