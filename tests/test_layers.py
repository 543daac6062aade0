import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, draw

from combiner.layers import Mlp, Positions, norm, rotate, sinusoid


def test_rotary_products_depend_on_the_distance_only():
    q, k, _ = draw(1, 1, 2, 8)
    product = lambda i, j: (rotate(q, jnp.array([[i]])) * rotate(k, jnp.array([[j]]))).sum(-1)  # noqa: E731
    assert_close(product(7, 3), product(104, 100), 1e-5)
    assert abs(product(7, 3) - product(7, 4)).max() > 1e-3
    np.testing.assert_array_equal(rotate(q, jnp.array([[0]])), q)


@pytest.mark.parametrize(('heads', 'width'), [(3, 8), (4, 64)])
def test_rotary_by_a_product_is_the_same_with_its_gradient(heads, width):
    """The form for TPUs; four heads of 64 fill two registers."""
    x, cotangent, _ = draw(2, 9, heads, width)
    positions = jnp.array([[0, 1, 2, 5, 6, 7, 100, 101, 4000]])
    forms = (functools.partial(rotate, positions=positions, by_product=which) for which in (False, True))
    (out, pull_back), (by_product, pull_back_product) = (jax.vjp(form, x) for form in forms)
    assert_close(by_product, out, 1e-6)
    assert_close(pull_back_product(cotangent)[0], pull_back(cotangent)[0], 1e-6)


def test_sinusoid():
    table = sinusoid(50, 6)
    assert table.shape == (50, 6)
    np.testing.assert_allclose(table[3, :3], np.sin(3 * 10_000.0 ** (-np.array([0, 2, 4]) / 6)), rtol=1e-6)
    np.testing.assert_allclose(table[3, 3:], np.cos(3 * 10_000.0 ** (-np.array([0, 2, 4]) / 6)), rtol=1e-6)
    assert sinusoid(4, 5).shape == (4, 5)


def test_image_positions_are_row_plus_column_plus_channel():
    module = Positions('image', (2, 3, 2), 4)
    positions = jnp.arange(12)[None]
    added, params = module.init_with_output(jax.random.key(0), positions)
    row, column, channel = (params['params'][f'axis_{i}'].value for i in range(3))
    assert_close(added[0, 9], row[1] + column[1] + channel[1], 1e-6)
    assert added.shape == (1, 12, 4)


@pytest.mark.parametrize(('kind', 'tables'), [('learned', 1), ('image', 3), ('sinusoid', 0), ('rotary', 0)])
def test_parameters_of_positions(kind, tables):
    params = Positions(kind, (2, 3, 2), 4).init(jax.random.key(0), jnp.arange(12)[None])
    assert len(params.get('params', {})) == tables


def test_unknown_positions():
    with pytest.raises(ValueError, match="unknown positions 'rotery'; choose one of sinusoid, learned, image, rotary"):
        Positions('rotery', (4,), 4).init(jax.random.key(0), jnp.arange(4)[None])


def test_mlp_and_norm_compute_in_their_type():
    (x,) = draw(1, 3, 8, count=1)
    for module in (Mlp(16, jnp.bfloat16), norm(jnp.bfloat16)):
        out, params = module.init_with_output(jax.random.key(0), x)
        assert out.dtype == jnp.bfloat16
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
