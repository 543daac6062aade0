import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, attend_with, causal_or_not, draw, pattern_of
from jax.sharding import NamedSharding, PartitionSpec

import combiner
from combiner import models, patterns, reference, sharding
from combiner.baselines.routing import attend_routing, choose
from combiner.core import registry, routed
from combiner.core.mechanism import Context
from combiner.core.module import make_attention
from configs import photos

LENGTH = 13


@functools.partial(jax.jit, static_argnames='causal')
def oracle(q, k, v, members, valid, cotangent, causal):
    """Output and gradients of the mean of the oracle over the sets that a position is in; its own value without any."""
    support = patterns.support(LENGTH, causal=causal)
    inside = (members[..., None] == jnp.arange(LENGTH)).any(axis=3)
    nothing = {'spans': jnp.zeros((0, LENGTH), bool), 'uses': jnp.zeros((LENGTH, 0), bool)}

    def one_set(q, k, v, valid, inside):
        pattern = pattern_of({'direct': support & inside & inside[:, None], **nothing})
        return reference.attend(*(x[None, :, None] for x in (q, k, v)), pattern, valid=valid[None])[0, :, 0]

    def one_head(q, k, v, valid, inside):
        total = jax.vmap(one_set, (None, None, None, None, 0))(q, k, v, valid, inside).sum(axis=0)
        count = inside.sum(axis=0)[:, None]
        return jnp.where(count > 0, total / jnp.maximum(count, 1), v)

    def attend(q, k, v):
        out = jax.vmap(jax.vmap(one_head, (1, 1, 1, None, 0), 1))(q, k, v, valid, inside)
        return jnp.where(valid[..., None, None], out, 0)

    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(cotangent)


@functools.partial(jax.jit, static_argnames='causal')
def attend_and_pull_back(q, k, v, members, valid, cotangent, causal):
    def attend(q, k, v):
        out = attend_routing(q, k, v, members, valid=valid, causal=causal)
        return jnp.where(valid[..., None, None], out, 0)

    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(cotangent)


@causal_or_not
@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_fast_equals_oracle_with_gradients(dtype, padded, causal):
    valid = jnp.asarray(np.random.default_rng(0).random((2, LENGTH)) > 0.3 * padded)
    *qkv, cotangent = draw(2, LENGTH, 2, 4, count=4, dtype=dtype)
    (scores,) = draw(2, LENGTH, 2, 3, count=1, seed=1)
    members = choose(scores, 4, valid)
    chosen = np.asarray(members)
    if not padded:
        assert len(np.unique(chosen[0, 0])) < min(chosen[0, 0].size, LENGTH)  # some in several, some in none
    else:
        assert np.asarray(valid)[np.arange(2)[:, None, None, None], chosen].all()
    actual = attend_and_pull_back(*qkv, members, valid, cotangent, causal)
    assert actual[0].dtype == dtype
    *qkv, cotangent = (np.asarray(x, np.float32) for x in (*qkv, cotangent))
    for one, other in zip(actual, oracle(*qkv, members, valid, cotangent, causal), strict=True):
        assert_close(one, other, TOLERANCE[dtype])


def test_vmap():
    *qkv, cotangent = draw(3, 2, LENGTH, 2, 4, count=4)
    valid = jnp.ones((2, LENGTH), bool)
    members = choose(draw(2, LENGTH, 2, 3, count=1, seed=1)[0], 4)

    def run(*qkv):
        return attend_and_pull_back(*qkv, members, valid, cotangent[0], True)[0]

    expected = np.stack([run(*one) for one in zip(*qkv, strict=True)])
    assert_close(jax.jit(jax.vmap(run))(*qkv), expected, TOLERANCE[jnp.float32])


@pytest.mark.parametrize('local_heads', [0, 2])
def test_batch_and_heads_are_sharded_without_gathering(local_heads):
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    placement = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None, 'model'))
    qkv = [jax.device_put(x, placement) for x in draw(4, LENGTH, 4, 8)]
    module, variables, _ = made({'local_heads': local_heads, 'block': 4}, width=32, heads=4)
    held = jax.device_put(variables['state']['centroids'], NamedSharding(mesh, PartitionSpec('model')))

    def loss(q, k, v, held):
        given = {**variables, 'state': {'centroids': held}}
        out = attend_with(module, given, q, k, v, valid=jnp.ones((4, LENGTH), bool))
        return jax.lax.with_sharding_constraint(out, placement).sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=placement).lower(*qkv, held).compile().as_text()
    assert 'all-gather' not in program
    assert 'all-to-all' not in program


