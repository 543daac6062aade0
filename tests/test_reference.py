import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, causal_or_not, draw

from combiner import reference
from combiner.attention import combiner_axial_rowmajor, combiner_fixed, full
from combiner.baselines import axial


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def by_loops(q, k, v, pattern, valid, key):
    """Equations (7) and (9) of one head, one position and one term at a time, in float64."""
    q, k, v = (np.where(valid[:, None], np.asarray(x, np.float64), 0) for x in (q, k, v))
    scale = np.sqrt(q.shape[1])
    summaries = {}
    for s, span in enumerate(pattern.spans):
        members = np.flatnonzero(span & valid)
        if not members.size:
            continue
        if pattern.anchors is None:
            local_query, span_key = q[members].max(0), k[members].max(0)
        else:
            anchor = pattern.anchors[s]
            local_query, span_key = (x[anchor] if anchor >= 0 else np.zeros(q.shape[1]) for x in (q, k))
        weights = softmax(k[members] @ local_query / scale)
        if pattern.anchors is not None and key == 'attended':
            span_key = weights @ k[members]
        summaries[s] = span_key, weights @ v[members]
    out = np.zeros_like(v)
    for i in np.flatnonzero(valid):
        terms = [(k[j], v[j]) for j in np.flatnonzero(pattern.direct[i] & valid)]
        terms += [summaries[s] for s in np.flatnonzero(pattern.uses[i]) if s in summaries]
        weights = softmax(np.array([q[i] @ term_key / scale for term_key, _ in terms]))
        out[i] = sum(w * value for w, (_, value) in zip(weights, terms, strict=True))
    return out


@causal_or_not
@pytest.mark.parametrize('key', reference.KEYS)
@pytest.mark.parametrize('make', [combiner_fixed.pattern, combiner_axial_rowmajor.pattern, axial.pattern])
def test_oracle_is_the_equation_term_by_term(make, key, causal):
    size = 'block' if make is combiner_fixed.pattern else 'columns'
    pattern = make(11, causal=causal, **{size: 4})
    q, k, v = draw(2, 11, 3, 4)
    valid = np.random.default_rng(1).random((2, 11)) > 0.3
    actual = jax.jit(lambda *qkv: reference.attend(*qkv, pattern, valid=jnp.asarray(valid), key=key))(q, k, v)
    q, k, v, actual = (np.asarray(x) for x in (q, k, v, actual))
    for b in range(2):
        for h in range(3):
            expected = by_loops(q[b, :, h], k[b, :, h], v[b, :, h], pattern, valid[b], key)
            assert_close(actual[b, :, h], expected, 1e-6)


@causal_or_not
def test_a_pattern_without_spans_is_softmax_attention(causal):
    q, k, v = draw(2, 9, 3, 4)
    actual = jax.jit(lambda *qkv: reference.attend(*qkv, full.pattern(9, causal=causal)))(q, k, v)
    expected = jax.jit(lambda *qkv: jax.nn.dot_product_attention(*qkv, is_causal=causal))(q, k, v)
    assert_close(actual, expected, 1e-6)


def test_every_row_is_an_average():
    q, k, _ = draw(1, 13, 2, 4)
    pattern = combiner_fixed.pattern(13, causal=True, block=4)
    out = jax.jit(lambda *qkv: reference.attend(*qkv, pattern))(q, k, jnp.ones_like(q))
    assert_close(out, jnp.ones_like(q), 1e-6)


def test_type_of_the_values_is_kept():
    q, k, v = draw(1, 5, 1, 4, dtype=jnp.bfloat16)
    assert reference.attend(q, k, v, full.pattern(5, causal=True)).dtype == jnp.bfloat16


def test_unknown_key():
    q, k, v = draw(1, 4, 1, 4)
    with pytest.raises(ValueError, match=r'unknown summary key .pooled.; choose one of token, attended'):
        reference.attend(q, k, v, combiner_axial_rowmajor.pattern(4, causal=True, columns=2), key='pooled')
