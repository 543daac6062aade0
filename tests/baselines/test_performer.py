"""FAVOR+ against its definition with all weights written out, what it estimates, and how its features are kept."""

import functools
import itertools
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw
from ml_collections import ConfigDict

import combiner
from combiner import evaluate, models, sample, sharding, train
from combiner.baselines.performer import KERNELS, orthogonal, softmax_kernel
from combiner.core import registry
from combiner.core.mechanism import Context
from combiner.core.module import make_attention

LENGTHS = (1, 5, 13)
FEATURES, SEED = 10, 3
LAYER = {'features': FEATURES, 'chunk': 4, 'seed': SEED}


def written_out(q, k, v, valid, *, directions, causal, kernel):
    """The published features and nothing done for float32."""

    def features(x):
        x = x / q.shape[-1] ** 0.25
        along = jnp.einsum('blhd,fd->blhf', x, directions)
        if kernel == 'softmax':
            along = jnp.exp(along - (x**2).sum(-1, keepdims=True) / 2)
        else:
            along = jax.nn.relu(along) + 1e-3
        return along / FEATURES**0.5

    weights = jnp.einsum('blhf,bmhf->bhlm', features(q), features(k))
    support = jnp.tri(q.shape[1], dtype=bool) if causal else True
    weights = jnp.where(valid[:, None, None] & support, weights, 0)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum('bhlm,bmhd->blhd', weights / jnp.where(total > 0, total, 1), v)
    return jnp.where(valid[..., None, None], out, 0)


@functools.partial(jax.jit, static_argnames=('function', 'length'))
def with_gradients(function, q, k, v, valid, cotangent, length):
    """Output and gradients of a function of q, k, v and which positions are valid, for the first `length` positions."""
    *qkv, mask, pulled = (x[:, :length] for x in (q, k, v, valid, cotangent))
    out, pull_back = jax.vjp(lambda *qkv: function(*qkv, mask), *qkv)
    return out, *pull_back(pulled)


@causal_or_not
@pytest.mark.parametrize('kernel', KERNELS)
def test_it_is_its_definition_with_gradients(kernel, causal):
    """The definition in float64, of the same inputs: where the truth is 0, float32 would leave noise in it as well."""

    def attend(q, k, v, valid):
        return combiner.attend(q, k, v, 'performer', causal=causal, valid=valid, kernel=kernel, **LAYER)

    directions = orthogonal(jax.random.key(SEED), FEATURES, 4)
    define = functools.partial(written_out, directions=directions, causal=causal, kernel=kernel)
    for dtype in TOLERANCE if kernel == 'softmax' and causal else [jnp.float32]:
        *qkv, cotangent = draw(2, max(LENGTHS), 2, 4, count=4, dtype=dtype)
        for padded, length in itertools.product((0.0, 0.3), LENGTHS):
            valid = np.random.default_rng(3).random((2, max(LENGTHS))) >= padded
            actual = with_gradients(attend, *qkv, valid, cotangent, length)
            assert actual[0].dtype == dtype
            with jax.enable_x64(True):
                exact = [np.asarray(x, np.float64) for x in (*qkv, cotangent)]
                expected = with_gradients(define, *exact[:3], valid, exact[3], length)
                assert expected[0].dtype == jnp.float64
            for one, other in zip(actual, expected, strict=True):
                assert_close(one, other, TOLERANCE[dtype])


def test_directions_are_orthogonal_and_each_is_standard_normal():
    directions = orthogonal(jax.random.key(0), 10, 4)
    products = directions @ directions.T
    for block in (slice(0, 4), slice(4, 8), slice(8, 10)):
        assert_close(products[block, block], np.diag(np.diag(products[block, block])), 1e-5)
    assert abs(products[:4, 4:8]).min() > 1e-3
    many = jax.vmap(lambda key: orthogonal(key, 3, 3))(jax.random.split(jax.random.key(1), 4000))
    assert_close(jnp.einsum('nfd,nfe->fde', many, many) / 4000, np.tile(np.eye(3), (3, 1, 1)), 0.15)
    assert abs(many.mean(axis=0)).max() < 5 / 4000**0.5


def test_features_estimate_the_softmax_kernel_without_bias():
    q, k = draw(6, 4, count=2)

    def estimate(key):
        kernel = softmax_kernel(orthogonal(key, 8, 4))
        features, log = kernel.key(k)
        own, log_of_own = kernel.key(q)  # a query's features with their factor are those of a key
        return (own * features).mean(axis=-1) * jnp.exp(log + log_of_own)

    found = jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), 4000))
    error = found.mean(axis=0) - jnp.exp((q * k).sum(axis=-1) / 2)
    assert (abs(error) < 5 * found.std(axis=0) / 4000**0.5).all()


def test_with_more_features_it_is_nearer_to_softmax():
    q, k, v = (x / 2 for x in draw(1, 12, 2, 4))

    @jax.jit
    def errors(*qkv):
        exact = combiner.attend(*qkv, 'full', causal=True)
        performers = [combiner.attend(*qkv, 'performer', causal=True, features=features) for features in (2048, 16)]
        return [jnp.abs(performer - exact).mean() for performer in performers]

    many, few = errors(q, k, v)
    assert many < few / 3


