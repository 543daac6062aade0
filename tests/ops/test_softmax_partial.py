import jax
import jax.numpy as jnp
import numpy as np
from cases import TOLERANCE, assert_close, draw

from combiner.ops.softmax import PartialSoftmax, merge_along, merge_partials, partial_softmax


def test_groups_summed_apart_are_one_softmax():
    q, k, v = draw(2, 3, 5, 4)
    mask = jnp.asarray(np.random.default_rng(0).random((3, 5, 5)) > 0.5)
    groups = [partial_softmax(q, k[:, :, at], v[:, :, at], mask[:, :, at]) for at in (slice(0, 2), slice(2, 5))]
    logits = jnp.where(mask, jnp.einsum('hmqd,hmkd->hmqk', q, k), -jnp.inf)
    some = mask.any(-1)[..., None]
    expected = jnp.where(some, jnp.einsum('hmqk,hmkd->hmqd', jax.nn.softmax(logits), v), 0)
    assert_close(merge_partials(*groups).normalize(), expected, TOLERANCE[jnp.float32])
    stacked = PartialSoftmax(*(jnp.stack(x) for x in zip(*groups, strict=True)))
    assert_close(merge_along(stacked, axis=0).normalize(), expected, TOLERANCE[jnp.float32])


def test_nothing_to_attend_to_gives_zeros_and_no_gradient():
    q, k, v = draw(1, 1, 2, 4)
    nothing = jnp.zeros((1, 2, 2), bool)
    out, pull_back = jax.vjp(
        lambda *x: merge_partials(partial_softmax(*x, nothing), partial_softmax(*x, nothing)).normalize(), q, k, v
    )
    for result in (out, *pull_back(jnp.ones_like(out))):
        np.testing.assert_array_equal(result, 0)
