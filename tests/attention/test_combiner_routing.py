import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, assignments, attend_with, causal_or_not, draw, pattern_of
from jax.sharding import NamedSharding, PartitionSpec

import combiner
from combiner import reference, sharding
from combiner.attention import combiner_routing
from combiner.attention.combiner_routing import attend_combiner_routing
from combiner.core import registry, routed
from combiner.core.mechanism import Context
from combiner.core.module import make_attention

LENGTH, NUMBER, BLOCK = 23, 3, 4
SHAPE = (2, LENGTH, 2, 8)
POSITIONS = jnp.arange(LENGTH)[None]
EVERYWHERE = np.ones((2, LENGTH), bool)
SCATTERED = np.random.default_rng(0).random((2, LENGTH)) > 0.3


def clusters_of(kind, shape=SHAPE, number=NUMBER):
    """Clusters of a kind, other ones for every row and head."""
    batch, length, heads, _ = shape
    rows = [np.roll(assignments(length, number)[kind], n) for n in range(batch * heads)]
    return np.stack(rows).reshape(batch, heads, length).swapaxes(1, 2)


@functools.cache
def attend_and_pull_back(causal):
    """Compiled `(q, k, v, clusters, valid, cotangent) -> (out, dq, dk, dv)`, zeros where there is padding."""

    @jax.jit
    def run(q, k, v, clusters, valid, cotangent):
        def attend(q, k, v):
            sizes = {'number': NUMBER, 'block': BLOCK, 'causal': causal}
            return jnp.where(
                valid[..., None, None], attend_combiner_routing(q, k, v, clusters, valid=valid, **sizes), 0
            )

        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(cotangent.astype(q.dtype))

    return run


def oracle(q, k, v, clusters, valid=None, cotangent=None, *, causal, block=BLOCK, pool='max', params=None):
    """The oracle's output and gradients, of `params` too if there are any, each row and head with its own pattern.

    Patterns are arguments of the compiled program, padded to one number of positions and spans.
    """
    length = q.shape[1]
    assigned = clusters if valid is None else np.where(valid[..., None], clusters, -1)
    assigned = np.pad(np.moveaxis(assigned, 2, 1), ((0, 0), (0, 0), (0, LENGTH - length)), constant_values=-1)
    q, k, v, cotangent = (
        np.pad(np.asarray(x, np.float32), ((0, 0), (0, LENGTH - length), (0, 0), (0, 0)))
        for x in (q, k, v, v if cotangent is None else cotangent)
    )
    parts = [[combiner_routing.pattern(head, causal=causal, block=block) for head in row] for row in assigned]
    more = {'direct': (0, 0), 'spans': (1, 0), 'uses': (0, 1)}

    def stacked(part, axes):
        def padded(x):
            return np.pad(x, [(0, LENGTH - size if axis else 0) for size, axis in zip(x.shape, axes, strict=True)])

        return np.stack([np.stack([padded(getattr(head, part)) for head in row]) for row in parts])

    arrays = {part: stacked(part, axes) for part, axes in more.items()}
    out, gradients = _oracle(q, k, v, assigned[:, 0] >= 0, cotangent, arrays, params, pool=pool)
    return jax.tree.map(np.asarray, (out[:, :length], *(x[:, :length] for x in gradients[:3]), *gradients[3:]))


@functools.partial(jax.jit, static_argnames='pool')
def _oracle(q, k, v, valid, cotangent, parts, params, pool):
    def attend(q, k, v, *params):
        pools = None if pool == 'max' else tuple(plainly(pool, prefix, *params) for prefix in ('query', 'key'))

        def one(q, k, v, valid, parts):
            qkv = (x[None, :, None] for x in (q, k, v))
            return reference.attend(*qkv, pattern_of(parts), valid=valid[None], pools=pools)[0, :, 0]

        return jax.vmap(jax.vmap(one, (1, 1, 1, None, 0), 1))(q, k, v, valid, parts)

    out, pull_back = jax.vjp(attend, q, k, v, *([] if params is None else [params]))
    return out, pull_back(cotangent)


@causal_or_not
@pytest.mark.parametrize('kind', ['random', 'one', 'returns'])
@pytest.mark.parametrize(
    ('dtype', 'valid'),
    [(jnp.float32, EVERYWHERE), (jnp.float32, SCATTERED), (jnp.bfloat16, SCATTERED)],
    ids=['float32', 'float32-padded', 'bfloat16-padded'],
)
def test_fast_equals_oracle_with_gradients(valid, dtype, kind, causal):
    *qkv, cotangent = draw(*SHAPE, count=4, dtype=dtype)
    clusters = clusters_of(kind)
    actual = attend_and_pull_back(causal)(*qkv, clusters, valid, cotangent)
    assert actual[0].dtype == dtype
    expected = oracle(*qkv, clusters, valid, np.where(valid[..., None, None], cotangent, 0), causal=causal)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, TOLERANCE[dtype])