def test_a_great_key_neither_overflows_nor_silences_what_is_before():
    q, k, v = draw(1, 9, 1, 4)
    attend = functools.partial(combiner.attend, name='performer', causal=True, **LAYER)

    @jax.jit
    def times(factor):
        out, pull_back = jax.vjp(lambda k: attend(q, k.at[:, 6].multiply(factor), v), k)
        return out, *pull_back(v)

    (expected, _), (out, gradient) = times(1.0), times(1e6)
    np.testing.assert_array_equal(out[:, :6], expected[:, :6])
    assert np.isfinite(out).all()
    assert np.isfinite(gradient).all()


def test_keys_of_any_length_weigh_as_defined():
    """Where every feature of every key is less than a float holds, their ratios still count."""
    q, k, v = draw(1, 9, 1, 4)
    k = k.at[..., 0].set(100.0)  # one length for all, up to little
    out = combiner.attend(q, k, jnp.ones_like(v), 'performer', causal=False, **LAYER)
    assert_close(out, np.ones_like(v), 1e-5)


# Features as state


def made(**hyper):
    module = make_attention('performer', {'features': 6, **hyper}, width=8, heads=2, max_length=5)
    (x,) = draw(2, 5, 8, count=1)
    positions = jnp.arange(5)[None]
    return module, nn.unbox(jax.jit(module.init)(jax.random.key(0), x, positions)), x, positions


def test_directions_are_drawn_again_after_some_steps_of_training():
    module, variables, x, positions = made(redraw=4)
    assert variables['state']['directions'].shape == (6, 4)

    @functools.partial(jax.jit, static_argnames='deterministic')
    def step(state, deterministic=False):
        variables_now = {**variables, 'state': state}
        return module.apply(variables_now, x, positions, deterministic=deterministic, mutable=['state'])

    states, outs = [variables['state']], []
    for _ in range(6):
        out, updated = step(states[-1])
        states.append(updated['state'])
        outs.append(out)
    directions = [np.asarray(state['directions']) for state in states]
    same = [(one == other).all() for one, other in itertools.pairwise(directions)]
    assert same == [False, True, True, True, False, True]  # not in steps 2 and 4, after which a run may be validated
    assert (directions[6] != directions[0]).any()
    np.testing.assert_array_equal(outs[1], outs[2])
    assert (outs[1] != outs[0]).any()
    np.testing.assert_array_equal(step(states[2])[0], outs[2])  # nothing but the state decides
    out, kept = step(states[2], deterministic=True)
    np.testing.assert_array_equal(out, outs[2])
    jax.tree.map(np.testing.assert_array_equal, kept['state'], states[2])


def test_with_a_draw_in_every_step_no_two_are_equal():
    module, variables, x, positions = made(redraw=1)

    @jax.jit
    def step(state):
        changed = {**variables, 'state': state}
        return module.apply(changed, x, positions, deterministic=False, mutable=['state'])[1]['state']

    once = step(variables['state'])
    twice = step(once)
    drawn = [state['directions'] for state in (variables['state'], once, twice)]
    assert all((one != other).any() for one, other in itertools.combinations(drawn, 2))


def test_directions_stay_by_default():
    module, variables, x, positions = made()
    _, updated = module.apply(variables, x, positions, deterministic=False, mutable=['state'])
    jax.tree.map(np.testing.assert_array_equal, updated['state'], variables['state'])


def test_each_layer_has_its_own():
    settings = {'layers': 2, 'width': 8, 'heads': 2, 'attention': {'name': 'performer', 'features': 3}}
    model = models.build('language_model', 10, (12,), settings)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 12), int))
    directions = variables['state']['trunk']['stack']['blocks_0']['attention_branch']['directions']
    assert directions.shape == (2, 3, 4)
    assert (directions[0] != directions[1]).all()


@pytest.mark.slow
def test_features_are_trained_with_saved_continued_evaluated_and_sampled_from(tiny, tmp_path):
    config = tiny.config(**{'run.eval_every': 100})
    config.model.attention = ConfigDict({'name': 'performer', 'features': 5, 'redraw': 2})  # drawn in every odd step
    whole = train.train(config, tmp_path, devices=jax.devices()[:1])
    trained = evaluate.load(tmp_path, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, trained.variables['state'], whole.collections['state'])
    assert sample.complete(trained.model, trained.variables, np.zeros((1, 40), int), 48).shape == (1, 48)
    shutil.rmtree(tmp_path / 'checkpoints' / '6')
    assert tiny.digest(train.train(config, tmp_path, devices=jax.devices()[:1])) == tiny.digest(whole)


@pytest.mark.parametrize(
    ('hyper', 'message'),
    [
        ({'kernel': 'gelu'}, "unknown kernel 'gelu'; choose softmax, relu"),
        ({'features': 0}, 'features must be at least 1, got 0'),
        ({'redraw': -1}, 'redraw must be at least 0, got -1'),
    ],
)
def test_wrong_settings_are_told(hyper, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda key: make_attention('performer', hyper, width=8, heads=2).init(
                key, jnp.zeros((1, 4, 8)), jnp.arange(4)[None]
            ),
            jax.random.key(0),
        )


def test_heads_of_64_have_256_features():
    _, variables, *_ = made()
    assert variables['state']['directions'].dtype == jnp.float32
    assert registry.make_mechanism('performer').kernel_of(64, Context()).size == 256
    assert registry.make_mechanism('performer').kernel_of(1, Context()).size == 1
