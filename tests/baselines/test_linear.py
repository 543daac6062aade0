"""Linear attention against its definition, with all weights written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw
from jax.sharding import NamedSharding, PartitionSpec

import combiner
from combiner import sharding
from combiner.baselines.linear import elu_plus_one
from combiner.core.module import make_attention
from combiner.ops import linear

LENGTHS = (1, 5, 13)


def written_out(q, k, v, valid, causal, documents=None):
    """`Σ_j (elu(q_i) + 1)·(elu(k_j) + 1) v_j`, divided by the sum of the weights."""
    weights = jnp.einsum('blhd,bmhd->bhlm', jax.nn.elu(q) + 1, jax.nn.elu(k) + 1)
    support = jnp.tri(q.shape[1], dtype=bool) if causal else True
    if documents is not None:
        support &= (documents[:, :, None] == documents[:, None, :])[:, None]
    weights = jnp.where(valid[:, None, None] & support, weights, 0)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum('bhlm,bmhd->blhd', weights / jnp.where(total > 0, total, 1), v)
    return jnp.where(valid[..., None, None], out, 0)


@functools.partial(jax.jit, static_argnames='causal')
def both(q, k, v, valid, cotangent, causal):
    """Output and gradients of the mechanism and of the definition, for the beginnings of several lengths."""
    attend = functools.partial(combiner.attend, name='linear', causal=causal, chunk=4)
    results = []
    for length in LENGTHS:
        qkv, mask, pulled = (x[:, :length] for x in (jnp.stack([q, k, v], axis=2), valid, cotangent))
        qkv = tuple(jnp.moveaxis(qkv, 2, 0))
        out, pull_back = jax.vjp(lambda *qkv, mask=mask: attend(*qkv, valid=mask), *qkv)
        single = [x.astype(jnp.float32) for x in (*qkv, pulled)]
        expected, expected_back = jax.vjp(lambda *qkv, mask=mask: written_out(*qkv, mask, causal), *single[:3])
        results.append(((out, *pull_back(pulled)), (expected, *expected_back(single[3]))))
    return results


@causal_or_not
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_it_is_its_definition_with_gradients(dtype, causal):
    *qkv, cotangent = draw(2, max(LENGTHS), 2, 4, count=4, dtype=dtype)
    for padded in (0.0, 0.3):
        valid = np.random.default_rng(3).random((2, max(LENGTHS))) >= padded
        for actual, expected in both(*qkv, valid, cotangent, causal):
            assert actual[0].dtype == dtype
            for one, other in zip(actual, expected, strict=True):
                assert_close(one, other, TOLERANCE[dtype])


DOCUMENTS = np.stack([np.repeat([5, 0, 1], [2, 14, 6]), np.repeat([3, 2, 9], [22, 0, 0])])


@functools.partial(jax.jit, static_argnames='causal')
def packed(q, k, v, valid, cotangent, causal):
    """Output and gradients of the mechanism and of the definition, for documents longer than some chunks."""
    options = {'causal': causal, 'chunk': 4, 'valid': valid, 'segments': DOCUMENTS}
    out, pull_back = jax.vjp(lambda *qkv: combiner.attend(*qkv, 'linear', **options), q, k, v)
    expected, expected_back = jax.vjp(lambda *qkv: written_out(*qkv, valid, causal, DOCUMENTS), q, k, v)
    return (out, *pull_back(cotangent)), (expected, *expected_back(cotangent))


@causal_or_not
def test_packed_documents_with_gradients(causal):
    *qkv, cotangent = draw(2, DOCUMENTS.shape[1], 2, 4, count=4)
    valid = np.random.default_rng(3).random(DOCUMENTS.shape) >= 0.2
    valid[:, 4:8] = False  # a chunk within a document
    clean, expected = packed(*qkv, valid, cotangent, causal)
    for one, other in zip(clean, expected, strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])
    others = [np.where(DOCUMENTS[..., None, None] == 0, x, np.float32(100) * x) for x in map(np.asarray, qkv)]
    spoilt, _ = packed(*others, valid, cotangent, causal)
    for one, other in zip(spoilt, clean, strict=True):
        np.testing.assert_array_equal(one[DOCUMENTS == 0], other[DOCUMENTS == 0])


def test_no_position_depends_on_later_ones_where_documents_are_packed():
    *qkv, cotangent = map(np.asarray, draw(2, DOCUMENTS.shape[1], 2, 4, count=4))
    valid = np.ones(DOCUMENTS.shape, bool)
    expected = packed(*qkv, valid, cotangent, True)[0][0]
    for now in range(DOCUMENTS.shape[1] - 1):
        past = (np.arange(DOCUMENTS.shape[1]) <= now)[:, None, None]
        actual = packed(*(np.where(past, x, 100 * x[:, ::-1]) for x in qkv), valid, cotangent, True)[0][0]
        np.testing.assert_array_equal(actual[:, : now + 1], expected[:, : now + 1], f'position {now}')


def test_features_have_a_factor_that_keeps_them_from_vanishing():
    x = jnp.array([[-200.0, -201.0], [-1.0, 3.0]])
    features, log = elu_plus_one(x)
    assert_close(features, [[1, np.exp(-1)], [np.exp(-1), 4]], 1e-6)
    np.testing.assert_array_equal(log, [-200, 0])


def test_very_negative_keys_weigh_as_defined():
    q, k, v = draw(1, 9, 1, 4)
    expected = combiner.attend(q, k - 10, v, 'linear', causal=True, chunk=4)
    assert_close(combiner.attend(q, k - 200, v, 'linear', causal=True, chunk=4), expected, 1e-5)


@pytest.mark.parametrize('total', [0.0, 1e-38, 1e-25, 2.0])
def test_no_quotient_has_an_infinite_derivative(total):
    values = jnp.array([3.0, -1.0]) * total
    out, pull_back = jax.vjp(linear.safe_quotient, values, jnp.float32(total))
    assert_close(out, [3, -1] if total > linear.LEAST else [0, 0], 1e-6)
    for gradient in pull_back(jnp.ones(2)):
        assert np.isfinite(gradient).all()


def test_what_is_kept_for_decoding_does_not_grow():
    def cache(length):
        module = make_attention('linear', width=16, heads=2, max_length=length)
        x, positions = jnp.zeros((1, length, 16)), jnp.arange(length)[None]

        def prefill():
            variables = module.init(jax.random.key(0), x, positions)
            counts = jnp.array([length])
            return module.apply(variables, x, positions, counts, length, method='prefill', mutable=['cache'])[1]

        return jax.tree.map(jnp.shape, jax.eval_shape(prefill))

    assert cache(3) == cache(50)


@causal_or_not
@pytest.mark.parametrize(
    ('name', 'documents'),
    [('linear', False), ('performer', False), ('linear', True)],
    ids=['linear', 'performer', 'packed'],
)
def test_batch_and_heads_are_sharded_without_gathering(name, documents, causal):
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    placement = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None, 'model'))
    qkv = [jax.device_put(x, placement) for x in draw(4, 19, 2, 8)]
    segments = jax.device_put(np.repeat([[0, 1]], [7, 12], axis=1).repeat(4, axis=0), sharding.batch_sharding(mesh))

    def loss(q, k, v, segments):
        packing = {'segments': segments} if documents else {}
        out = combiner.attend(q, k, v, name, causal=causal, chunk=4, **packing)
        return jax.lax.with_sharding_constraint(out, placement).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=placement)
    program = gradient.lower(*qkv, segments).compile().as_text()
    assert 'all-gather' not in program
    assert 'all-to-all' not in program


def test_dropout_is_refused():
    with pytest.raises(ValueError, match='Linear has no weights to drop: set the dropout of attention to 0'):
        combiner.attention_fn('linear')(*draw(1, 4, 1, 4), dropout_rate=0.1, dropout_rng=jax.random.key(0))


def test_it_has_no_pattern():
    with pytest.raises(NotImplementedError, match='Linear has no pattern: it does not partition its support'):
        combiner.pattern('linear', 8, causal=True)
