"""What every mechanism must satisfy; a new one is tested by being registered.

One without a pattern takes part in what needs no oracle.

The checks that a user's own mechanism gets too are in `combiner.testing`. Nearly all the time goes into compiling, so
that the tests of a mechanism share few programs (`program`, `at_lengths`), and all mechanisms share the oracle's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    causal_or_not,
    every_function,
    every_mechanism,
    every_module,
    every_packing_function,
    every_unpartitioned,
    oracle_key,
)

import combiner
from combiner import testing
from combiner.core import registry
from combiner.core.module import make_attention
from combiner.testing import (
    DOCUMENT_NUMBERS,
    DOCUMENTS,
    LENGTH,
    SCATTERED,
    SHAPE,
    TOLERANCE,
    assert_close,
    at_lengths,
    draw,
    inputs,
    program,
    random_variables,
)


@causal_or_not
@pytest.mark.parametrize(
    ('dtype', 'valid'),
    [(jnp.float32, None), (jnp.float32, SCATTERED), (jnp.bfloat16, SCATTERED)],
    ids=['float32', 'float32-padded', 'bfloat16-padded'],
)
@every_mechanism
def test_fast_equals_oracle_with_gradients(name, hyper, valid, dtype, causal):
    testing.check_oracle(name, hyper, causal=causal, valid=valid, dtype=dtype, **oracle_key(hyper))


@causal_or_not
@every_mechanism
def test_any_length(name, hyper, causal):
    testing.check_lengths(name, hyper, causal=causal, **oracle_key(hyper))


@every_function
def test_no_position_depends_on_later_ones(name, hyper):
    testing.check_causality(program(name, hyper, causal=True))


@causal_or_not
@every_function
def test_nan_in_padding_does_not_spread(name, hyper, causal):
    """Not even into gradients: they are the same in every bit."""
    run, qkv = program(name, hyper, causal=causal), inputs()
    spoilt = [np.where(SCATTERED[..., None, None], x, np.float32('nan')) for x in qkv]
    for actual, expected in zip(run(*spoilt, SCATTERED), run(*qkv, SCATTERED), strict=True):
        np.testing.assert_array_equal(actual, expected)


@causal_or_not
@every_unpartitioned
def test_padding_is_never_read(name, hyper, causal):
    """Of other mechanisms the oracle says so."""
    testing.check_padding(name, hyper, causal=causal)


@causal_or_not
@every_function
def test_padding_alone_gives_zeros_and_finite_gradients(name, hyper, causal):
    testing.check_padding_alone(program(name, hyper, causal=causal))


@causal_or_not
@every_function
def test_padding_changes_nothing(name, hyper, causal):
    """What is after the longest of `LENGTHS` is a part of a block, and a block, of padding."""
    alone = at_lengths(name, hyper, causal=causal)
    testing.check_padding_at_end(program(name, hyper, causal=causal), alone)


@causal_or_not
@every_function
def test_packed_documents_are_as_each_one_alone(name, hyper, causal):
    """Each document alone, the others as padding, gives the output and the gradients that concern it."""
    run = program(name, hyper, causal=causal)
    if registry.resolve(name).supports_segments:
        testing.check_documents(run)
    else:
        with pytest.raises(ValueError, match='does not support segments'):
            run(*inputs(), SCATTERED, DOCUMENTS)


@causal_or_not
@every_packing_function
def test_numbers_of_documents_only_distinguish_neighbours(name, hyper, causal):
    """Not even those that mark padding inside (the least integer and 0) are taken for others."""
    least, greatest = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    run = program(name, hyper, causal=causal)
    expected = run(*inputs(), SCATTERED, DOCUMENTS)
    for numbers in ([least, 0, greatest, least + 1, -1], [1, 0, 1, 0, 1]):
        renamed = np.select([old == DOCUMENTS for old in DOCUMENT_NUMBERS], numbers)
        for actual, same in zip(run(*inputs(), SCATTERED, renamed), expected, strict=True):
            np.testing.assert_array_equal(actual, same)


@causal_or_not
@every_packing_function
def test_a_broken_document_reaches_no_other(name, hyper, causal):
    """The others' outputs and gradients are bit by bit what they are when that document holds zeros."""
    run, qkv = program(name, hyper, causal=causal), inputs()
    for document in DOCUMENT_NUMBERS:
        broken = document == DOCUMENTS
        here = broken[..., None, None]
        expected = run(*(np.where(here, np.float32(0), x) for x in qkv), SCATTERED, DOCUMENTS)
        changed = []
        for role in range(3):
            for value in (np.nan, np.inf):
                changed.append([x.copy() for x in qkv])
                changed[-1][role][broken, 1, 2] = value
        changed += [[np.where(here, x * np.float32(size), x) for x in qkv] for size in (1e15, 1e30)]
        for spoilt in changed:
            out, *gradients = run(*spoilt, SCATTERED, DOCUMENTS)
            np.testing.assert_array_equal(out, np.where(here & SCATTERED[..., None, None], np.nan, expected[0]))
            for actual, zeros in zip(gradients, expected[1:], strict=True):
                np.testing.assert_array_equal(actual, np.where(here, 0, zeros))