def test_each_centroid_takes_the_tokens_nearest_to_it():
    scores = jnp.array([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5], [0.7, 0.95]])[None, :, None]
    assert choose(scores, 2)[0, 0].tolist() == [[1, 3], [0, 3]]
    assert choose(scores, 2, jnp.array([[True, False, True, True]]))[0, 0].tolist() == [[2, 3], [0, 3]]


def made(hyper=None, **frame):
    frame = {'width': 16, 'heads': 2, 'max_length': LENGTH} | frame
    module = make_attention('routing', {'clusters': 3} | (hyper or {}), **frame)
    (x,) = draw(2, LENGTH, module.width, count=1)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x, jnp.arange(LENGTH)[None]))
    random = np.random.default_rng(0)
    return module, jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), shapes), x


@causal_or_not
def test_padding_is_not_read_and_gives_zeros(causal):
    module, variables, x = made(causal=causal)
    valid = jnp.arange(LENGTH) < jnp.array([[9], [0]])

    @jax.jit
    def run(x):
        out, pull_back = jax.vjp(lambda x: module.apply(variables, x, jnp.arange(LENGTH)[None], valid=valid), x)
        return out, *pull_back(out)

    out, gradient = clean = run(x)
    for one, other in zip(run(jnp.where(valid[..., None], x, jnp.nan)), clean, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_array_equal(gradient[1], 0)
    assert jnp.isfinite(gradient).all()


def test_it_uses_the_future_only_to_choose_the_members_of_a_cluster():
    """With sets of everything there is nothing to choose, and no position depends on later ones."""
    q, k, v = draw(1, LENGTH, 1, 4)
    later = [x.at[:, 9:].add(5) for x in (q, k, v)]
    attend = jax.jit(lambda q, k, v, members: attend_routing(q, k, v, members, causal=True))
    everything = jnp.arange(LENGTH).reshape(1, 1, 1, -1)
    np.testing.assert_array_equal(attend(*later, everything)[:, :9], attend(q, k, v, everything)[:, :9])
    assert registry.resolve('routing').uses_future


def test_decoding_chooses_among_the_tokens_so_far():
    """Of each row: what follows a shorter prompt is not read."""
    module, variables, x = made()
    counts, rows = jnp.array([9, 6]), jnp.arange(2)
    parallel = jax.jit(lambda x, valid: module.apply(variables, x, jnp.arange(LENGTH)[None], valid=valid))
    prefill = jax.jit(
        lambda x: module.apply(variables, x, jnp.arange(9)[None], counts, LENGTH, method='prefill', mutable=['cache'])
    )
    prompt, cache = prefill(x[:, :9])
    expected = parallel(x, jnp.arange(LENGTH) < counts[:, None])
    assert_close(prompt[rows, counts - 1], expected[rows, counts - 1], TOLERANCE[jnp.float32])
    decode = jax.jit(
        lambda cache, x, index: module.apply({**variables, **cache}, x, index, method='decode', mutable=['cache'])
    )
    actual, _ = decode(cache, x[rows, counts][:, None], counts)
    expected = parallel(x, jnp.arange(LENGTH) <= counts[:, None])
    assert_close(actual[:, 0], expected[rows, counts], TOLERANCE[jnp.float32])


@pytest.mark.parametrize(
    ('local_heads', 'routing', 'local'),
    [
        (1, np.array([0, 1, 2]), np.array([3])),
        (2, np.array([0, 2]), np.array([1, 3])),
        (3, np.array([0]), np.array([1, 2, 3])),
    ],
    ids=['one group', 'two groups', 'one group of more local heads'],
)
@causal_or_not
def test_local_heads_are_the_last_of_each_group_and_the_others_route(causal, local_heads, routing, local):
    """As the two parts, each with its heads alone: outputs and gradients."""
    module, variables, _ = made({'local_heads': local_heads, 'block': 4}, heads=4, causal=causal)
    *qkv, cotangent = draw(2, LENGTH, 4, 4, count=4)
    valid = jnp.asarray(np.random.default_rng(0).random((2, LENGTH)) > 0.3)
    held = variables['state']['centroids']
    assert held.shape == (len(routing), 3, 4)

    def both(q, k, v):
        return attend_with(module, variables, q, k, v, valid=valid)

    def parts(q, k, v):
        first, second = ([x[:, :, heads] for x in (q, k, v)] for heads in (routing, local))
        members = choose(routed.similarity(routed.directions(*first[:2]), held), 5, valid)
        of_sets = attend_routing(*first, members, causal=causal, valid=valid)
        near = combiner.attend(*second, 'local', block=4, overlap=4, causal=causal, valid=valid)
        return jnp.zeros_like(v).at[:, :, routing].set(of_sets).at[:, :, local].set(near)

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, qkv):
        out, pull_back = jax.vjp(lambda *qkv: jnp.where(valid[..., None, None], attend(*qkv), 0), *qkv)
        return out, *pull_back(cotangent)

    for one, other in zip(run(both, qkv), run(parts, qkv), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@pytest.mark.parametrize(('window', 'expected'), [(None, 5), (2, 2), (8, 8), (50, LENGTH)])
def test_a_cluster_has_as_many_tokens_as_its_window(window, expected):
    """Whatever the number of clusters: fewer than a share of them, more, or (at most) all."""
    module, variables, _ = made({'window': window})
    q, k, v = draw(2, LENGTH, 2, 8)
    scores = routed.similarity(routed.directions(q, k), variables['state']['centroids'])
    actual = attend_with(module, variables, q, k, v)
    assert_close(actual, attend_routing(q, k, v, choose(scores, expected), causal=True), TOLERANCE[jnp.float32])


def test_an_empty_window_is_refused():
    module, variables, _ = made()
    q, k, v = draw(2, LENGTH, 2, 8)
    with pytest.raises(ValueError, match='window must be at least 1, got 0'):
        attend_with(module.clone(mechanism=dataclasses.replace(module.mechanism, window=0)), variables, q, k, v)


def test_local_heads_do_not_use_the_future_and_decode_exactly():
    module, variables, x = made({'local_heads': 1, 'block': 4})
    q, k, v = draw(2, LENGTH, 2, 8)
    counts = jnp.array([9, 6])

    @jax.jit
    def both(x, q, k, v):
        mechanism, own = module.mechanism, variables['state']
        cache = mechanism.init_cache(q[:, :9], k[:, :9], v[:, :9], Context(x[:, :9], variables=own), counts, LENGTH)
        new_x, *token = (array[jnp.arange(2), counts] for array in (x, q, k, v))
        _, attended = mechanism.decode_step(cache, counts, *token, Context(new_x, variables=own))
        return attended, attend_with(module, variables, q, k, v, x=x)

    attended, expected = both(x, q, k, v)
    assert_close(attended[:, 1], expected[jnp.arange(2), counts, 1], TOLERANCE[jnp.float32])
    assert (abs(attended[:, 0] - expected[jnp.arange(2), counts, 0]) > 1e-3).any()


def test_centroids_move_by_the_heads_that_route():
    module, variables, x = made({'local_heads': 1}, heads=4)
    _, new = module.apply(variables, x, jnp.arange(LENGTH)[None], deterministic=False, mutable=['state'])
    before, after = variables['state']['centroids'], new['state']['centroids']
    assert after.shape == before.shape == (3, 3, 4)
    assert (after != before).any(axis=(1, 2)).all()


@pytest.mark.parametrize('local_heads', [-1, 2, 3])
def test_some_heads_must_route(local_heads):
    with pytest.raises(
        ValueError,
        match=f'local_heads.* must be at least 0.*{local_heads}|local_heads={local_heads} .*leave one of 2 heads',
    ):
        made({'local_heads': local_heads})


def test_local_heads_through_a_config():
    config = photos.get_config('attention=routing+local_heads=2').model
    assert config.attention.to_dict() == {'name': 'routing', 'block': 48, 'local_heads': 2}
    model = models.build('language_model', 256, (16, 16, 3), config.to_dict())
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 768), jnp.int32)))
    assert [leaf.shape for leaf in jax.tree.leaves(shapes['state'])] == [(2, 2, 32, 16)]  # layers, heads that route


def test_it_owns_centroids():
    q, k, v = draw(1, 4, 1, 4)
    with pytest.raises(
        ValueError, match=r'use the Linen module combiner\.Attention\(combiner\.baselines\.routing\.Routing'
    ):
        combiner.attend(q, k, v, 'routing', causal=True)
    module, variables, x = made()
    with pytest.raises(ValueError, match='Routing does not support segments'):
        module.apply(variables, x, jnp.arange(LENGTH)[None], segments=jnp.zeros((2, LENGTH), int))
