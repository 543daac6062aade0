"""What every mechanism must satisfy; a new one is tested by being registered.

One without a pattern takes part in what needs no oracle.

Nearly all the time goes into compiling, so that the tests of a mechanism share few programs (`attend_and_pull_back`,
`at_lengths`), and all mechanisms share the oracle's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    TOLERANCE,
    assert_close,
    causal_or_not,
    draw,
    every_function,
    every_mechanism,
    every_module,
    every_packing_function,
    every_unpartitioned,
    mechanism_pattern,
    oracle,
    oracle_key,
    random_variables,
)

import combiner
from combiner.core import registry

LENGTH = 23
SHAPE = (2, LENGTH, 2, 8)
SCATTERED = np.random.default_rng(0).random((2, LENGTH)) > 0.4
IN_ORDER = (7, 0, 3, -1, 4)
DOCUMENTS = np.stack([np.repeat(IN_ORDER, sizes) for sizes in ([4, 1, 9, 3, 6], [1, 12, 2, 8, 0])])
LENGTHS = (1, 2, 4, 5, 6, 17)


def inputs(seed: int = 0) -> list[np.ndarray]:
    """Queries, keys and values; in numpy, where changing them compiles nothing."""
    return [np.asarray(x) for x in draw(*SHAPE, seed=seed)]


def cotangent() -> np.ndarray:
    return np.asarray(*draw(*SHAPE, count=1, seed=7))


def attend_and_pull_back(name, hyper, causal):
    """Compiled `(q, k, v, valid=None, segments=None) -> (out, dq, dk, dv)`, the gradients for a random cotangent."""
    program = _attend_and_pull_back(name, tuple(hyper.items()), causal)
    return lambda q, k, v, valid=None, segments=None: program(q, k, v, valid, segments, cotangent())


@functools.cache
def _attend_and_pull_back(name, hyper, causal):
    @jax.jit
    def run(q, k, v, valid, segments, cotangent):
        def attend(q, k, v):
            return combiner.attend(q, k, v, name, causal=causal, valid=valid, segments=segments, **dict(hyper))

        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(cotangent.astype(q.dtype))

    return run


def at_lengths(name, hyper, causal):
    """Compiled `(q, k, v) -> ` what the mechanism gives for the first 1, 2, 4, … positions alone."""
    return _at_lengths(name, tuple(hyper.items()), causal)


@functools.cache
def _at_lengths(name, hyper, causal):
    def attend(length, *qkv):
        return combiner.attend(*(x[:, :length] for x in qkv), name=name, causal=causal, **dict(hyper))

    return jax.jit(lambda *qkv: {length: attend(length, *qkv) for length in LENGTHS})


@causal_or_not
@pytest.mark.parametrize(
    ('dtype', 'valid'),
    [(jnp.float32, None), (jnp.float32, SCATTERED), (jnp.bfloat16, SCATTERED)],
    ids=['float32', 'float32-padded', 'bfloat16-padded'],
)
@every_mechanism
def test_fast_equals_oracle_with_gradients(name, hyper, valid, dtype, causal):
    qkv = draw(*SHAPE, dtype=dtype)
    pattern = mechanism_pattern(name, LENGTH, causal=causal, hyper=hyper)
    actual = attend_and_pull_back(name, hyper, causal)(*qkv, valid)
    assert actual[0].dtype == dtype
    for one, other in zip(actual, oracle(pattern, *qkv, cotangent(), valid, **oracle_key(hyper)), strict=True):
        assert_close(one, other, TOLERANCE[dtype])


@causal_or_not
@every_mechanism
def test_any_length(name, hyper, causal):
    qkv = inputs()
    for length, actual in at_lengths(name, hyper, causal)(*qkv).items():
        pattern = mechanism_pattern(name, length, causal=causal, hyper=hyper)
        expected, *_ = oracle(pattern, *(x[:, :length] for x in (*qkv, cotangent())), **oracle_key(hyper))
        assert_close(actual, expected, TOLERANCE[jnp.float32])


@every_function
def test_no_position_depends_on_later_ones(name, hyper):
    before, after = inputs(), inputs(seed=1)
    attend = attend_and_pull_back(name, hyper, causal=True)
    expected, *_ = attend(*before)
    for now in range(LENGTH - 1):
        past = np.arange(LENGTH)[:, None, None] <= now
        actual, *_ = attend(*(np.where(past, old, 100 * new) for old, new in zip(before, after, strict=True)))
        np.testing.assert_array_equal(actual[:, : now + 1], expected[:, : now + 1], f'position {now}')


@causal_or_not
@every_function
def test_nan_in_padding_does_not_spread(name, hyper, causal):
    qkv = inputs()
    spoilt = [np.where(SCATTERED[..., None, None], x, np.float32('nan')) for x in qkv]
    run = attend_and_pull_back(name, hyper, causal)
    for actual, expected in zip(run(*spoilt, SCATTERED), run(*qkv, SCATTERED), strict=True):
        np.testing.assert_array_equal(actual, expected)


@causal_or_not
@every_function
def test_padding_alone_gives_zeros_and_finite_gradients(name, hyper, causal):
    valid = np.arange(2)[:, None] == np.zeros((1, LENGTH))
    out, *gradients = attend_and_pull_back(name, hyper, causal)(*inputs(), valid)
    np.testing.assert_array_equal(out[1], 0)
    for gradient in map(np.asarray, gradients):
        np.testing.assert_array_equal(gradient[1], 0)
        assert np.isfinite(gradient).all()
        assert (gradient[0] != 0).any()


@causal_or_not
@every_function
def test_padding_changes_nothing(name, hyper, causal):
    """What is after the longest of `LENGTHS` is a part of a block, and a block, of padding."""
    length, qkv = max(LENGTHS), inputs()
    within = np.arange(LENGTH) < length
    padded = [np.where(within[:, None, None], x, np.float32(3)) for x in qkv]
    actual, *_ = attend_and_pull_back(name, hyper, causal)(*padded, np.stack([within, within]))
    assert_close(actual[:, :length], at_lengths(name, hyper, causal)(*qkv)[length], TOLERANCE[jnp.float32])


@causal_or_not
@every_function
def test_packed_documents_are_as_each_one_alone(name, hyper, causal):
    """Each document alone, the others as padding, gives the output and the gradients that concern it."""
    qkv, run = inputs(), attend_and_pull_back(name, hyper, causal)
    if not registry.resolve(name).supports_segments:
        with pytest.raises(ValueError, match='does not support segments'):
            run(*qkv, SCATTERED, DOCUMENTS)
        return
    alone = [run(*qkv, SCATTERED & (document == DOCUMENTS)) for document in IN_ORDER]
    for actual, *parts in zip(run(*qkv, SCATTERED, DOCUMENTS), *alone, strict=True):
        assert_close(actual, sum(np.asarray(part) for part in parts), TOLERANCE[jnp.float32])


@causal_or_not
@every_packing_function
def test_numbers_of_documents_only_distinguish_neighbours(name, hyper, causal):
    """Not even those that mark padding inside (the least integer and 0) are taken for others."""
    least, greatest = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    run = attend_and_pull_back(name, hyper, causal)
    expected = run(*inputs(), SCATTERED, DOCUMENTS)
    for numbers in ([least, 0, greatest, least + 1, -1], [1, 0, 1, 0, 1]):
        renamed = np.select([old == DOCUMENTS for old in IN_ORDER], numbers)
        for actual, same in zip(run(*inputs(), SCATTERED, renamed), expected, strict=True):
            np.testing.assert_array_equal(actual, same)


@causal_or_not
@every_packing_function
def test_a_broken_document_reaches_no_other(name, hyper, causal):
    """The others' outputs and gradients are bit by bit what they are when that document holds zeros."""
    run, qkv = attend_and_pull_back(name, hyper, causal), inputs()
    for document in IN_ORDER:
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
    module = registry.make_attention(name, hyper, width=16, heads=2, max_length=LENGTH)
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

    alone = [run(x, SCATTERED & (document == DOCUMENTS), 0 * DOCUMENTS, pulled) for document in IN_ORDER]
    packed = run(x, SCATTERED, DOCUMENTS, pulled)
    parts = jax.tree.map(lambda *parts: sum(np.asarray(part) for part in parts), *alone)
    jax.tree.map(lambda one, other: assert_close(one, other, TOLERANCE[jnp.float32]), packed, parts)
    for document in IN_ORDER:
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
    run = attend_and_pull_back(name, hyper, causal)
    support = np.tri(LENGTH, dtype=bool) if causal else np.ones((LENGTH, LENGTH), bool)
    before, *_ = run(q, k, v)
    after = [run(q, k, np.where(np.arange(LENGTH)[:, None, None] == at, 9, v))[0] for at in range(LENGTH)]
    reached = np.stack([(np.asarray(out) != before).all(axis=(0, 2, 3)) for out in after], axis=1)
    assert (reached <= support).all()
    assert name not in combiner.names(full_support=True) or (reached == support).all()