@every_packing_function
def test_a_module_keeps_documents_apart_in_training(name, hyper):
    """Each is as if it were alone, gradients included, and a broken one reaches neither others nor parameters."""
    module = make_attention(name, hyper, width=16, heads=2, max_length=LENGTH)
    x, pulled = (np.asarray(x) for x in draw(2, LENGTH, 16, count=2))
    positions = jnp.arange(LENGTH)[None]
    variables = random_variables(module, jnp.asarray(x), positions)

    @jax.jit
    def run(x, valid, segments, pulled):
        def attend(params, x):
            masks = {'valid': valid, 'segments': segments}
            options = {'deterministic': False, 'mutable': ['state'], 'rngs': {'dropout': jax.random.key(0)}}
            return module.apply({**variables, 'params': params}, x, positions, **masks, **options)[0]

        out, pull_back = jax.vjp(attend, variables['params'], x)
        return out, *pull_back(pulled)

    alone = [run(x, SCATTERED & (document == DOCUMENTS), 0 * DOCUMENTS, pulled) for document in DOCUMENT_NUMBERS]
    packed = run(x, SCATTERED, DOCUMENTS, pulled)
    parts = jax.tree.map(lambda *parts: sum(np.asarray(part) for part in parts), *alone)
    jax.tree.map(lambda one, other: assert_close(one, other, TOLERANCE[jnp.float32]), packed, parts)
    for document in DOCUMENT_NUMBERS:
        here = (document == DOCUMENTS)[..., None]
        cotangent = np.where(here, np.float32(0), pulled)
        expected = run(np.where(here, np.float32(0), x), SCATTERED, DOCUMENTS, cotangent)
        for value in (np.nan, np.inf, 1e38):
            spoilt = np.where(here & (np.arange(16) == 3), np.float32(value), x)
            out, *gradients = run(spoilt, SCATTERED, DOCUMENTS, cotangent)
            np.testing.assert_array_equal(out, np.where(here & SCATTERED[..., None], np.nan, expected[0]))
            jax.tree.map(np.testing.assert_array_equal, gradients, list(expected[1:]))


@causal_or_not
@every_unpartitioned
def test_everything_is_reached_where_it_is_claimed_and_no_pattern_says_so(name, hyper, causal):
    q, k, v = inputs()
    run = program(name, hyper, causal=causal)
    support = np.tri(LENGTH, dtype=bool) if causal else np.ones((LENGTH, LENGTH), bool)
    before, *_ = run(q, k, v)
    after = [run(q, k, np.where(np.arange(LENGTH)[:, None, None] == at, 9, v))[0] for at in range(LENGTH)]
    reached = np.stack([(np.asarray(out) != before).all(axis=(0, 2, 3)) for out in after], axis=1)
    assert (reached <= support).all()
    assert name not in combiner.names(full_support=True) or (reached == support).all()


@causal_or_not
@every_function
def test_weights_are_an_average(name, hyper, causal):
    testing.check_average(program(name, hyper, causal=causal))


@every_function
def test_large_logits_stay_finite(name, hyper):
    q, k, v = inputs()
    out, dq, *others = program(name, hyper, causal=True)(np.float32(1e4) * q, k, v)
    for x in (out, np.float32(1e4) * np.asarray(dq), *others):
        assert np.isfinite(x).all()


@causal_or_not
@every_function
def test_grouped_queries(name, hyper, causal):
    q, k, v = draw(2, LENGTH, 4, 8)
    k, v = k[:, :, :2], v[:, :, :2]

    @jax.jit
    def both(q, k, v):
        repeated = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        attend = functools.partial(combiner.attend, name=name, causal=causal, **hyper)
        return attend(q, k, v), attend(q, *repeated)

    np.testing.assert_array_equal(*both(q, k, v))


@every_function
def test_vmap(name, hyper):
    qkv = draw(3, *SHAPE)
    run = program(name, hyper, causal=True)
    expected = np.stack([run(*one)[0] for one in zip(*map(np.asarray, qkv), strict=True)])
    attend = functools.partial(combiner.attend, name=name, causal=True, **hyper)
    assert_close(jax.jit(jax.vmap(attend))(*qkv), expected, TOLERANCE[jnp.float32])


@causal_or_not
@every_mechanism
def test_dropout_is_unbiased(name, hyper, causal):
    attend = combiner.attention_fn(name, causal=causal, **hyper)

    @jax.jit
    def run(keys, *qkv):
        drop = functools.partial(attend, *qkv, dropout_rate=0.5, deterministic=False)
        return jax.vmap(lambda key: drop(dropout_rng=key))(keys), attend(*qkv)

    dropped, expected = run(jax.random.split(jax.random.key(0), 2000), *draw(1, 12, 1, 4))
    dropped = np.asarray(dropped)
    spread = dropped.std(axis=0) / np.sqrt(len(dropped))
    assert (spread > 0).all()
    assert (abs(dropped.mean(axis=0) - expected) < 5 * spread + 1e-6).all()


@pytest.mark.parametrize('dtype', TOLERANCE, ids=['float32', 'bfloat16'])
@every_module
def test_decoding_equals_the_parallel_form(name, hyper, dtype):
    testing.check_decoding(name, hyper, dtype)


@pytest.mark.parametrize('name', combiner.names())
def test_dropout_of_weights_is_taken_where_there_are_weights_and_else_refused(name):
    mechanism = registry.resolve(name)
    module = make_attention(
        name, causal=mechanism.supported_causal[0], width=16, heads=2, max_length=LENGTH, dropout=0.5
    )
    x, positions = jnp.zeros((1, LENGTH, 16)), jnp.arange(LENGTH)[None]
    variables = jax.eval_shape(module.init, jax.random.key(0), x, positions)

    def train(variables):
        rngs = {'dropout': jax.random.key(0)}
        return module.apply(variables, x, positions, deterministic=False, rngs=rngs, mutable=['state'])[0]

    if mechanism.supports_dropout:
        assert jax.eval_shape(train, variables).shape == x.shape
        return
    with pytest.raises(ValueError, match='has no weights to drop: set the dropout of attention to 0'):
        jax.eval_shape(train, variables)
