import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from combiner import optim


def config(**changes):
    values = {
        'name': 'adamw',
        'learning_rate': 1e-2,
        'schedule': 'cosine',
        'warmup_steps': 4,
        'weight_decay': 0.1,
        'b1': 0.9,
        'b2': 0.99,
        'eps': 1e-8,
        'clip_norm': 1.0,
        'accumulation': 1,
        'ema_decay': 0.0,
    }
    return ml_collections.ConfigDict(values | changes)


def test_schedule_warms_up_then_decays():
    rate = optim.schedule(config(), 20)
    np.testing.assert_allclose([rate(s) for s in range(5)], [2e-3, 4e-3, 6e-3, 8e-3, 1e-2], rtol=1e-6)
    np.testing.assert_allclose([rate(12), rate(20)], [5e-3, 0], atol=1e-8)


def test_rsqrt_and_constant():
    rate = optim.schedule(config(schedule='rsqrt'), 100)
    np.testing.assert_allclose([rate(4), rate(16), rate(64)], [1e-2, 5e-3, 2.5e-3], rtol=1e-6)
    rate = optim.schedule(config(schedule='constant', warmup_steps=0), 100)
    np.testing.assert_allclose([rate(0), rate(99)], [1e-2, 1e-2])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'schedule': 'cosin'}, "'cosin'; known: cosine, rsqrt, constant"),
        ({'name': 'sgd'}, "'sgd'; known: adamw, adam"),
        ({'warmup_steps': 20}, 'warmup_steps=20 must be'),
        ({'name': 'adam'}, 'adam has no weight_decay'),
        ({'eps': -1e-8}, 'eps=-1e-08 must be at least 0'),
    ],
)
def test_bad_config_names_the_way_out(changes, message):
    with pytest.raises(ValueError, match=message):
        optim.optimizer(config(**changes), 20)


PARAMS = {
    'embed': {'embedding': jnp.ones((5, 4))},
    'positions': jnp.ones((6, 4)),
    'layers': {
        'norm': {'scale': jnp.ones((2, 4))},
        'mlp': {'kernel': jnp.ones((2, 4, 8)), 'bias': jnp.ones((2, 8))},
    },
    'head': {'kernel': jnp.ones((4, 5))},
    'own': {'temperature': jnp.ones(2)},
    'begin': jnp.ones(4),
}


def test_weight_decay_leaves_out_norms_scales_biases_and_embeddings():
    expected = {
        'embed': {'embedding': False},
        'positions': False,
        'layers': {'norm': {'scale': False}, 'mlp': {'kernel': True, 'bias': False}},
        'head': {'kernel': True},
        'own': {'temperature': True},  # a vector, which is a matrix in a scanned stack
        'begin': False,
    }
    assert optim.decays(PARAMS) == expected
    boxed = jax.tree.map(lambda x: nn.LogicallyPartitioned(x, (None,) * x.ndim), PARAMS)
    assert jax.tree.leaves(optim.decays(boxed)) == jax.tree.leaves(expected)
    optimizer = optim.optimizer(config(), 20)
    gradients = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = jax.jit(lambda: optimizer.update(gradients, optimizer.init(PARAMS), PARAMS))()
    assert jax.tree.map(lambda u: bool((u != 0).any()), updates) == expected


def test_clipping_bounds_the_first_moment():
    optimizer = optim.optimizer(config(name='adam', weight_decay=0.0), 20)
    gradient = {'w': jnp.full((4,), 1e3)}
    _, state = optimizer.update(gradient, optimizer.init({'w': jnp.zeros(4)}), {'w': jnp.zeros(4)})
    np.testing.assert_allclose(optax.tree.norm(optax.tree.get(state, 'mu')), 0.1, rtol=1e-5)


@pytest.mark.parametrize('name', ['adam', 'adamw'])
def test_eps_is_added_to_the_root_of_the_second_moment(name):
    changes = {'weight_decay': 0.0, 'clip_norm': 0.0, 'warmup_steps': 0}
    params, gradient = {'w': jnp.zeros(3)}, {'w': jnp.full(3, 0.5)}
    for eps in (1e-8, 0.5):
        optimizer = optim.optimizer(config(name=name, eps=eps, **changes), 20)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        np.testing.assert_allclose(updates['w'], -1e-2 * 0.5 / (0.5 + eps), rtol=1e-5)


def test_average_forgets_the_start_and_then_decays():
    ema = optim.average({'w': jnp.zeros(1)}, {'w': jnp.ones(1)}, 0.99, 0)
    np.testing.assert_allclose(ema['w'], 0.9, rtol=1e-6)
    ema = optim.average({'w': jnp.zeros(1)}, {'w': jnp.ones(1)}, 0.99, 10**6)
    np.testing.assert_allclose(ema['w'], 0.01, rtol=1e-4)
