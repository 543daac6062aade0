"""Linformer against its definition; what every module must satisfy is in test_modules.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, draw

from combiner import models
from combiner.baselines.linformer import attend_linformer
from combiner.core.module import make_attention
from combiner.ops import chunking

POSITIONS = jnp.arange(13)[None]


def written_out(q, k, v, of_keys, of_values, valid):
    """One sequence and one head at a time, by the paper's equation."""

    def one(q, k, v, of_keys, of_values, valid):
        k, v = (jnp.where(valid[:, None], x, 0) for x in (k, v))
        weights = jax.nn.softmax(q @ (of_keys.T @ k).T / q.shape[-1] ** 0.5, axis=-1)
        return weights @ (of_values.T @ v)

    by_head = jax.vmap(one, in_axes=(1, 1, 1, 0, 0, None), out_axes=1)
    return jax.vmap(by_head, in_axes=(0, 0, 0, None, None, 0))(q, k, v, of_keys, of_values, valid)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('shared', [False, True])
def test_it_is_its_definition_with_gradients(shared, dtype):
    *qkv, cotangent = draw(2, 13, 2, 4, count=4, dtype=dtype)
    projections = [x / 4 for x in draw(*(() if shared else (2,)), 20, 5, count=2, seed=1)]
    valid = jnp.asarray(np.random.default_rng(3).random((2, 13)) > 0.3)

    def defined(q, k, v, *projections):
        first = [jnp.broadcast_to(x[..., :13, :], (2, 13, 5)) for x in projections]
        return written_out(q, k, v, *first, valid)

    @jax.jit
    def both(cotangent, *inputs):
        out, pull_back = jax.vjp(lambda *inputs: attend_linformer(*inputs, valid=valid), *inputs)
        cotangent, *inputs = (x.astype(jnp.float32) for x in (cotangent, *inputs))
        expected, expected_back = jax.vjp(defined, *inputs)
        return (out, *pull_back(cotangent.astype(out.dtype))), (expected, *expected_back(cotangent))

    actual, expected = both(cotangent, *qkv, *projections)
    assert actual[0].dtype == dtype
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, TOLERANCE[dtype])


def test_steps_change_nothing(monkeypatch):
    qkv, projections = draw(2, 200, 2, 4), draw(200, 5, count=2, seed=1)

    def run():
        return jax.jit(jax.grad(lambda q: (attend_linformer(q, *qkv[1:], *projections) ** 2).sum()))(qkv[0])

    expected = run()
    monkeypatch.setattr(chunking, 'CHUNK_LOGITS', 1000)
    assert_close(run(), expected, 1e-5)


@pytest.mark.parametrize(
    ('sharing', 'shapes'),
    [
        ({}, {'key_length_kernel': (20, 5)}),
        ({'share_heads': False}, {'key_length_kernel': (2, 20, 5)}),
        ({'share_values': False}, {'key_length_kernel': (20, 5), 'value_length_kernel': (20, 5)}),
    ],
)
def test_projections_are_shared_or_not(sharing, shapes):
    module = make_attention('linformer', {'rank': 5, **sharing}, width=8, heads=2, causal=False, max_length=20)
    made = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 13, 8)), POSITIONS)['params']
    assert {name: made[name].value.shape for name in made if 'length' in name} == shapes


@pytest.mark.parametrize(
    ('length', 'rank', 'message'),
    [
        (None, 4, 'Linformer has parameters for each position: set max_length'),
        (12, 4, 'length 13 is more than the projections hold, max_length=12; set max_length to the longest input'),
        (13, 0, 'rank must be at least 1, got 0'),
    ],
)
def test_what_it_needs_is_told(length, rank, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda key: make_attention(
                'linformer', {'rank': rank}, width=8, heads=2, causal=False, max_length=length
            ).init(key, jnp.zeros((1, 13, 8)), POSITIONS),
            jax.random.key(0),
        )


def test_a_causal_model_of_it_is_refused_when_it_is_built():
    settings = {'layers': 1, 'width': 8, 'heads': 2, 'attention': {'name': 'linformer'}}
    with pytest.raises(ValueError, match='Linformer has no causal form; say causal=False'):
        models.build('language_model', 10, (13,), settings)
    assert models.build('classifier', 10, (13,), settings, classes=3)
