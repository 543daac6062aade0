import jax
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw

import combiner
from combiner.core import registry
from combiner.core.mechanism import Context


@causal_or_not
@pytest.mark.parametrize('block', [1, 11, 40])
def test_one_block_and_blocks_of_one_are_softmax_attention(block, causal):
    q, k, v = draw(2, 11, 3, 8)
    actual = combiner.attend(q, k, v, 'combiner_fixed', causal=causal, block=block)
    assert_close(actual, jax.nn.dot_product_attention(q, k, v, is_causal=causal), TOLERANCE[q.dtype.type])


def test_default_block_costs_least():
    for length in (1, 64, 768, 4096):
        costs = {
            b: registry.make_mechanism('combiner_fixed', {'block': b}).cost(length).total
            for b in (1, 8, 16, 32, 64, 128)
        }
        assert registry.make_mechanism('combiner_fixed').cost(length).total <= min(costs.values())


def test_the_cache_holds_an_open_block_and_summaries_only():
    mechanism = registry.make_mechanism('combiner_fixed', {'block': 8})
    start = lambda counts: mechanism.init_cache(*draw(1, 64, 2, 4), Context(), counts, 64)  # noqa: E731
    cache = jax.eval_shape(start, jax.numpy.array([64]))
    assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == 2 * 4 * (3 * 8 + 2 * 8)
