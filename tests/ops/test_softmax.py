import jax
import jax.numpy as jnp
import numpy as np
from cases import assert_close, draw

from combiner.ops.softmax import einsum, joint_softmax, mask_logits, softmax, unnormalized_softmax


def test_groups_are_one_softmax():
    one, other = draw(2, 3, 5, count=2)
    weights, total = unnormalized_softmax(one, other[..., :2])
    expected = jax.nn.softmax(jnp.concatenate([one, other[..., :2]], axis=-1))
    assert_close(jnp.concatenate(weights, axis=-1) / total, expected, 1e-6)


def test_divided_weights_have_the_derivatives_of_the_quotient():
    groups, changes = draw(2, 3, 5, count=2), draw(2, 3, 5, count=2, seed=1)

    def divided(*groups):
        weights, total = unnormalized_softmax(*groups)
        return [group / total for group in weights]

    def twice(weights):
        return jax.grad(lambda *groups: sum((weight**3).sum() for weight in weights(*groups)), (0, 1))

    for one, other in (
        (jax.jvp(joint_softmax, groups, changes), jax.jvp(divided, groups, changes)),
        (jax.vjp(joint_softmax, *groups)[1](changes), jax.vjp(divided, *groups)[1](changes)),
        (jax.jvp(twice(joint_softmax), groups, changes), jax.jvp(twice(divided), groups, changes)),
    ):
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), one, other)


def test_masked_logits_weigh_nothing_and_all_masked_is_zero_with_a_zero_gradient():
    (logits,) = draw(2, 4, count=1)
    mask = jnp.array([[True, False, True, True], [False] * 4])
    value, gradient = jax.value_and_grad(lambda x: (softmax(mask_logits(x, mask)) ** 2).sum())(logits)
    expected = jax.nn.softmax(jnp.where(mask[0], logits[0], -jnp.inf))
    assert_close(softmax(mask_logits(logits, mask)), jnp.stack([expected, jnp.zeros(4)]), 1e-6)
    assert jnp.isfinite(value)
    np.testing.assert_array_equal(gradient[1], 0)
    assert gradient[0, 1] == 0


def test_drop_acts_on_weights_and_not_on_the_divisor():
    (logits,) = draw(3, 4, count=1)
    (dropped,), total = unnormalized_softmax(logits, drop=jnp.zeros_like)
    (_,), expected = unnormalized_softmax(logits)
    np.testing.assert_array_equal(dropped, 0)
    np.testing.assert_array_equal(total, expected)


def test_products_accumulate_in_float32():
    x = jnp.full((1, 4096), 0.01, jnp.bfloat16)
    assert einsum('ij,kj->ik', x, x).dtype == jnp.float32
    assert_close(einsum('ij,kj->ik', x, x), [[4096 * float(x[0, 0]) ** 2]], 1e-4)
