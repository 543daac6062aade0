import jax
import jax.numpy as jnp
import numpy as np
import pytest

import combiner
from combiner.ops.segments import checked_valid, finite_documents, finite_inputs, mark_broken, number_documents

LEAST, GREATEST = np.iinfo(np.int32).min, np.iinfo(np.uint32).max


@pytest.mark.parametrize(
    'given',
    [
        np.array([[5 << 32 | 7, 6 << 32 | 7, 6 << 32 | 7, 7]]),
        np.array([[2**63, 0, 0, 2**63]], np.uint64),
        np.array([[GREATEST, LEAST + 2**32, LEAST + 2**32, 0]], np.uint32),
        np.array([[LEAST, 0, 0, LEAST + 1]], np.int32),
        np.array([[0, -1, -1, 0]], np.int8),
        jnp.array([[LEAST, 0, 0, LEAST]]),
    ],
    ids=['int64', 'uint64', 'uint32', 'int32', 'int8', 'jax'],
)
def test_every_run_of_equal_numbers_is_a_document(given):
    numbers = number_documents(given, (1, 4))
    assert isinstance(numbers, jax.Array)
    assert numbers.dtype == jnp.int32
    assert numbers.tolist() == [[1, 2, 2, 3]]


def test_rows_are_numbered_by_themselves_and_traced_numbers_too():
    given = np.array([[3, 3, 1], [3, 1, 3]])
    for number in (number_documents, jax.jit(number_documents, static_argnums=1)):
        assert number(given, (2, 3)).tolist() == [[1, 1, 2], [1, 2, 3]]


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (np.zeros((1, 4)), r'segments must be int\[1, 4\], got float64\[1, 4\]'),
        (np.zeros((1, 4), bool), r'got bool\[1, 4\]'),
        (np.zeros((1, 3), int), r'got int64\[1, 3\]'),
        (np.array([[2**70, 0, 0, 0]]), r'got object\[1, 4\]: one integer of at most 64 bits for each position'),
    ],
)
def test_other_numbers_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        number_documents(given, (1, 4))


def test_the_public_function_distinguishes_wide_numbers():
    q, k, v = (np.random.default_rng(seed).standard_normal((1, 8, 1, 4), np.float32) for seed in range(3))
    apart = np.repeat([3 << 32 | 5, 4 << 32 | 5], 4)[None]
    expected = combiner.attend(q, k, v, 'full', causal=False, segments=apart % 7)
    np.testing.assert_array_equal(combiner.attend(q, k, v, 'full', causal=False, segments=apart), expected)


def test_a_document_is_sound_if_what_it_holds_and_its_products_are_finite():
    numbers = jnp.array([[1, 1, 2, 3, 3]])
    x = jnp.ones((1, 5, 2, 3))

    def spoil(at, value):
        changed = np.array(x)
        changed[0, at, 1, 2] = value
        return jnp.asarray(changed)

    sound = [[True, True, False, True, True]], [[True, True, True, False, False]]
    for value in (np.nan, np.inf, -np.inf):
        assert finite_documents(numbers, None, (spoil(2, value),)).tolist() == sound[0]
        assert finite_inputs(numbers, None, x, x, spoil(3, value)).tolist() == sound[1]
    assert finite_inputs(numbers, None, spoil(3, 1e20), spoil(4, 1e20), x).tolist() == sound[1]
    assert finite_inputs(numbers, None, spoil(3, 1e20), x, x).tolist() == sound[1]  # its square, of a norm
    assert finite_inputs(numbers, None, x, x, spoil(3, 1e30)).all()
    valid = jnp.array([[True, True, False, True, True]])
    assert finite_documents(numbers, valid, (spoil(2, np.nan),)).all()


def test_only_valid_outputs_of_broken_documents_are_nan():
    sound, valid = jnp.array([[True, False, False]]), jnp.array([[True, True, False]])
    np.testing.assert_array_equal(mark_broken(jnp.zeros((1, 3, 1)), sound, valid)[0, :, 0], [0, np.nan, 0])
    np.testing.assert_array_equal(mark_broken(jnp.zeros((1, 3, 1)), sound, None)[0, :, 0], [0, np.nan, np.nan])
    assert (mark_broken(jnp.zeros((1, 3, 1)), None, None) == 0).all()


@pytest.mark.parametrize('wrong', [np.ones((2, 9), int), np.ones((2, 9), np.float32), np.ones((2, 8), bool)])
def test_a_mask_that_is_not_bool_is_refused(wrong):
    with pytest.raises(ValueError, match=r'valid must be bool\[2, 9\], got '):
        checked_valid(wrong, (2, 9))
