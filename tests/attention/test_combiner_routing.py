import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from cases import TOLERANCE, assert_close, causal_or_not, draw

import combiner
from combiner import costs, patterns, reference
from combiner.attention import centroids, registry
from combiner.attention.combiner_routing import attend_combiner_routing

LENGTH, NUMBER, BLOCK = 23, 3, 4
SCATTERED = np.random.default_rng(0).random((2, LENGTH)) > 0.3


def assignments(length, number=5):
    """Random, all in one, in turn, in runs, one cluster that comes back at the end, and one token in each but one."""
    here = np.arange(length)
    return {
        'random': np.random.default_rng(length).integers(0, number, length),
        'one': np.full(length, number - 1),
        'turns': here % number,
        'runs': here * number // length,
        'returns': np.where((here < 2) | (here > length - 3), 0, 1),
        'rare': np.minimum(here, number - 1),
    }


@causal_or_not
@pytest.mark.parametrize('block', [3, 16])
def test_coverage_is_the_support_for_any_assignment(block, causal):
    for length in range(1, 131):
        support = patterns.support(length, causal=causal)
        bound = costs.combiner_routing(length, block, 5, causal=causal)
        for name, clusters in assignments(length).items():
            pattern = patterns.combiner_routing(clusters, causal=causal, block=block)
            assert (pattern.coverage() == support).all(), (name, length)
            assert (pattern.direct.diagonal()).all()
            cost = pattern.cost()
            assert cost.terms <= bound.terms, (name, length)
            assert cost.members <= bound.members, (name, length)


def test_padding_is_in_no_span():
    clusters = np.array([0, -1, 0, 1, -1, 0])
    pattern = patterns.combiner_routing(clusters, causal=True, block=2)
    expected = np.tri(6) * (clusters >= 0) * (clusters >= 0)[:, None]
    np.testing.assert_array_equal(pattern.coverage(), expected)


def test_pattern_by_hand():
    pattern = patterns.combiner_routing(np.array([0, 1, 0, 0, 1]), causal=True, block=2)
    assert [np.flatnonzero(row).tolist() for row in pattern.direct] == [[0], [1], [0, 2], [3], [1, 4]]
    seen = [[np.flatnonzero(pattern.spans[s]).tolist() for s in np.flatnonzero(row)] for row in pattern.uses]
    assert seen == [[], [[0]], [[1]], [[1], [0, 2]], [[0, 2], [3]]]
    pattern = patterns.combiner_routing(np.array([0, 1, 0, 0, 1]), causal=False, block=2)
    assert [np.flatnonzero(row).tolist() for row in pattern.spans] == [[0, 2], [1, 4], [3]]
    assert pattern.uses.tolist() == (~pattern.spans.T).tolist()


def test_with_small_clusters_it_is_the_papers_partition():
    clusters = np.random.default_rng(0).integers(0, 4, 40)
    pattern = patterns.combiner_routing(clusters, causal=True, block=40)
    same = clusters[:, None] == clusters
    np.testing.assert_array_equal(pattern.direct, same & np.tri(40, dtype=bool))
    for i in range(40):
        spans = {tuple(np.flatnonzero(span)) for span in pattern.spans[pattern.uses[i]]}
        others = {tuple(np.flatnonzero(clusters[: i + 1] == g)) for g in set(clusters[: i + 1]) - {clusters[i]}}
        assert spans == others


def oracle(q, k, v, clusters, valid=None, *, causal, block=BLOCK, pools=None):
    """The oracle, once: heads and batch rows, each with clusters of its own, one after the other in one sequence."""
    labels = np.moveaxis(np.asarray(clusters), 2, 1)
    labels = labels if valid is None else np.where(valid[:, None], labels, -1)
    parts = [patterns.combiner_routing(row, causal=causal, block=block) for row in labels.reshape(-1, q.shape[1])]
    chain = {name: [getattr(part, name) for part in parts] for name in ('direct', 'spans', 'uses')}
    chain = {name: scipy.linalg.block_diag(*matrices).astype(bool) for name, matrices in chain.items()}
    batch, length, heads, width = q.shape
    q, k, v = (x.swapaxes(1, 2).reshape(1, -1, 1, width) for x in (q, k, v))
    mask = jnp.asarray(labels >= 0).reshape(1, -1)
    out = reference.attend(q, k, v, patterns.Pattern(**chain), valid=mask, pools=pools)
    return out.reshape(batch, heads, length, width).swapaxes(1, 2)


