import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, draw

from combiner import models, sharding
from combiner.core import registry, routed
from combiner.core.module import make_attention
from combiner.core.routed import Routed

BOTH = pytest.mark.parametrize('name', ['combiner_routing', 'routing'])
RECORDING = f'{__name__}:Recording'
POSITIONS = jnp.arange(12)[None]


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def test_directions_are_of_a_token_alone_whatever_its_length():
    q, k = draw(2, 5, 3, 8, count=2)
    expected = unit(unit(q) + unit(k))
    assert_close(routed.directions(q, k), expected, 1e-6)
    assert_close(routed.directions(7 * q, k / 9), expected, 1e-6)
    np.testing.assert_array_equal(routed.directions(0 * q, 0 * k), 0)


def test_a_step_of_k_means_by_hand():
    held = jnp.array([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    tokens = unit(jnp.array([[[2.0, 1.0]], [[2.0, -1.0]], [[0.0, 1.0]], [[0.1, 1.0]]]))[None]
    valid = jnp.array([[True, True, False, True]])
    found = jax.jit(lambda *args: routed.move_centroids(*args, decay=0.5))(held, tokens, valid)
    mean = (tokens[0, 0, 0] + tokens[0, 1, 0]) / 2
    assert_close(found[0], jnp.stack([unit(held[0, 0] + mean), unit(held[0, 1] + tokens[0, 3, 0]), held[0, 2]]), 1e-6)
    np.testing.assert_array_equal(routed.nearest_centroid(tokens, held)[0, :, 0], [0, 0, 1, 1])


def test_k_means_finds_what_is_there():
    truth = unit(jax.random.normal(jax.random.key(0), (1, 4, 16)))
    held = unit(truth + 0.3 * jax.random.normal(jax.random.key(1), truth.shape))

    def step(held, key):
        which = jax.random.randint(key, (2, 50, 1), 0, 4)
        noise = jax.random.normal(key, (2, 50, 1, 16))
        return routed.move_centroids(held, unit(truth[0][which] + 0.1 * noise), decay=0.8), None

    held, _ = jax.lax.scan(step, held, jax.random.split(jax.random.key(2), 30))
    assert ((held * truth).sum(-1) > 0.99).all()


def made(name, **frame):
    """A module, variables that cost no compilation, and an input."""
    module = make_attention(name, {'clusters': 3, 'decay': 0.5}, width=8, heads=2, max_length=12, **frame)
    (x,) = draw(4, 12, 8, count=1)
    return module, drawn(jax.eval_shape(module.init, jax.random.key(0), x, POSITIONS)), x


def drawn(shapes):
    """Variables of these shapes, and centroids of unit length."""
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), nn.unbox(shapes))
    return variables | {'state': jax.tree.map(unit, variables['state'])}


def test_they_start_as_unit_vectors_other_ones_in_each_layer():
    settings = {'layers': 2, 'width': 8, 'heads': 2, 'attention': {'name': RECORDING, 'clusters': 3}}
    model = models.build('language_model', 10, (12,), settings)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 12), int))
    (held,) = jax.tree.leaves(nn.unbox(variables['state']))
    assert held.shape == (2, 2, 3, 4)
    assert held.dtype == jnp.float32
    assert_close(jnp.linalg.norm(held, axis=-1), np.ones((2, 2, 3)), 1e-6)
    assert len(np.unique(held)) == held.size


@BOTH
def test_they_move_in_training_only_and_after_they_were_used_and_take_no_part_in_gradients(name):
    module, variables, x = made(name)
    held = variables['state']['centroids']

    @jax.jit
    def run():
        def apply(deterministic, **changed):
            return module.apply(variables | changed, x, POSITIONS, deterministic=deterministic, mutable=['state'])

        def into(state):
            return apply(True, state=state)[0].sum()

        def out_of(params):
            return apply(False, params=params)[1]['state']['centroids'].sum()

        q, k, _ = module.apply(variables, x, POSITIONS, method='_project')
        expected = routed.move_centroids(held, routed.directions(q, k), decay=0.5)
        gradients = jax.grad(into)(variables['state']), jax.grad(out_of)(variables['params'])
        return apply(True), apply(False), expected, gradients

    (still, kept), (trained, moved), expected, gradients = run()
    np.testing.assert_array_equal(kept['state']['centroids'], held)
    np.testing.assert_array_equal(trained, still)
    assert (expected != held).any()
    assert_close(moved['state']['centroids'], expected, 1e-6)
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, 0)


class Recording(Routed):
    """Centroids, and next to no attention: models of it compile fast."""

    def attend(self, q, k, v, context):
        del k, context
        return v + 0 * q


def test_each_layer_has_its_own_under_scan_and_remat():
    settings = {'layers': 2, 'width': 8, 'heads': 2, 'attention': {'name': RECORDING, 'clusters': 3}}
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 10)

    for scan, shapes in ((True, [(2, 2, 3, 4)]), (False, [(2, 3, 4), (2, 3, 4)])):
        model = models.build('language_model', 10, (12,), settings | {'scan': scan})
        variables = drawn(jax.eval_shape(model.init, jax.random.key(1), tokens))
        before = jax.tree.leaves(variables['state'])
        assert [leaf.shape for leaf in before] == shapes

        def loss(params, variables=variables, **changes):
            model = models.build('language_model', 10, (12,), settings | changes)
            variables = {**variables, 'params': params}
            logits, updated = model.apply(variables, tokens, deterministic=False, mutable=['state'])
            return logits.sum(), updated['state']

        for remat in ('none', 'full'):
            step = jax.grad(functools.partial(loss, scan=scan, remat=remat), has_aux=True)
            after = jax.tree.leaves(jax.jit(step)(variables['params'])[1])
            assert all((one != other).any() for one, other in zip(before, after, strict=True))
            one, other = after[0] if scan else after
            assert (one != other).any()


def test_all_devices_move_them_by_the_whole_batch():
    module, variables, x = made('combiner_routing')
    x = jnp.concatenate([x, draw(4, 12, 8, count=1, seed=5)[0]])

    def step(x):
        return module.apply(variables, x, POSITIONS, deterministic=False, mutable=['state'])[1]['state']['centroids']

    expected = jax.jit(step)(x)
    mesh = sharding.make_mesh(data=4, model=2)
    with sharding.use(mesh):
        actual = jax.jit(step)(jax.device_put(x, sharding.batch_sharding(mesh)))
    assert_close(actual, expected, 1e-6)
    copies = [np.asarray(shard.data) for shard in actual.addressable_shards if shard.index == (slice(None),) * 3]
    assert all((copy == copies[0]).all() for copy in copies)


@BOTH
def test_the_fraction_that_a_step_keeps_is_a_fraction(name):
    for decay in (-0.1, 1.5, float('nan')):
        with pytest.raises(ValueError, match=f'decay={decay} is a fraction: set it from 0 to 1'):
            registry.make_mechanism(name, {'decay': decay})
    assert [registry.make_mechanism(name, {'decay': decay}).decay for decay in (0.0, 1.0)] == [0, 1]
