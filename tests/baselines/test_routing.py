import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw

import combiner
from combiner import patterns, reference
from combiner.attention import registry
from combiner.baselines.routing import attend_routing, choose

LENGTH = 13


def oracle(q, k, v, members, valid, *, causal):
    """The mean of the oracle of each set over the sets that a position is in; its own value where there is none."""
    support = patterns.support(LENGTH, causal=causal)
    rows = []
    for b, sets in enumerate(np.asarray(members)):
        heads = []
        for h, own in enumerate(sets):
            one = [x[b : b + 1, :, h : h + 1] for x in (q, k, v)]
            total, count = 0, 0
            for chosen in own:
                inside = np.isin(np.arange(LENGTH), chosen)
                pattern = patterns.sparse(support & inside & inside[:, None])
                mask = None if valid is None else valid[b : b + 1]
                total, count = total + reference.attend(*one, pattern, valid=mask), count + inside
            count = jnp.asarray(count)[None, :, None, None]
            heads.append(jnp.where(count > 0, total / jnp.maximum(count, 1), one[2]))
        rows.append(jnp.concatenate(heads, axis=2))
    return jnp.concatenate(rows)


@causal_or_not
@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_fast_equals_oracle_with_gradients(dtype, padded, causal):
    valid = jnp.asarray(np.random.default_rng(0).random((2, LENGTH)) > 0.3) if padded else None
    q, k, v = draw(2, LENGTH, 2, 4, dtype=dtype)
    (scores,) = draw(2, LENGTH, 2, 3, count=1, seed=1)
    members = choose(scores, 4, valid)
    chosen = np.asarray(members)
    mask = True if valid is None else valid[..., None, None]

    @jax.jit
    def run(*args):
        found = []
        for attend, sets in ((attend_routing, members), (oracle, chosen)):
            out, pull_back = jax.vjp(lambda *a: jnp.where(mask, attend(*a, sets, valid=valid, causal=causal), 0), *args)  # noqa: B023
            found.append((out, *pull_back(out)))
        return found

    if not padded:
        assert len(np.unique(chosen[0, 0])) < min(chosen[0, 0].size, LENGTH)  # some in several, some in none
    else:
        assert np.asarray(valid)[np.arange(2)[:, None, None, None], chosen].all()
    for one, other in zip(*run(q, k, v), strict=True):
        assert_close(one, other, TOLERANCE[dtype])


def test_each_centroid_takes_the_tokens_nearest_to_it():
    scores = jnp.array([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5], [0.7, 0.95]])[None, :, None]
    assert choose(scores, 2)[0, 0].tolist() == [[1, 3], [0, 3]]
    assert choose(scores, 2, jnp.array([[True, False, True, True]]))[0, 0].tolist() == [[2, 3], [0, 3]]


def made(**frame):
    module = registry.make('routing', {'clusters': 3}, width=16, heads=2, planned_length=LENGTH, **frame)
    (x,) = draw(2, LENGTH, 16, count=1)
    variables = jax.jit(module.init)(jax.random.key(0), x, jnp.arange(LENGTH)[None])
    return module, variables, x


@causal_or_not
def test_padding_is_not_read_and_gives_zeros(causal):
    module, variables, x = made(causal=causal)
    valid = jnp.arange(LENGTH) < jnp.array([[9], [0]])
    apply = jax.jit(lambda x: module.apply(variables, x, jnp.arange(LENGTH)[None], valid=valid))
    out = apply(x)
    np.testing.assert_array_equal(out, apply(jnp.where(valid[..., None], x, jnp.nan)))
    np.testing.assert_array_equal(out[1], 0)
    gradient = jax.jit(jax.grad(lambda x: (apply(x) ** 2).sum()))(x)
    assert jnp.isfinite(gradient).all()


def test_it_looks_ahead_in_who_is_chosen_only():
    """With sets of everything there is nothing to choose, and the future is not seen."""
    q, k, v = draw(1, LENGTH, 1, 4)
    later = [x.at[:, 9:].add(5) for x in (q, k, v)]
    attend = jax.jit(lambda q, k, v, members: attend_routing(q, k, v, members, causal=True))
    everything = jnp.arange(LENGTH).reshape(1, 1, 1, -1)
    np.testing.assert_array_equal(attend(*later, everything)[:, :9], attend(q, k, v, everything)[:, :9])
    assert registry.resolve('routing').looks_ahead


def test_decoding_chooses_among_the_tokens_so_far():
    module, variables, x = made()
    prefill = jax.jit(
        lambda x: module.apply(
            variables, x, jnp.arange(9)[None], jnp.array([9, 9]), LENGTH, method='prefill', mutable=['cache']
        )
    )
    _, cache = prefill(x[:, :9])
    decode = jax.jit(
        lambda cache, x, index: module.apply({**variables, **cache}, x, index, method='decode', mutable=['cache'])
    )
    actual, _ = decode(cache, x[:, 9:10], jnp.array([9, 9]))
    valid = jnp.broadcast_to(jnp.arange(LENGTH) <= 9, (2, LENGTH))
    expected = jax.jit(lambda x: module.apply(variables, x, jnp.arange(LENGTH)[None], valid=valid))(x)
    assert_close(actual[:, 0], expected[:, 9], TOLERANCE[jnp.float32])


def test_it_owns_centroids():
    q, k, v = draw(1, 4, 1, 4)
    with pytest.raises(ValueError, match=r'use the Linen module combiner\.baselines\.routing\.RoutingAttention'):
        combiner.attend(q, k, v, 'routing', causal=True)
