import jax
import jax.numpy as jnp
import numpy as np
import pytest

from combiner import losses


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_target_nats_is_minus_log_softmax(dtype):
    logits = jax.random.normal(jax.random.key(0), (2, 5, 7)).astype(dtype)
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 7)
    nats = losses.target_nats(logits, tokens)
    logp = np.asarray(logits, np.float64)
    logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
    np.testing.assert_allclose(nats, -np.take_along_axis(logp, np.asarray(tokens)[..., None], -1)[..., 0], rtol=1e-5)
    assert nats.dtype == jnp.float32


def test_uniform_logits_cost_log_of_the_vocabulary():
    nats = losses.target_nats(jnp.zeros((1, 3, 256)), jnp.zeros((1, 3), jnp.int32))
    np.testing.assert_allclose(nats / np.log(2), 8.0, rtol=1e-6)


def test_hits_count_the_first_of_equal_logits():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(losses.hits(logits, jnp.array([1, 1, 0])), [1, 0, 1])
    np.testing.assert_array_equal(losses.hits(logits, jnp.array([2, 0, 2])), [0, 1, 0])