def same_with_gradients(fast, slow, args, valid, dtype=jnp.float32):
    """Outputs, and gradients of `args` for a random cotangent, of both functions agree where there is no padding."""
    mask = True if valid is None else jnp.asarray(valid)[..., None, None]

    def run(attend, *args):
        out, pull_back = jax.vjp(lambda *args: jnp.where(mask, attend(*args), 0), *args)
        (cotangent,) = draw(*out.shape, count=1, seed=7, dtype=dtype)
        return out, *pull_back(cotangent)

    actual, expected = jax.jit(lambda *args: (run(fast, *args), run(slow, *args)))(*args)
    assert actual[0].dtype == dtype
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(one, other, TOLERANCE[dtype])


@causal_or_not
@pytest.mark.parametrize('kind', ['random', 'one', 'returns'])
@pytest.mark.parametrize(
    ('dtype', 'valid'),
    [(jnp.float32, None), (jnp.float32, SCATTERED), (jnp.bfloat16, SCATTERED)],
    ids=['float32', 'float32-padded', 'bfloat16-padded'],
)
def test_fast_equals_oracle_with_gradients(valid, dtype, kind, causal):
    clusters = np.stack([np.roll(assignments(LENGTH, NUMBER)[kind], n) for n in range(4)]).reshape(2, 2, LENGTH)
    clusters = clusters.swapaxes(1, 2)
    sizes = {'number': NUMBER, 'block': BLOCK, 'causal': causal}

    def fast(q, k, v):
        masks = {'valid': None if valid is None else jnp.asarray(valid)}
        return attend_combiner_routing(q, k, v, jnp.asarray(clusters), **sizes, **masks)

    slow = functools.partial(oracle, clusters=clusters, valid=valid, causal=causal)
    same_with_gradients(fast, slow, draw(2, LENGTH, 2, 8, dtype=dtype), valid, dtype)


@causal_or_not
@pytest.mark.parametrize(('block', 'number'), [(1, 3), (3, 1), (40, 3), (3, 40)])
def test_any_length_and_size(block, number, causal):
    @jax.jit
    def differences():
        found = []
        for length in (1, 2, 4, 11):
            q, k, v = draw(1, length, 1, 4)
            clusters = assignments(length, number)['random'][None, :, None]
            sizes = {'causal': causal, 'block': block}
            fast = attend_combiner_routing(q, k, v, jnp.asarray(clusters), number=number, **sizes)
            found.append(abs(fast - oracle(q, k, v, clusters, **sizes)).max())
        return jnp.stack(found)

    assert (differences() < TOLERANCE[jnp.float32]).all()


@causal_or_not
def test_one_block_for_one_cluster_and_blocks_of_one_are_softmax_attention(causal):
    q, k, v = draw(2, 11, 3, 8)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    for block, number in ((11, 1), (1, 4)):
        clusters = jax.random.randint(jax.random.key(0), (2, 11, 3), 0, number)
        attend = jax.jit(functools.partial(attend_combiner_routing, block=block, number=number, causal=causal))
        actual = attend(q, k, v, clusters)
        assert_close(actual, expected, TOLERANCE[jnp.float32])


# The module, whose clusters follow from queries and keys


def made(causal=True, **hyper):
    hyper = {'clusters': NUMBER, 'block': BLOCK} | hyper
    frame = {name: hyper.pop(name) for name in ('heads', 'kv_heads', 'rotary') if name in hyper}
    module = registry.make(
        'combiner_routing', hyper, width=16, causal=causal, planned_length=LENGTH, **({'heads': 2} | frame)
    )
    (x,) = draw(2, LENGTH, 16, count=1)
    variables = jax.jit(module.init)(jax.random.key(0), x, jnp.arange(LENGTH)[None])
    unboxed = jax.tree.map(lambda leaf: leaf.value, variables, is_leaf=lambda leaf: hasattr(leaf, 'value'))
    return module, unboxed, x


def test_the_future_is_not_seen():
    module, variables, _ = made()
    before, after = draw(1, LENGTH, 2, 8), draw(1, LENGTH, 2, 8, seed=1)
    x = jnp.zeros((1, LENGTH, 16))
    attend = jax.jit(lambda q, k, v: module.apply(variables, x, q, k, v, method='attend_from'))
    expected = attend(*before)
    for now in range(LENGTH - 1):
        past = jnp.arange(LENGTH)[:, None, None] <= now
        actual = attend(*(jnp.where(past, old, 100 * new) for old, new in zip(before, after, strict=True)))
        np.testing.assert_array_equal(actual[:, : now + 1], expected[:, : now + 1], f'position {now}')


