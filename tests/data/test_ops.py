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
    example = ops.image_language_model({'image': image, 'key': 'grey'}, (2, 2, 3))
    assert set(example) == {'tokens', 'targets', 'weights'}
    np.testing.assert_array_equal(example['tokens'], np.full(12, 9))
    np.testing.assert_array_equal(example['targets'], example['tokens'])
    np.testing.assert_array_equal(example['weights'], np.ones(12))
    assert example['weights'].dtype == np.float32


@pytest.mark.parametrize('image', [np.zeros((2, 3, 3), np.uint8), np.zeros((2, 2, 3), np.float32)])
def test_an_image_of_another_shape_is_refused_by_its_key(image):
    with pytest.raises(ValueError, match=r"record 'test/7' holds an image of .*expected uint8 2x2x3"):
        ops.image_language_model({'image': image, 'key': 'test/7'}, (2, 2, 3))


def test_grey_is_rounded_luma():
    image = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 31]]], np.uint8)
    example = ops.image_classification({'image': image, 'label': 7, 'key': 'a'}, (2, 2))
    np.testing.assert_array_equal(example['tokens'], [76, 150, 29, 18])
    assert example['valid'].all()
    assert (example['targets'], example['weights']) == (7, 1)
    assert {name: value.dtype.name for name, value in example.items()} == {
        'tokens': 'int32',
        'valid': 'bool',
        'targets': 'int32',
        'weights': 'float32',
    }


@pytest.mark.parametrize('black_is_padding', [False, True])
def test_black_is_padding_only_where_asked(black_is_padding):
    image = np.array([[0, 3], [255, 0]], np.uint8)
    example = ops.image_classification({'image': image, 'label': 0, 'key': 'a'}, (2, 2), black_is_padding)
    np.testing.assert_array_equal(example['tokens'], [0, 3, 255, 0])
    np.testing.assert_array_equal(example['valid'], [not black_is_padding, True, True, not black_is_padding])


def test_bytes_are_cropped_or_padded():
    tokens, valid = ops.byte_tokens(b'\x00\xffa', 5)
    np.testing.assert_array_equal(tokens, [1, 256, 98, 0, 0])
    np.testing.assert_array_equal(valid, [True, True, True, False, False])
    example = ops.byte_classification({'text': b'abcdef', 'label': 1, 'key': 'a'}, 4)
    np.testing.assert_array_equal(example['tokens'], [98, 99, 100, 101])
    assert example['valid'].all()


def test_pairs_are_two_rows():
    example = ops.byte_pair_classification({'text1': b'ab', 'text2': b'', 'label': 1, 'key': 'a'}, 3)
    np.testing.assert_array_equal(example['tokens'], [[98, 99, 0], [0, 0, 0]])
    np.testing.assert_array_equal(example['valid'], [[True, True, False], [False, False, False]])