@causal_or_not
def test_any_length_and_size(causal):
    """Lengths below and above the number of clusters and the size of blocks; and plain softmax attention."""
    sizes = [(1, 4, 3), (11, 3, 40), (11, 40, 1), (11, 1, 4)]
    qkv = list(map(np.asarray, draw(*SHAPE)))
    cases = [([x[:, :n] for x in qkv], clusters_of('random', (2, n, 2, 8), number)) for n, _, number in sizes]

    @jax.jit
    def run(cases):
        return [
            attend_combiner_routing(*qkv, clusters, number=number, block=block, causal=causal)
            for (qkv, clusters), (_, block, number) in zip(cases, sizes, strict=True)
        ]

    found = run(cases)
    for (args, clusters), (_, block, _), actual in zip(cases, sizes, found, strict=True):
        expected, *_ = oracle(*args, clusters, causal=causal, block=block)
        assert_close(actual, expected, TOLERANCE[jnp.float32])
    dense = jax.nn.dot_product_attention(*cases[-1][0], is_causal=causal)
    for actual in found[-2:]:  # one block for one cluster, and blocks of one
        assert_close(actual, dense, TOLERANCE[jnp.float32])


@causal_or_not
def test_padding_changes_nothing_wherever_it_is(causal):
    qkv = [np.asarray(x)[:, :12] for x in draw(*SHAPE)]
    clusters = clusters_of('random', (2, 12, 2, 8))
    expected, *_ = oracle(*qkv, clusters, causal=causal)
    places = np.sort(np.random.default_rng(1).permutation(LENGTH)[:12])
    spread = [np.full(SHAPE, 3, np.float32) for _ in qkv]
    for wide, x in zip(spread, qkv, strict=True):
        wide[:, places] = x
    assigned = np.ones(SHAPE[:3], int)
    assigned[:, places] = clusters
    valid = np.broadcast_to(np.isin(np.arange(LENGTH), places), (2, LENGTH))
    actual, *_ = attend_and_pull_back(causal)(*spread, assigned, valid, spread[0])
    assert_close(actual[:, places], expected, TOLERANCE[jnp.float32])


def test_large_logits_stay_finite():
    q, k, v, cotangent = draw(*SHAPE, count=4)
    for leaf in attend_and_pull_back(True)(1e4 * q, k, v, clusters_of('random'), EVERYWHERE, cotangent):
        assert jnp.isfinite(leaf).all()


def test_vmap():
    *qkv, cotangent = draw(3, *SHAPE, count=4)
    clusters = np.stack([clusters_of(kind) for kind in ('random', 'one', 'returns')])

    def run(*args):
        return attend_and_pull_back(True)(*args, EVERYWHERE, cotangent[0])[0]

    expected = np.stack([run(*args) for args in zip(*map(np.asarray, qkv), clusters, strict=True)])
    assert_close(jax.jit(jax.vmap(run))(*qkv, clusters), expected, TOLERANCE[jnp.float32])


@causal_or_not
def test_dropout_is_unbiased(causal):
    q, k, v = draw(1, 8, 1, 4)
    clusters = jnp.asarray(assignments(8, 2)['random'])[None, :, None]
    attend = functools.partial(attend_combiner_routing, q, k, v, clusters, number=2, block=2, causal=causal)

    @jax.jit
    def run(keys):
        def dropped(key):
            keys = iter(jax.random.split(key, 3))
            return attend(drop=lambda w: jnp.where(jax.random.bernoulli(next(keys), 0.5, w.shape), 2 * w, 0))

        return jax.vmap(dropped)(keys), attend()

    found, expected = map(np.asarray, run(jax.random.split(jax.random.key(0), 1000)))
    spread = found.std(axis=0) / np.sqrt(len(found))
    assert (spread > 0).all()
    assert (abs(found.mean(axis=0) - expected) < 5 * spread + 1e-6).all()


