"""The frame, and what it does for a mechanism that says nothing but its pattern."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, draw, random_variables, sizes_of, those
from flax import linen as nn

from combiner import patterns, reference
from combiner.attention.full import Full
from combiner.core import registry
from combiner.core.mechanism import Context, Mechanism
from combiner.core.module import Attention, _check_positions, make_attention
from combiner.core.pooled import Pooled

POSITIONS = jnp.arange(9)[None]


class EveryOther(Mechanism):
    """Itself and every second position before."""

    def pattern(self, length):
        i, j = np.ogrid[:length, :length]
        return patterns.sparse((j <= i) & ((i - j) % 2 == 0))


def initialised(module, x):
    return {'params': module.init(jax.random.key(0), x, POSITIONS)['params']}


def test_a_pattern_alone_attends_and_decodes():
    module = Attention(EveryOther(max_length=9), width=8, heads=2)
    (x,) = draw(2, 9, 8, count=1)
    params = initialised(module, x)
    expected = module.apply(params, x, POSITIONS)
    q, k, v = module.apply(params, x, POSITIONS, method='_project')
    mechanism = module.mechanism
    expected_alone = reference.attend(q, k, v, mechanism.pattern(9))
    np.testing.assert_array_equal(mechanism.attend(q, k, v, Context()), expected_alone)
    _, cache = module.apply(
        params, x[:, :4], POSITIONS[:, :4], jnp.array([4, 2]), 9, method='prefill', mutable=['cache']
    )
    for step in range(5):
        index = jnp.array([4, 2]) + step
        rows = jnp.arange(2)
        attended, cache = module.apply(
            {**params, **cache}, x[rows, index][:, None], index, method='decode', mutable=['cache']
        )
        assert_close(attended[:, 0], expected[rows, index], 1e-5)


@pytest.mark.parametrize('name', registry.names())
def test_the_own_attend_of_a_subclass_gets_as_many_key_heads_as_query_heads(name):
    """Also if implementations of the mechanism take fewer."""
    given = []

    class Own(registry.resolve(name)):
        def attend(self, q, k, v, context):
            given.extend(x.shape[2] for x in (q, k, v))
            return q

    mechanism = Own(causal=Own.supported_causal[0], max_length=9, **sizes_of(name))
    module = Attention(mechanism, width=8, heads=4, kv_heads=2)
    jax.eval_shape(module.init, jax.random.key(0), *draw(1, 9, 8, count=1), POSITIONS)
    assert given == [4, 4, 4]


class SeparatesNothing(EveryOther):
    """Says that it supports packed documents, and leaves them to the oracle."""

    supports_segments = True


def test_the_oracle_does_not_ignore_packed_documents():
    q, k, v = draw(1, 9, 2, 4)
    segments = jnp.repeat(jnp.arange(3), 3)[None]
    with pytest.raises(ValueError, match=r'define SeparatesNothing\.attend for packed documents'):
        SeparatesNothing().attend(q, k, v, Context(segments=segments))
    module = Attention(SeparatesNothing(), width=8, heads=2)
    (x,) = draw(1, 9, 8, count=1)
    with pytest.raises(ValueError, match=r'define SeparatesNothing\.attend for packed documents'):
        module.apply(initialised(module, x), x, POSITIONS, segments=segments)


def test_a_mechanism_without_a_pattern_says_so():
    with pytest.raises(NotImplementedError, match='Mechanism has no pattern'):
        Mechanism().pattern(4)


def test_decoding_says_what_it_needs():
    (x,) = draw(1, 9, 8, count=1)
    module = Attention(Full(max_length=9), width=8, heads=2)
    params = initialised(module, x)

    def prefill(module, capacity):
        return module.apply(params, x, POSITIONS, jnp.array([9]), capacity, method='prefill', mutable=['cache'])

    with pytest.raises(ValueError, match='cannot decode: each position sees those after it'):
        prefill(module.clone(mechanism=Full(causal=False, max_length=9)), 9)
    with pytest.raises(ValueError, match='set max_length=12: sizes must not follow from a prompt of 9'):
        prefill(module.clone(mechanism=Full()), 12)
    with pytest.raises(ValueError, match='prompts of 9 positions do not fit into capacity=8'):
        prefill(module, 8)
    with pytest.raises(ValueError, match='call prefill first'):
        module.apply(params, x[:, :1], jnp.array([0]), method='decode', mutable=['cache'])


@pytest.mark.parametrize('shape', [(1, 1), (2, 8), (3, 9), (9,)])
def test_positions_that_would_be_broadcast_or_cut_are_refused(shape):
    """The types of the tests' arrays say so before; a user's do not."""
    with pytest.raises(ValueError, match=r'positions must be \[1 or 2, 9\] for x \[2, 9, 8\]'):
        _check_positions(jnp.zeros(shape, int), jnp.ones((2, 9, 8)))


@pytest.mark.parametrize('name', ['full', 'combiner_fixed', 'performer'])
def test_decoding_behind_the_capacity_gives_nan(name):
    """The layer sees to it, for every mechanism: one with an exact cache, one with room in its last block, and sums."""
    module = make_attention(name, sizes_of(name), width=16, heads=2, max_length=9)
    (x,) = draw(2, 9, 16, count=1)
    params = random_variables(module, x, POSITIONS)
    prompt = x[:, :6], POSITIONS[:, :6], jnp.array([6, 3]), 6

    @jax.jit
    def decode(index):
        _, cache = module.apply(params, *prompt, method='prefill', mutable=['cache'])
        return module.apply({**params, **cache}, x[:, :1], index, method='decode', mutable=['cache'])[0]

    for outside in (6, -1):
        behind, within = decode(jnp.array([outside, 3]))
        assert jnp.isnan(behind).all()
        assert jnp.isfinite(within).all()


@pytest.mark.parametrize('wrong', ['full', Full])
def test_what_is_no_mechanism_is_refused(wrong):
    """Without the checks of types, which only tests have."""
    with pytest.raises(TypeError, match=r'is none: give one, such as CombinerFixed.* use .*make_attention'):
        Attention.__post_init__(SimpleNamespace(mechanism=wrong))


def test_causal_is_true_or_false():
    wrong = object.__new__(Full)  # the constructor checks types in tests
    for name, value in {'causal': None, 'max_length': None, 'implementation': None}.items():
        object.__setattr__(wrong, name, value)
    with pytest.raises(ValueError, match='Full: causal=None must be True or False'):
        wrong.__post_init__()


class PooledPattern(Pooled):
    """Nothing but the pattern of `combiner_fixed`."""

    def pattern(self, length):
        return registry.make_mechanism('combiner_fixed', {'block': 4}).pattern(length)


def test_the_oracle_is_not_asked_for_a_pooling_that_it_does_not_have():
    q, k, v = draw(1, 9, 2, 4)
    expected = reference.attend(q, k, v, PooledPattern().pattern(9))
    np.testing.assert_array_equal(PooledPattern().attend(q, k, v, Context()), expected)
    for pool in ('mean', 'deepsets', 'attention'):
        with pytest.raises(ValueError, match=f'pool={pool}: the oracle pools by max; .* define PooledPattern.attend'):
            PooledPattern(pool=pool).attend(q, k, v, Context())


def test_grouped_queries_have_smaller_projections():
    (x,) = draw(2, 9, 8, count=1)
    params = initialised(Attention(Full(), width=8, heads=4, kv_heads=2), x)['params']
    shapes = {name: value.value.shape for name, value in params.items()}
    assert shapes == {
        'query_kernel': (8, 4, 2),
        'key_kernel': (8, 2, 2),
        'value_kernel': (8, 2, 2),
        'out_kernel': (4, 2, 8),
    }


@pytest.mark.parametrize('bias', [False, True], ids=['plain', 'biased'])
def test_nan_in_padding_reaches_no_output_and_no_gradient(bias):
    module = Attention(Full(), width=8, heads=2, bias=bias)
    (x,) = draw(2, 9, 8, count=1)
    valid = jnp.arange(9) < jnp.array([[9], [5]])
    spoilt = jnp.where(valid[..., None], x, jnp.nan)
    params = initialised(module, x)
    loss = lambda params, x: (module.apply(params, x, POSITIONS, valid=valid) ** 2).sum()  # noqa: E731
    for actual, expected in zip(
        jax.tree.leaves(jax.grad(loss, (0, 1))(params, spoilt)),
        jax.tree.leaves(jax.grad(loss, (0, 1))(params, x)),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, expected)


def test_dropout_only_in_training():
    module = Attention(Full(), width=8, heads=2, dropout=0.5)
    (x,) = draw(2, 9, 8, count=1)
    params = initialised(module, x)
    still = module.apply(params, x, POSITIONS)
    np.testing.assert_array_equal(still, Attention(Full(), width=8, heads=2).apply(params, x, POSITIONS))
    moved = [
        module.apply(params, x, POSITIONS, deterministic=False, rngs={'dropout': jax.random.key(seed)})
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(moved[0], moved[1])
    assert (moved[0] != moved[2]).any()
    assert (moved[0] != still).any()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'width': 8, 'heads': 3}, '3 heads do not divide the width 8'),
        ({'width': 8, 'heads': 4, 'kv_heads': 3}, '3 key heads do not divide 4 heads'),
        ({'width': 8, 'heads': 4, 'kv_heads': 0}, '0 key heads do not divide 4 heads'),
        ({'width': 8, 'heads': 4, 'dropout': 1.0}, 'dropout=1.0 must be at least 0 and less than 1'),
        ({'width': 6, 'heads': 2, 'rotary': True}, 'even head width, got 3'),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    (x,) = draw(1, 9, settings['width'], count=1)
    with pytest.raises(ValueError, match=message):
        Attention(Full(), **settings).init(jax.random.key(0), x, POSITIONS)


def test_biases_of_projections_are_added_before_and_after_attention():
    (x,) = draw(2, 9, 8, count=1)
    module = Attention(Full(), width=8, heads=4, kv_heads=2, value_width=16, bias=True)
    params = random_variables(module, x, POSITIONS)
    of = params['params']
    valid = jnp.arange(9) < jnp.array([[9], [5]])
    q, k, v = (x @ of[f'{r}_kernel'].reshape(8, -1) + of[f'{r}_bias'].reshape(-1) for r in ('query', 'key', 'value'))
    q, k, v = q.reshape(2, 9, 4, 2), k.reshape(2, 9, 2, 2).repeat(2, axis=2), v.reshape(2, 9, 2, 4).repeat(2, axis=2)
    logits = jnp.einsum('blhd,bmhd->bhlm', q, k) / 2**0.5
    logits = jnp.where(jnp.tri(9, dtype=bool) & valid[:, None, None], logits, -1e9)
    attended = jnp.einsum('bhlm,bmhd->blhd', jax.nn.softmax(logits), v)
    expected = jnp.einsum('blhd,hde->ble', attended, of['out_kernel']) + of['out_bias']
    actual = module.apply(params, x, POSITIONS, valid=valid)
    assert_close(jnp.where(valid[..., None], actual - expected, 0), jnp.zeros_like(x), 1e-5)


@pytest.mark.parametrize('name', [name for name in those(requires='', allows_value_width=True) if name != 'performer'])
def test_values_twice_as_wide_are_two_attentions(name):
    """Performer draws its features for another width, and only their mean is the same."""
    (x,) = draw(1, 9, 8, count=1)
    causal = registry.resolve(name).supported_causal[0]
    frame = {'width': 8, 'heads': 2, 'causal': causal, 'max_length': 9}
    wide, narrow = (make_attention(name, sizes_of(name), **frame, value_width=width) for width in (16, 8))
    params = random_variables(wide, x, POSITIONS)

    @jax.jit
    def run(params):
        halves = []
        for half in (slice(0, 4), slice(4, 8)):
            of = dict(params['params'])
            of |= {'value_kernel': of['value_kernel'][:, :, half], 'out_kernel': of['out_kernel'][:, half]}
            halves.append(narrow.apply({'params': of}, x, POSITIONS))
        return wide.apply(params, x, POSITIONS), sum(halves)

    assert_close(*run(params), 1e-5)


def test_heads_may_be_narrower_together_than_the_model():
    (x,) = draw(2, 9, 8, count=1)
    module = Attention(Full(), width=8, heads=2, qkv_width=4)
    params = initialised(module, x)
    shapes = {name: value.shape for name, value in nn.unbox(params)['params'].items()}
    assert shapes == {
        'query_kernel': (8, 2, 2),
        'key_kernel': (8, 2, 2),
        'value_kernel': (8, 2, 2),
        'out_kernel': (2, 2, 8),
    }
    assert module.apply(params, x, POSITIONS).shape == x.shape
    with pytest.raises(ValueError, match='2 heads do not divide the width 5'):
        initialised(Attention(Full(), width=8, heads=2, qkv_width=5), x)
