"""Grid mechanisms with other hyper-parameters than the defaults, which `test_every_mechanism` tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw, oracle

import combiner
from combiner import reference
from combiner.attention.combiner_mixture import AXIAL, CombinerMixture
from combiner.core import registry
from combiner.core.mechanism import Context

LENGTH = 13
HALVES = {'columns': 5, 'split': True}
FORMS = [
    pytest.param('combiner_axial_horizontal', HALVES, id='horizontal-split'),
    pytest.param('combiner_mixture', HALVES, id='mixture-split'),
    pytest.param('combiner_mixture', {'columns': 5, 'joint': True}, id='joint'),
    pytest.param('combiner_mixture', {**HALVES, 'joint': True}, id='joint-split'),
    pytest.param('combiner_mixture', {'columns': 5, 'parts': ('combiner_fixed', 'axial')}, id='other-parts'),
]
GRIDS = ['combiner_axial_horizontal', 'combiner_axial_vertical', 'combiner_mixture']


def with_gradients(attend, *qkv):
    (cotangent,) = draw(*qkv[0].shape, count=1, seed=7)

    @jax.jit
    def run(*qkv):
        out, pull_back = jax.vjp(attend, *qkv)
        return out, *pull_back(cotangent)

    return run(*qkv)


@causal_or_not
@pytest.mark.parametrize(('name', 'hyper'), FORMS)
def test_equals_oracle_with_gradients(name, hyper, causal):
    qkv = draw(2, LENGTH, 2, 8)
    valid = jnp.asarray(np.random.default_rng(0).random((2, LENGTH)) > 0.3)
    pattern = combiner.pattern(name, LENGTH, causal=causal, **hyper)
    fast = with_gradients(lambda *x: combiner.attend(*x, name, causal=causal, valid=valid, **hyper), *qkv)
    slow = oracle(pattern, *qkv, *draw(*qkv[0].shape, count=1, seed=7), valid)
    for one, other in zip(fast, slow, strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@pytest.mark.parametrize(('name', 'hyper'), FORMS)
def test_decoding_equals_the_parallel_form(name, hyper):
    mechanism = registry.make_mechanism(name, hyper, max_length=LENGTH)
    q, k, v = draw(2, LENGTH, 2, 8)
    (x,) = draw(2, LENGTH, 16, count=1)
    expected = jax.jit(lambda *qkv: mechanism.attend(*qkv, Context()))(q, k, v)
    counts, rows = jnp.array([0, 6]), jnp.arange(2)
    start = jax.jit(lambda x, *qkv: mechanism.init_cache(*qkv, Context(x), counts, LENGTH))
    cache = start(*(a[:, :6] for a in (x, q, k, v)))
    step = jax.jit(lambda cache, index, x, *qkv: mechanism.decode_step(cache, index, *qkv, Context(x)))
    for index in [counts + more for more in range(LENGTH - 6)]:
        cache, out = step(cache, index, *(a[rows, index] for a in (x, q, k, v)))
        assert_close(out, expected[rows, index], TOLERANCE[jnp.float32])


@pytest.mark.parametrize('name', GRIDS)
def test_one_row_or_one_column_is_softmax_attention(name):
    q, k, v = draw(2, LENGTH, 3, 8)
    for columns in (1, LENGTH, 40):
        actual = jax.jit(lambda *x, columns=columns: combiner.attend(*x, name, causal=True, columns=columns))(q, k, v)
        assert_close(actual, jax.nn.dot_product_attention(q, k, v, is_causal=True), TOLERANCE[jnp.float32])


def test_the_mixture_is_the_mean_of_its_parts():
    qkv = draw(2, LENGTH, 2, 8)

    def attend(name, **hyper):
        return jax.jit(lambda *x: combiner.attend(*x, name, causal=True, columns=5, **hyper))(*qkv)

    vertical, horizontal = attend('combiner_axial_vertical'), attend('combiner_axial_horizontal')
    assert_close(attend('combiner_mixture'), (vertical + horizontal) / 2, TOLERANCE[jnp.float32])
    parts = ('combiner_axial_horizontal', 'combiner_axial_vertical')  # in this order they are not computed together
    assert_close(attend('combiner_mixture', parts=parts), (vertical + horizontal) / 2, TOLERANCE[jnp.float32])


def test_the_mean_is_right_where_the_spans_of_one_part_outweigh_all_else():
    q, k, v = draw(1, LENGTH, 1, 4)
    q, k = jnp.abs(q) * 40, jnp.abs(k) * 40  # the logits of summaries exceed others by hundreds
    pattern = combiner.pattern('combiner_mixture', LENGTH, causal=True, columns=5)
    actual = jax.jit(lambda *x: combiner.attend(*x, 'combiner_mixture', causal=True, columns=5))(q, k, v)
    assert_close(actual, jax.jit(lambda *x: reference.attend(*x, pattern))(q, k, v), 1e-4)


@pytest.mark.parametrize('name', GRIDS)
def test_the_cache_grows_with_the_cells_and_few_rows(name):
    mechanism = registry.make_mechanism(name, {'columns': 8}, max_length=64)

    def size(capacity):
        start = lambda c: mechanism.init_cache(*draw(1, 16, 2, 4), Context(), c, capacity)  # noqa: E731
        cache = jax.eval_shape(start, jnp.array([16]))
        return sum(leaf.size for leaf in jax.tree.leaves(cache)) / 8  # heads times width

    cells = {'combiner_axial_vertical': 2, 'combiner_axial_horizontal': 4, 'combiner_mixture': 4}[name]
    rows = {'combiner_axial_vertical': 6, 'combiner_axial_horizontal': 2, 'combiner_mixture': 8}[name]
    assert [size(64), size(128)] == [cells * 64 + rows * 8, cells * 128 + rows * 8]


@pytest.mark.parametrize(
    ('hyper', 'message'),
    [
        ({'parts': ('axial',), 'joint': True}, r"joint, split and implementation are .* got parts=\('axial',\)"),
        ({'parts': ('axial',), 'implementation': 'xla'}, 'joint, split and implementation are for the parts'),
        ({'parts': ()}, 'a mixture needs at least one mechanism'),
        ({'parts': 'local'}, r"parts='local' must be of type tuple\[str, \.\.\.\], not str"),
        ({'parts': ('nothing',)}, "unknown mechanism 'nothing'"),
        ({'parts': ('local', 'combiner_routing')}, 'combiner_routing owns centroids, .* no part of a mixture; leave'),
        ({'parts': ('combiner_routing',), 'pool': 'attention'}, 'combiner_routing owns centroids'),
        ({'parts': ('linformer',)}, 'Linformer has no causal form'),
    ],
)
def test_mixtures_that_are_none_are_refused_when_they_are_made(hyper, message):
    with pytest.raises(ValueError, match=message):
        registry.make_mechanism('combiner_mixture', hyper)


def test_a_mixture_supports_what_all_its_parts_do():
    for parts in (('axial', 'combiner_fixed'), ('combiner_tree', 'linear')):
        mechanism = CombinerMixture(parts=parts)
        linear = 'linear' in parts
        assert (mechanism.supports_dropout, mechanism.allows_value_width) == (not linear, not linear)
        assert mechanism.full_support == linear
    assert CombinerMixture().supports_dropout
    assert CombinerMixture().full_support


def test_the_order_of_the_parts_does_not_matter():
    swapped = CombinerMixture(columns=5, parts=AXIAL[::-1])
    assert swapped.cost(23) == CombinerMixture(columns=5).cost(23) == swapped.pattern(23).cost()
