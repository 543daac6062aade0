import jax
import jax.numpy as jnp
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw

import combiner
from combiner.core import registry
from combiner.core.mechanism import Context


@causal_or_not
def test_a_wide_tree_is_softmax_attention_and_one_of_two_levels_is_combiner_fixed(causal):
    @jax.jit
    def attend(*qkv):
        tree = [combiner.attend(*qkv, 'combiner_tree', causal=causal, branch=branch) for branch in (23, 5)]
        fixed = combiner.attend(*qkv, 'combiner_fixed', causal=causal, block=5)
        return tree, [jax.nn.dot_product_attention(*qkv, is_causal=causal), fixed]

    for actual, expected in zip(*attend(*draw(2, 23, 1, 4)), strict=True):
        assert_close(actual, expected, TOLERANCE[jnp.float32])


def test_a_node_has_two_children_at_least():
    with pytest.raises(ValueError, match='branch must be at least 2, got 1'):
        combiner.attend(*draw(1, 4, 1, 4), 'combiner_tree', causal=True, branch=1)


def test_the_cache_grows_with_the_logarithm_of_the_length():
    tree = registry.make_mechanism('combiner_tree', {'branch': 4})

    def size(capacity):
        q, counts = jnp.zeros((1, 16, 2, 4)), jnp.array([16])
        cache = jax.eval_shape(lambda q, counts: tree.init_cache(q, q, q, Context(), counts, capacity), q, counts)
        return sum(leaf.size for leaf in jax.tree.leaves(cache))

    assert size(4**6) == 2 * size(4**3) == 6 * size(4)
