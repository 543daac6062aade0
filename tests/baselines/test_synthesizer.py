"""Synthesizers against their definition; what every module must satisfy is in test_modules.py, with the dense one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw, random_variables

from combiner.baselines import synthesizer
from combiner.core.module import make_attention

LENGTH, PLANNED = 13, 17
POSITIONS = jnp.arange(LENGTH)[None]
PARAMETERS = {
    'dense': {'hidden_kernel', 'hidden_bias', 'score_kernel', 'score_bias'},
    'random': {'random'},
    'factorised_random': {'row_factor', 'column_factor'},
}
each_variant = pytest.mark.parametrize('variant', synthesizer.VARIANTS)


def made(variant, **frame):
    frame = {'width': 8, 'heads': 2, 'max_length': PLANNED} | frame
    module = make_attention('synthesizer', {'variant': variant, 'rank': 3}, **frame)
    (x,) = draw(2, LENGTH, 8, count=1)
    return module, random_variables(module, x, POSITIONS), x


def written_out(params, x, valid, causal):
    """The scores of all positions, position by position as in the paper, then softmax, values and the last matrix."""

    def dense(x):
        hidden = jax.nn.relu(x @ params['hidden_kernel'] + params['hidden_bias'][:, None])
        return hidden @ params['score_kernel'] + params['score_bias'][:, None]

    if 'random' in params:
        scores = jnp.broadcast_to(params['random'], (2, 2, PLANNED, PLANNED))
    elif 'row_factor' in params:
        scores = jnp.broadcast_to(params['row_factor'] @ params['column_factor'].mT, (2, 2, PLANNED, PLANNED))
    else:
        scores = jax.vmap(dense)(x)
    visible = jnp.broadcast_to(valid[:, None, None], (2, 1, LENGTH, LENGTH))
    visible = visible & jnp.tri(LENGTH, dtype=bool) if causal else visible
    scores = jnp.where(visible, scores[:, :, :LENGTH, :LENGTH], -jnp.inf)
    weights = jnp.where(visible.any(axis=-1, keepdims=True), jax.nn.softmax(scores, axis=-1), 0)
    attended = jnp.einsum('bhlm,bme,ehd->blhd', weights, x, params['value_kernel'])
    return jnp.einsum('blhd,hde->ble', jnp.where(valid[..., None, None], attended, 0), params['out_kernel'])


@causal_or_not
@each_variant
def test_it_is_its_definition_with_gradients(variant, causal, monkeypatch):
    """Also in steps of a few rows."""
    module, variables, x = made(variant, causal=causal)
    assert set(variables['params']) == {'value_kernel', 'out_kernel', *PARAMETERS[variant]}
    valid = jnp.arange(LENGTH) < jnp.array([[13], [9]])
    (cotangent,) = draw(2, LENGTH, 8, count=1, seed=7)

    @jax.jit
    def both(params, x):
        results = []
        for rows in (LENGTH, 4):
            monkeypatch.setattr(synthesizer, 'ROWS_LOGITS', 2 * 2 * LENGTH * rows)
            out, pull_back = jax.vjp(lambda p, x: module.apply({'params': p}, x, POSITIONS, valid=valid), params, x)
            results.append((out, *pull_back(cotangent)))
        out, pull_back = jax.vjp(
            lambda p, x: written_out(p, jnp.where(valid[..., None], x, 0), valid, causal), params, x
        )
        return *results, (out, *pull_back(cotangent))

    *found, expected = map(jax.tree.leaves, both(variables['params'], x))
    for actual in found:
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, TOLERANCE[jnp.float32])


@pytest.mark.parametrize('dtype', TOLERANCE)
@each_variant
def test_decoding_equals_the_parallel_form(variant, dtype):
    module, variables, x = made(variant, dtype=dtype)
    counts, rows = np.array([1, 6]), np.arange(2)

    @jax.jit
    def start(x):
        prefill = functools.partial(module.apply, variables, method='prefill', mutable=['cache'])
        expected = module.apply(variables, x, POSITIONS)
        return expected, prefill(x[:, :6], POSITIONS[:, :6], jnp.asarray(counts), LENGTH)[1]

    @jax.jit
    def decode(cache, x, index):
        return module.apply({**variables, **cache}, x, index, method='decode', mutable=['cache'])

    expected, cache = start(x)
    assert expected.dtype == dtype
    for index in [counts + step for step in range(LENGTH - 6)]:
        attended, cache = decode(cache, x[rows, index][:, None], index)
        assert_close(attended[:, 0], expected[rows, index], TOLERANCE[dtype])


def test_weights_are_an_average():
    (x,) = draw(2, LENGTH, 8, count=1)
    ones = jnp.ones((2, LENGTH, 2, 4))
    scores = draw(1, 2, LENGTH, LENGTH, count=1)[0]
    out = synthesizer.attend_rows(lambda x, position: scores[:, :, position], x, ones, causal=True)
    assert_close(out, ones, TOLERANCE[jnp.float32])


def test_long_inputs_are_not_held_as_a_matrix():
    """At 4 times the length a matrix would take 16 times the memory."""

    def temporaries(length):
        module = make_attention('synthesizer', width=8, heads=2, max_length=length)
        x, positions = jax.ShapeDtypeStruct((1, length, 8), jnp.float32), jnp.arange(length)[None]
        variables = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x, positions))
        loss = jax.jit(jax.grad(lambda variables, x: module.apply(variables, x, positions).sum()))
        return loss.lower(variables, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(32768) < 5 * temporaries(8192)


@pytest.mark.parametrize(
    ('hyper', 'length', 'message'),
    [
        ({}, None, 'Synthesizer has parameters for each position: set max_length'),
        ({}, 12, 'length 13 is more than the parameters hold, max_length=12; set max_length to the longest'),
        ({'variant': 'fixed'}, 13, "unknown variant 'fixed'; choose dense, random, factorised_random"),
        ({'rank': 0}, 13, 'rank must be at least 1, got 0'),
    ],
)
def test_what_it_needs_is_told(hyper, length, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda key: make_attention('synthesizer', hyper, width=8, heads=2, max_length=length).init(
                key, jnp.zeros((1, 13, 8)), POSITIONS
            ),
            jax.random.key(0),
        )
