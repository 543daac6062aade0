import io

import numpy as np
import pytest
from PIL import Image

from combiner.data import codecs, photos


def crops(count: int) -> np.ndarray:
    source = photos.Photos(('coffee',), 16)
    return np.stack([source[index]['image'] for index in range(0, len(source), len(source) // count)])


def test_files_are_lossless_and_counted_with_their_headers():
    images = crops(10)
    figures = codecs.bits_per_dim(images)
    for name, options in codecs.CODECS.items():
        size = 0
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, **options)
            np.testing.assert_array_equal(np.asarray(Image.open(file)), image)
            size += len(file.getvalue())
        assert figures[name] == pytest.approx(8 * size / images.size)


def test_photographs_compress_as_measured():
    figures = codecs.bits_per_dim(crops(100))
    assert figures.keys() == {'png', 'webp_lossless', 'order0_entropy'}
    assert figures['webp_lossless'] < figures['png'] < figures['order0_entropy'] < 8
    # Newer releases of the codecs may save a little more.
    assert figures['png'] == pytest.approx(5.711, abs=0.05)
    assert figures['webp_lossless'] == pytest.approx(4.705, abs=0.05)


@pytest.mark.parametrize(('values', 'bits'), [(1, 0), (2, 1), (16, 4), (256, 8)])
def test_order0_entropy_of_equally_frequent_values(values, bits):
    images = (np.arange(2 * 16 * 16 * 3) % values).astype(np.uint8).reshape(2, 16, 16, 3)
    assert codecs.bits_per_dim(images)['order0_entropy'] == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize(
    'images',
    [
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 2), np.uint8),
        np.zeros((1, 4, 4, 3), np.int32),
    ],
)
def test_rejects_what_is_not_a_batch_of_images(images):
    # Past the shape check of the tests, as for a user.
    with pytest.raises(ValueError, match='images must be uint8'):
        getattr(codecs.bits_per_dim, '__wrapped__', codecs.bits_per_dim)(images)
