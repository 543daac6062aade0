import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, draw, those
from flax import nnx

import combiner

VALID = jnp.arange(9) < jnp.array([[9], [5]])


def test_shapes_of_jax_nn_dot_product_attention():
    q, k, v = draw(2, 9, 4, 8)
    k, v = k[:, :, :2], v[:, :, :2]
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    assert_close(combiner.attend(q, k, v, 'full', causal=True), expected, TOLERANCE[jnp.float32])


def test_numpy_in_jax_out():
    q, k, v = (np.asarray(x) for x in draw(2, 9, 4, 8))
    out = combiner.attend(q, k, v, 'combiner_fixed', causal=True, valid=np.asarray(VALID), block=4)
    assert isinstance(out, jax.Array)
    assert_close(
        out, combiner.attend(*map(jnp.asarray, (q, k, v)), 'combiner_fixed', causal=True, valid=VALID, block=4), 0
    )


def spoil(**changes):
    q, k, v = draw(2, 9, 4, 8)
    return {'q': q, 'k': k, 'v': v, 'name': 'full', 'causal': True} | changes


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            lambda: spoil(q=jnp.ones((9, 4, 8))),
            r'must be \[batch, length, heads, head width\], got q float32\[9, 4, 8\]',
        ),
        (lambda: spoil(q=jnp.ones((2, 8, 4, 8))), 'must agree in batch, length and head width'),
        (lambda: spoil(v=jnp.ones((2, 9, 2, 8))), 'must agree in batch'),
        (lambda: spoil(k=jnp.ones((2, 9, 3, 8)), v=jnp.ones((2, 9, 3, 8))), 'key heads must divide the query heads'),
        (lambda: spoil(**{x: jnp.ones((2, 0, 4, 8)) for x in 'qkv'}), 'at least one position'),
        (lambda: spoil(**{x: jnp.ones((2, 9, 4, 8), int) for x in 'qkv'}), 'one floating-point type, got q int32'),
        (lambda: spoil(**{x: jnp.ones((0, 9, 4, 8)) for x in 'qkv'}), 'at least one position of one sequence'),
        (lambda: spoil(**{x: jnp.ones((2, 9, 4, 0)) for x in 'qkv'}), 'at least one position of one sequence'),
        (lambda: spoil(**{x: jnp.ones((2, 9, 4, 8), jnp.float8_e4m3fn) for x in 'qkv'}), 'at least 16 bits'),
        (lambda: spoil(q=jnp.ones((2, 9, 4, 8), jnp.bfloat16)), 'one floating-point type, got q bfloat16'),
        (lambda: spoil(name='fulll'), "did you mean 'full'"),
        (lambda: spoil(block=4), "full has no hyper-parameter 'block'"),
        (lambda: spoil(name='combiner_fixed', block=0), 'at least 1 position, got 0'),
        (
            lambda: spoil(name='combiner_mixture', segments=jnp.zeros((2, 9), int)),
            'CombinerMixtureAttention does not support segments',
        ),
        (lambda: spoil(segments=jnp.zeros((2, 9))), r'segments must be int\[2, 9\], got float32\[2, 9\]'),
        (
            lambda: spoil(name='combiner_fixed', pool='deepsets'),
            "pool='deepsets' owns parameters: use the Linen module",
        ),
        (lambda: spoil(name='combiner_fixed', pool='min'), "unknown pool 'min'; choose max, mean"),
        (lambda: spoil(name='combiner_fixed', block=2.5), r'block=2\.5 must be of type int \| None, not float'),
        (lambda: spoil(name='axial', columns='3'), r"columns='3' must be of type int \| None, not str"),
        (lambda: spoil(name='combiner_axial_rowmajor', key=None), 'key=None must be of type str, not NoneType'),
        (lambda: spoil(name='fixed', summary=0), 'summary must be at least 1, got 0'),
        (lambda: spoil(valid=jnp.ones((2, 8), bool)), r'valid must be bool\[2, 9\], got bool\[2, 8\]'),
    ],
)
def test_wrong_input_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        combiner.attend(**arguments())


def in_linen(name, x, mask=None, **hyper):
    fn = combiner.attention_fn(name, **hyper)
    module = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=fn, deterministic=True)
    return module.init_with_output(jax.random.key(0), x, mask=mask)[0]


def in_nnx(name, x, mask=None, **hyper):
    fn = combiner.attention_fn(name, **hyper)
    module = nnx.MultiHeadAttention(2, 8, decode=False, attention_fn=fn, rngs=nnx.Rngs(0), deterministic=True)
    return module(x, mask=mask)


@pytest.mark.parametrize('inside', [in_linen, in_nnx], ids=['linen', 'nnx'])
def test_drop_in_for_flax(inside):
    (x,) = draw(2, 9, 8, count=1)
    causal = nn.make_causal_mask(jnp.ones((2, 9)))
    dense = {'linen': nn.dot_product_attention, 'nnx': nnx.dot_product_attention}

    def expected(mask):
        if inside is in_linen:
            module = nn.MultiHeadDotProductAttention(2, attention_fn=dense['linen'], deterministic=True)
            return module.init_with_output(jax.random.key(0), x, mask=mask)[0]
        fn = dense['nnx']
        return nnx.MultiHeadAttention(2, 8, decode=False, attention_fn=fn, rngs=nnx.Rngs(0), deterministic=True)(
            x, mask=mask
        )

    one_block = {'name': 'combiner_fixed', 'block': 9}
    padding = VALID[:, None, None]

    @jax.jit
    def run(x):
        return inside(x=x, causal=True, **one_block), inside(x=x, mask=padding, **one_block)

    unpadded, padded = run(x)
    assert_close(unpadded, expected(causal), 1e-5)
    assert_close(jnp.where(VALID[..., None], padded, 0), jnp.where(VALID[..., None], expected(padding), 0), 1e-5)
    for mask in (causal, nn.make_attention_mask(VALID, VALID)):
        with pytest.raises(ValueError, match='mask must be one of keys alone'):
            inside(x=x, mask=mask, **one_block)


@pytest.mark.parametrize('inside', [in_linen, in_nnx], ids=['linen', 'nnx'])
@pytest.mark.parametrize('name', those(owns=''))
def test_every_mechanism_drops_in(name, inside):
    (x,) = draw(2, 9, 8, count=1)
    assert jax.jit(functools.partial(inside, name))(x).shape == x.shape


def test_dropout_in_flax():
    (x,) = draw(2, 9, 8, count=1)
    module = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, attention_fn=combiner.attention_fn('combiner_fixed'))
    params = module.init(jax.random.key(0), x, deterministic=True)
    still, *dropped = (
        module.apply(params, x, deterministic=off, rngs={'dropout': jax.random.key(seed)})
        for off, seed in ((True, 0), (False, 0), (False, 0), (False, 1))
    )
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert (dropped[0] != dropped[2]).any()
    assert (dropped[0] != still).any()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'bias': jnp.zeros((1, 1, 9, 9))}, 'full cannot honour bias'),
        ({'precision': 'highest'}, 'full cannot honour precision'),
        ({'something': 1}, 'full cannot honour something'),
        ({'dropout_rate': 0.1}, 'dropout needs a random key'),
    ],
)
def test_arguments_are_refused_and_not_ignored(arguments, message):
    with pytest.raises(ValueError, match=message):
        combiner.attention_fn('full')(*draw(2, 9, 2, 4), **arguments)