@causal_or_not
def test_batch_and_heads_are_sharded_without_gathering(causal):
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    placement = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None, 'model'))
    qkv = [jax.device_put(x, placement) for x in draw(4, LENGTH, 2, 8)]
    centers = jax.device_put(draw(2, NUMBER, 8, count=1)[0], NamedSharding(mesh, PartitionSpec('model')))

    def loss(q, k, v, held):
        clusters = routed.nearest_centroid(routed.directions(q, k), held)
        sizes = {'number': NUMBER, 'block': BLOCK, 'causal': causal}
        out = attend_combiner_routing(q, k, v, clusters, valid=jnp.ones((4, LENGTH), bool), **sizes)
        return jax.lax.with_sharding_constraint(out, placement).sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=placement).lower(*qkv, centers).compile().as_text()
    assert 'all-gather' not in program
    assert 'all-to-all' not in program


@causal_or_not
def test_work_and_memory_grow_like_l_to_the_three_halves_whatever_the_clusters(causal):
    """Clusters are data here, not a constant: one program serves every assignment, all in one cluster included."""
    measured = []
    for size in (8, 32):
        length = size**2
        tokens = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        clusters = jax.ShapeDtypeStruct((1, length, 1), jnp.int32)

        def loss(q, k, v, clusters, size=size):
            return (attend_combiner_routing(q, k, v, clusters, number=size, block=size, causal=causal) ** 2).sum()

        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(tokens, tokens, tokens, clusters).compile()
        measured.append([program.cost_analysis()['flops'], program.memory_analysis().temp_size_in_bytes])
    exponents = np.diff(np.log2(measured), axis=0) / 4
    assert (exponents < 1.65).all(), exponents
    assert (exponents > 1).all(), exponents


# The module, whose clusters follow from queries and keys


def made(causal=True, **hyper):
    """A module, variables that cost no compilation, and an input."""
    hyper = {'clusters': NUMBER, 'block': BLOCK} | hyper
    frame = {name: hyper.pop(name) for name in ('heads', 'kv_heads', 'rotary') if name in hyper}
    module = make_attention(
        'combiner_routing', hyper, width=16, causal=causal, max_length=LENGTH, **({'heads': 2} | frame)
    )
    (x,) = draw(2, LENGTH, 16, count=1)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x, POSITIONS))
    random = np.random.default_rng(0)
    return module, jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 1 / 4, leaf.shape), leaf.dtype), shapes), x


@functools.cache
def attend_compiled():
    """Compiled causal `(state, q, k, v) -> out`."""
    module, variables, x = made()
    params = {'params': variables['params']}
    return jax.jit(lambda state, *qkv: attend_with(module, {**params, **state}, *qkv, x=x))


def test_no_position_depends_on_later_ones():
    """Not through the attention, and not through the cluster of a token, which here follows from the token."""
    state = {'state': made()[1]['state']}
    before, after = (list(map(np.asarray, draw(*SHAPE, seed=seed))) for seed in (0, 1))
    cluster = jax.jit(lambda q, k: routed.nearest_centroid(routed.directions(q, k), state['state']['centroids']))
    assert (cluster(*before[:2]) != cluster(*after[:2])).any()
    attend = functools.partial(attend_compiled(), state)
    expected = attend(*before)
    for now in range(LENGTH - 1):
        past = np.arange(LENGTH)[:, None, None] <= now
        actual = attend(*(np.where(past, old, 100 * new) for old, new in zip(before, after, strict=True)))
        np.testing.assert_array_equal(actual[:, : now + 1], expected[:, : now + 1], f'position {now}')


