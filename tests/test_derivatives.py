"""Every mechanism has all derivatives, at every length, as docs/derivatives.md says."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KNOWN_AHEAD, UNPARTITIONED, assert_close, draw, sizes_of

import combiner
from combiner.core import registry
from combiner.ops import chunking

TOLERANCE = 2e-4  # of second derivatives in float32
NAMES = KNOWN_AHEAD + UNPARTITIONED


def along(attend, q, t):
    return jax.jvp(attend, (q,), (t,))[1]


def backward(attend, q, t):
    """The same numbers by reverse mode, which other tests compare with the oracle: `w · (J t)` is `(w J) · t`."""
    return (jax.vjp(attend, q)[1](jnp.cos(jnp.arange(q.size)).reshape(q.shape))[0] * t).sum()


def weighted(change):
    return (jnp.cos(jnp.arange(change.size)).reshape(change.shape) * change).sum()


def loss(attend):
    return lambda q: jnp.sin(attend(q)).sum()


FIRST = {
    'jvp': along,
    'linearize': lambda attend, q, t: jax.linearize(attend, q)[1](t),
    'vmap': lambda attend, q, t: jax.vmap(lambda t: along(attend, q, t))(jnp.stack([t, 2 * t]))[1] / 2,
    'checkpoint': lambda attend, q, t: along(jax.checkpoint(attend), q, t),
}
SECOND = {
    'forward over reverse': lambda attend, q, t: along(jax.grad(loss(attend)), q, t),
    'reverse over forward': lambda attend, q, t: jax.grad(lambda q: along(loss(attend), q, t))(q),
    'reverse over reverse': lambda attend, q, t: jax.grad(lambda q: (t * jax.grad(loss(attend))(q)).sum())(q),
}


@pytest.mark.parametrize('in_steps', [False, True], ids=['short', 'long'])
@pytest.mark.parametrize('name', NAMES)
def test_every_derivative_works_and_agrees(name, in_steps, monkeypatch, request):
    """Long: with steps as short as they get and one device, a few tokens take the paths of thousands."""
    length = 23
    if in_steps:
        monkeypatch.setattr(chunking, 'CHUNK_LOGITS', 64)
        request.getfixturevalue('one_device')
    mechanism = registry.resolve(name)
    q, k, v, t = draw(1, length, 2, 4, count=4)
    attend = functools.partial(combiner.attend, name=name, causal=mechanism.supported_causal[0], **sizes_of(name))

    @jax.jit
    def run(q, k, v, t):
        def of_q(q):
            return attend(q, k, v)

        first = {way: weighted(each(of_q, q, t)) for way, each in FIRST.items()}
        return backward(of_q, q, t), first, {way: each(of_q, q, t) for way, each in SECOND.items()}

    expected, first, second = run(q, k, v, t)
    for actual in first.values():
        assert_close(actual, expected, TOLERANCE)
    *others, reference = second.values()
    assert np.isfinite(reference).all()
    for actual in others:
        assert_close(actual, reference, TOLERANCE)
    exported = jax.export.export(jax.jit(attend))(q, k, v)
    assert exported.out_avals[0].shape == q.shape
