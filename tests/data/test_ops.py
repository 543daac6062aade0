import numpy as np
import pytest

from combiner.data import ops


def test_tokens_are_row_major_with_channels_side_by_side():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    tokens = ops.image_to_tokens(image)
    assert tokens.dtype == np.int32
    for row, column, channel in np.ndindex(image.shape):
        assert tokens[(row * 4 + column) * 3 + channel] == image[row, column, channel]


@pytest.mark.parametrize('batch', [(), (5,), (2, 3)])
@pytest.mark.parametrize('channels', [1, 3])
def test_tokens_to_image_inverts(batch, channels):
    shape = (4, 6, channels)
    images = np.random.default_rng(0).integers(0, 256, (*batch, *shape), np.uint8)
    back = ops.tokens_to_image(ops.image_to_tokens(images), shape)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, images)


def test_tokens_of_another_length():
    with pytest.raises(ValueError, match=r'\(4, 4, 3\) has 48 values, not 47'):
        ops.tokens_to_image(np.zeros(47, np.int32), (4, 4, 3))


@pytest.mark.parametrize('token', [-1, 256])
def test_tokens_that_are_no_pixel_value(token):
    with pytest.raises(ValueError, match=rf'0\.\.255, got .*{token}'):
        ops.tokens_to_image(np.array([7, 7, token], np.int32), (1, 1, 3))


def test_every_token_of_an_image_counts():
    image = np.full((2, 2, 3), 9, np.uint8)
    example = ops.image_language_model({'image': image, 'key': 'grey'})
    assert set(example) == {'tokens', 'weights'}
    np.testing.assert_array_equal(example['tokens'], np.full(12, 9))
    np.testing.assert_array_equal(example['weights'], np.ones(12))
    assert example['weights'].dtype == np.float32