@causal_or_not
@every_function
def test_weights_are_an_average(name, hyper, causal):
    q, k, v = inputs()
    out, *_ = attend_and_pull_back(name, hyper, causal)(q, k, np.ones_like(v))
    assert_close(out, np.ones_like(v), TOLERANCE[jnp.float32])


@every_function
def test_large_logits_stay_finite(name, hyper):
    q, k, v = inputs()
    out, dq, *others = attend_and_pull_back(name, hyper, causal=True)(np.float32(1e4) * q, k, v)
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
    run = attend_and_pull_back(name, hyper, causal=True)
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
    module = registry.make_attention(name, hyper, width=16, heads=2, rotary=True, max_length=LENGTH, dtype=dtype)
    (x,) = draw(3, LENGTH, 16, count=1, dtype=dtype)
    counts = np.array([1, 7, 10])

    positions = jnp.arange(LENGTH)[None]
    params = random_variables(module, x, positions)

    @jax.jit
    def start(params, x, counts):
        prefill = functools.partial(module.apply, params, method='prefill', mutable=['cache'])
        return module.apply(params, x, positions), *prefill(x[:, :10], positions[:, :10], counts, LENGTH)

    @jax.jit
    def decode(variables, x, index):
        return module.apply(variables, x, index, method='decode', mutable=['cache'])

    expected, attended, cache = start(params, x, counts)
    assert expected.dtype == attended.dtype == dtype
    x, expected = np.asarray(x), np.asarray(expected)
    assert_close(attended, expected[:, :10], TOLERANCE[dtype])
    rows = np.arange(3)
    for index in [counts + step for step in range(LENGTH - 10)]:
        attended, cache = decode({**params, **cache}, x[rows, index][:, None], index)
        assert_close(attended[:, 0], expected[rows, index], TOLERANCE[dtype])


@pytest.mark.parametrize('name', combiner.names())
def test_dropout_of_weights_is_taken_where_there_are_weights_and_else_refused(name):
    mechanism = registry.resolve(name)
    module = registry.make_attention(
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