@causal_or_not
def test_nan_in_padding_does_not_spread_and_padding_alone_gives_zeros(causal):
    module, variables, x = made(causal)
    valid = jnp.asarray(SCATTERED & np.array([[True], [False]]))

    def loss(params, x):
        out = module.apply({**variables, 'params': params}, x, POSITIONS, valid=valid)
        return (out**2).sum(), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), gradients = clean = run(variables['params'], x)
    np.testing.assert_array_equal(out[1], 0)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    np.testing.assert_array_equal(gradients[1][1], 0)
    spoilt = run(variables['params'], jnp.where(valid[..., None], x, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, spoilt, clean)


def plainly(pool, prefix, params):
    """A pooling by its formula for one head, over the members of every span."""

    def pooled(x, members):
        x, members = x[:, :, 0], members.astype(x.dtype)
        weights = members
        if pool == 'attention':
            weights = members * jnp.exp(30 * jnp.tanh(x @ params[f'{prefix}_pool_query'][0] / 30))[:, None]
        if pool == 'deepsets':
            x = jax.nn.relu(x @ params[f'{prefix}_pool_inner_kernel'][0])
        x = weights @ x / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
        if pool == 'deepsets':
            x = x @ params[f'{prefix}_pool_outer_kernel'][0]
        return x[:, :, None]

    return pooled


@causal_or_not
@pytest.mark.parametrize('pool', ['mean', 'deepsets', 'attention'])
def test_every_pooling_equals_its_formula_with_gradients(pool, causal):
    module, variables, _ = made(causal, pool=pool, heads=1)
    clusters = np.stack([assignments(LENGTH, NUMBER)[kind] for kind in ('random', 'returns')])[..., None]
    *qkv, cotangent = draw(2, LENGTH, 1, 16, count=4)

    @jax.jit
    def run(params, clusters, q, k, v):
        def attend(q, k, v, params):
            pools = module.mechanism.pools(Context(variables=params))
            sizes = {'number': NUMBER, 'block': BLOCK, 'causal': causal}
            return attend_combiner_routing(q, k, v, clusters, **sizes, pools=pools)

        out, pull_back = jax.vjp(attend, q, k, v, params)
        return out, *pull_back(cotangent)

    params = variables['params']
    expected = oracle(*qkv, clusters, None, cotangent, causal=causal, pool=pool, params=params)
    for one, other in zip(jax.tree.leaves(run(params, clusters, *qkv)), jax.tree.leaves(expected), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


def test_the_module_uses_the_pattern_of_its_clusters():
    module, variables, x = made(rotary=True, kv_heads=1)
    state = {'state': variables['state']}

    @jax.jit
    def cluster(x):
        q, k, v = module.apply(variables, x, POSITIONS, method='_project')
        return (q, k, v), routed.nearest_centroid(routed.directions(q, k), variables['state']['centroids'])

    tokens, clusters = cluster(x)
    clusters = np.asarray(clusters)
    assert len(np.unique(clusters)) == NUMBER
    expected, *_ = oracle(*tokens, clusters, causal=True)
    assert_close(attend_compiled()(state, *tokens), expected, TOLERANCE[jnp.float32])
    assert (module.mechanism.pattern_for(clusters[0, :, 0]).coverage() == np.tri(LENGTH)).all()


def test_decoding_equals_the_parallel_form():
    """Checks that the cache of positions beyond the prompt is overwritten before it is used."""
    module, variables, x = made(rotary=True, kv_heads=1)
    rows, counts = np.arange(2), jnp.array([1, 10])
    prefill = functools.partial(module.apply, variables, method='prefill', mutable=['cache'])
    expected, cache = jax.jit(lambda x: prefill(x, POSITIONS, counts, LENGTH))(x)

    @jax.jit
    def decode(cache, x, index):
        return module.apply({**variables, **cache}, x, index, method='decode', mutable=['cache'])

    x, expected = np.asarray(x), np.asarray(expected)
    for index in [np.asarray(counts) + step for step in range(LENGTH - 10)]:
        attended, cache = decode(cache, x[rows, index][:, None], index)
        assert_close(attended[:, 0], expected[rows, index], TOLERANCE[jnp.float32])


def test_default_sizes():
    mechanism = registry.make_mechanism('combiner_routing', max_length=768)
    assert (mechanism.number, mechanism._block(768), mechanism._block(5)) == (32, 32, 32)
    assert registry.make_mechanism('combiner_routing', {'clusters': 10}, max_length=768)._block(768) == 128
    assert mechanism.cost(768) == combiner_routing.cost(768, 32, 32, causal=True)


def test_what_it_needs_is_said():
    q, k, v = draw(1, 4, 1, 4)
    with pytest.raises(
        ValueError, match=r'use the Linen module combiner\.Attention\(combiner\.attention\.combiner_routing\.Comb'
    ):
        combiner.attend(q, k, v, 'combiner_routing', causal=True)
    with pytest.raises(ValueError, match='before it sees a length: set clusters'):
        make_attention('combiner_routing', width=4).init(jax.random.key(0), q[:, :, 0], jnp.arange(4)[None])
    with pytest.raises(ValueError, match='clusters must be at least 1, got 0'):
        made(clusters=0)
    with pytest.raises(ValueError, match='block must be at least 1, got 0'):
        made(block=0)
    module, variables, x = made()
    with pytest.raises(ValueError, match='CombinerRouting does not support segments'):
        module.apply(variables, x, POSITIONS, segments=jnp.zeros((2, LENGTH), int))
    with pytest.raises(NotImplementedError, match='no pattern that is known before it sees its input'):
        combiner.pattern('combiner_routing', 8, causal=True)