@causal_or_not
def test_nan_in_padding_does_not_spread_and_padding_alone_gives_zeros(causal):
    module, variables, x = made(causal)
    valid = jnp.asarray(SCATTERED & np.array([[True], [False]]))

    def loss(variables, x):
        out = module.apply(variables, x, jnp.arange(LENGTH)[None], valid=valid)
        return (out**2).sum(), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True))
    (_, out), gradients = clean = run(variables, x)
    np.testing.assert_array_equal(out[1], 0)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    np.testing.assert_array_equal(gradients[1][1], 0)
    spoilt = run(variables, jnp.where(valid[..., None], x, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, spoilt, clean)


@causal_or_not
def test_padding_changes_nothing_wherever_it_is(causal):
    q, k, v = draw(1, 12, 1, 8)
    clusters = jnp.asarray(assignments(12, NUMBER)['random'])[None, :, None]
    attend = jax.jit(functools.partial(attend_combiner_routing, number=NUMBER, block=BLOCK, causal=causal))
    expected = attend(q, k, v, clusters)
    places = np.sort(np.random.default_rng(1).permutation(20)[:12])
    spread = [jnp.full((1, 20, 1, 8), 3.0).at[:, places].set(x) for x in (q, k, v)]
    valid = jnp.zeros((1, 20), bool).at[:, places].set(True)
    actual = attend(*spread, jnp.ones((1, 20, 1), int).at[:, places].set(clusters), valid=valid)
    assert_close(actual[:, places], expected, TOLERANCE[jnp.float32])


def plainly(pool, prefix, params):
    """A pooling by its formula for one head, over the members of every span."""

    def pooled(x, members):
        x, members = x[:, :, 0], members.astype(x.dtype)
        weights = members
        if pool == 'attention':
            weights = members * jnp.exp(30 * jnp.tanh(x @ params[f'{prefix}_pool_query'][0] / 30))[:, None]
        if pool == 'deepsets':
            x = jax.nn.relu(x @ params[f'{prefix}_pool_inner_kernel'][0])
        x = weights @ x / weights.sum(axis=-1, keepdims=True)
        if pool == 'deepsets':
            x = x @ params[f'{prefix}_pool_outer_kernel'][0]
        return x[:, :, None]

    return pooled


@causal_or_not
@pytest.mark.parametrize('pool', ['mean', 'deepsets', 'attention'])
def test_every_pooling_equals_its_formula_with_gradients(pool, causal):
    module, variables, _ = made(causal, pool=pool, heads=1)
    clusters = np.stack([assignments(LENGTH, NUMBER)[kind] for kind in ('random', 'returns')])[..., None]

    def fast(params, q, k, v):
        bound = module.bind({'params': params, 'state': variables['state']})
        sizes = {'number': NUMBER, 'block': BLOCK, 'causal': causal}
        return attend_combiner_routing(q, k, v, jnp.asarray(clusters), **sizes, pools=bound.pools)

    def slow(params, q, k, v):
        pools = tuple(plainly(pool, prefix, params) for prefix in ('query', 'key'))
        return oracle(q, k, v, clusters, causal=causal, pools=pools)

    same_with_gradients(fast, slow, [variables['params'], *draw(2, LENGTH, 1, 16)], None)


def test_the_module_uses_the_pattern_of_its_clusters():
    module, variables, x = made(rotary=True, kv_heads=1)
    positions = jnp.arange(LENGTH)[None]

    @jax.jit
    def run(x):
        q, k, v = module.apply(variables, x, positions, method='_project')
        clusters = centroids.nearest(centroids.directions(q, k), variables['state']['centroids'])
        return (q, k, v), clusters, module.apply(variables, x, q, k, v, method='attend_from')

    tokens, clusters, actual = run(x)
    assert len(np.unique(clusters)) == NUMBER
    expected = jax.jit(functools.partial(oracle, clusters=np.asarray(clusters), causal=True))(*tokens)
    assert_close(actual, expected, TOLERANCE[jnp.float32])
    assert (module.pattern_for(np.asarray(clusters)[0, :, 0]).coverage() == np.tri(LENGTH)).all()


def test_decoding_equals_the_parallel_form():
    module, variables, x = made(rotary=True)
    positions, rows, counts = jnp.arange(LENGTH)[None], jnp.arange(2), jnp.array([1, 10])
    expected = jax.jit(module.apply)(variables, x, positions)
    prefill = jax.jit(
        lambda x: module.apply(variables, x, positions[:, :10], counts, LENGTH, method='prefill', mutable=['cache'])
    )
    decode = jax.jit(
        lambda cache, x, index: module.apply({**variables, **cache}, x, index, method='decode', mutable=['cache'])
    )
    attended, cache = prefill(x[:, :10])
    assert_close(attended, expected[:, :10], TOLERANCE[jnp.float32])
    for index in [counts + step for step in range(LENGTH - 10)]:
        attended, cache = decode(cache, x[rows, index][:, None], index)
        assert_close(attended[:, 0], expected[rows, index], TOLERANCE[jnp.float32])


@causal_or_not
def test_dropout_is_unbiased(causal):
    q, k, v = draw(1, 12, 1, 4)
    clusters = jnp.asarray(assignments(12, NUMBER)['random'])[None, :, None]
    attend = functools.partial(attend_combiner_routing, q, k, v, clusters, number=NUMBER, block=2, causal=causal)

    def dropped(key):
        keys = iter(jax.random.split(key, 3))
        return attend(drop=lambda w: jnp.where(jax.random.bernoulli(next(keys), 0.5, w.shape), 2 * w, 0))

    found = jax.jit(jax.vmap(dropped))(jax.random.split(jax.random.key(0), 1000))
    spread = found.std(axis=0) / np.sqrt(len(found))
    assert (spread > 0).all()
    assert (abs(found.mean(axis=0) - jax.jit(attend)()) < 5 * spread + 1e-6).all()


def test_large_logits_stay_finite():
    q, k, v = draw(1, LENGTH, 1, 8)
    clusters = jnp.asarray(assignments(LENGTH, NUMBER)['random'])[None, :, None]
    attend = functools.partial(attend_combiner_routing, number=NUMBER, block=BLOCK, causal=True)

    @jax.jit
    def run(*args):
        out, pull_back = jax.vjp(lambda q, k, v: attend(1e4 * q, k, v, clusters), *args)
        return out, *pull_back(out)

    for leaf in run(q, k, v):
        assert jnp.isfinite(leaf).all()


@causal_or_not
def test_work_and_memory_grow_like_l_to_the_three_halves_whatever_the_clusters(causal):
    """Clusters are data here, not a constant: one program serves every assignment, all in one cluster included."""
    measured = []
    for size in (16, 32, 64):
        length = size**2
        tokens = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        clusters = jax.ShapeDtypeStruct((1, length, 1), jnp.int32)

        def loss(q, k, v, clusters, size=size):
            return (attend_combiner_routing(q, k, v, clusters, number=size, block=size, causal=causal) ** 2).sum()

        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(tokens, tokens, tokens, clusters).compile()
        measured.append([program.cost_analysis()['flops'], program.memory_analysis().temp_size_in_bytes])
    exponents = np.diff(np.log2(measured), axis=0) / 2
    assert (exponents < 1.65).all(), exponents
    assert (exponents > 1).all(), exponents


def test_default_sizes():
    module = registry.make('combiner_routing', planned_length=768)
    assert (module.number, module._block(768), module._block(5)) == (32, 32, 32)
    assert registry.make('combiner_routing', {'clusters': 10}, planned_length=768)._block(768) == 128
    assert module.cost(768) == costs.combiner_routing(768, 32, 32, causal=True)


def test_what_it_needs_is_said():
    q, k, v = draw(1, 4, 1, 4)
    with pytest.raises(ValueError, match=r'use the Linen module combiner\.attention\.combiner_routing\.Comb'):
        combiner.attend(q, k, v, 'combiner_routing', causal=True)
    with pytest.raises(ValueError, match='before it sees a length: set clusters'):
        registry.make('combiner_routing', width=4).init(jax.random.key(0), q[:, :, 0], jnp.arange(4)[None])
    with pytest.raises(ValueError, match='clusters=0 must be at least 1'):
        made(clusters=0)
    with pytest.raises(ValueError, match='block=0 and number=3 of clusters must be at least 1'):
        made(block=0)
    with pytest.raises(NotImplementedError, match='no pattern that is known before it sees its input'):
        combiner.pattern('combiner_routing', 8, causal=True)
