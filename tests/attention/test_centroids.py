import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, draw

from combiner import models, sharding
from combiner.attention import centroids, registry

BOTH = pytest.mark.parametrize('name', ['combiner_routing', 'routing'])
POSITIONS = jnp.arange(12)[None]


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def test_directions_are_of_a_token_alone_whatever_its_length():
    q, k = draw(2, 5, 3, 8, count=2)
    expected = unit(unit(q) + unit(k))
    assert_close(centroids.directions(q, k), expected, 1e-6)
    assert_close(centroids.directions(7 * q, k / 9), expected, 1e-6)
    np.testing.assert_array_equal(centroids.directions(0 * q, 0 * k), 0)


def test_a_step_of_k_means_by_hand():
    held = jnp.array([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    tokens = unit(jnp.array([[[2.0, 1.0]], [[2.0, -1.0]], [[0.0, 1.0]], [[0.1, 1.0]]]))[None]
    valid = jnp.array([[True, True, False, True]])
    found = jax.jit(lambda *args: centroids.moved(*args, decay=0.5))(held, tokens, valid)
    mean = (tokens[0, 0, 0] + tokens[0, 1, 0]) / 2
    assert_close(found[0], jnp.stack([unit(held[0, 0] + mean), unit(held[0, 1] + tokens[0, 3, 0]), held[0, 2]]), 1e-6)
    np.testing.assert_array_equal(centroids.nearest(tokens, held)[0, :, 0], [0, 0, 1, 1])


def test_k_means_finds_what_is_there():
    truth = unit(jax.random.normal(jax.random.key(0), (1, 4, 16)))
    held = unit(truth + 0.3 * jax.random.normal(jax.random.key(1), truth.shape))
    step = jax.jit(lambda held, tokens: centroids.moved(held, tokens, decay=0.8))
    for seed in range(30):
        which = jax.random.randint(jax.random.key(seed), (2, 50, 1), 0, 4)
        (noise,) = draw(2, 50, 1, 16, count=1, seed=seed)
        held = step(held, unit(truth[0][which] + 0.1 * noise))
    assert ((held * truth).sum(-1) > 0.99).all()


def made(name, **frame):
    module = registry.make(name, {'clusters': 3, 'decay': 0.5}, width=8, heads=2, planned_length=12, **frame)
    (x,) = draw(4, 12, 8, count=1)
    return module, nn.unbox(jax.jit(module.init)(jax.random.key(0), x, POSITIONS)), x


@BOTH
def test_they_move_in_training_only_and_after_they_were_used(name):
    module, variables, x = made(name)
    held = variables['state']['centroids']
    assert held.shape == (2, 3, 4)
    assert_close(jnp.linalg.norm(held, axis=-1), jnp.ones((2, 3)), 1e-6)

    def apply(deterministic):
        return module.apply(variables, x, POSITIONS, deterministic=deterministic, mutable=['state'])

    still, kept = jax.jit(lambda: apply(True))()
    trained, moved = jax.jit(lambda: apply(False))()
    np.testing.assert_array_equal(kept['state']['centroids'], held)
    np.testing.assert_array_equal(trained, still)
    q, k, _ = module.apply(variables, x, POSITIONS, method='_project')
    expected = centroids.moved(held, centroids.directions(q, k), decay=0.5)
    assert (expected != held).any()
    assert_close(moved['state']['centroids'], expected, 1e-6)


@BOTH
def test_no_gradient_flows_into_or_out_of_them(name):
    module, variables, x = made(name)

    def loss(state, params):
        return module.apply({'params': params, 'state': state}, x, POSITIONS).sum()

    def after(params):
        out = module.apply({**variables, 'params': params}, x, POSITIONS, deterministic=False, mutable=['state'])
        return out[1]['state']['centroids'].sum()

    into, params = jax.jit(lambda: (jax.grad(loss)(variables['state'], variables['params']), variables['params']))()
    for leaf in jax.tree.leaves((into, jax.jit(jax.grad(after))(params))):
        np.testing.assert_array_equal(leaf, 0)


@BOTH
@pytest.mark.parametrize('remat', [False, True])
def test_each_layer_has_its_own_under_scan_and_remat(name, remat):
    settings = {'layers': 2, 'width': 8, 'heads': 2, 'attention': {'name': name, 'clusters': 3}, 'remat': remat}
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 10)
    found = []
    for scan in (True, False):
        model = models.build('language_model', 10, (12,), settings | {'scan': scan})
        variables = nn.unbox(jax.jit(model.init)(jax.random.key(1), tokens))

        def loss(params, model=model, variables=variables):
            variables = {'params': params, 'state': variables['state']}
            logits, updated = model.apply(variables, tokens, deterministic=False, mutable=['state'])
            return logits.sum(), updated['state']

        _, state = jax.jit(jax.grad(loss, has_aux=True))(variables['params'])
        before, after = (jax.tree.leaves(tree) for tree in (variables['state'], state))
        found.append([leaf.shape for leaf in after])
        assert all((one != other).any() for one, other in zip(before, after, strict=True))
    assert found == [[(2, 2, 3, 4)], [(2, 3, 4), (2, 3, 4)]]
    assert (after[0] != after[1]).any()


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
