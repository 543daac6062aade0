import numpy as np
import pytest

from combiner.data.tiles import Tiles


@pytest.fixture
def images():
    values = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    return [{'image': image, 'key': f'set/{i}', 'label': i} for i, image in enumerate(values)]


@pytest.mark.parametrize('side', [2, 4, 8])
def test_tiles_laid_side_by_side_are_the_images(images, side):
    tiles = Tiles(images, 8, side)
    along = 8 // side
    assert len(tiles) == 3 * along**2
    cut = np.stack([tiles[i]['image'] for i in range(len(tiles))])
    laid = cut.reshape(3, along, along, side, side, 3).swapaxes(2, 3).reshape(3, 8, 8, 3)
    np.testing.assert_array_equal(laid, [record['image'] for record in images])


def test_a_key_says_where_the_tile_lies(images):
    record = Tiles(images, 8, 4)[6]
    assert (record['key'], record['label']) == ('set/1/y4/x0', 1)
    np.testing.assert_array_equal(record['image'], images[1]['image'][4:, :4])
    keys = [record['key'] for record in Tiles(images, 8, 4)]
    assert len(set(keys)) == len(keys)


def test_there_is_no_tile_beyond(images):
    with pytest.raises(IndexError, match='tile 12 of 12'):
        Tiles(images, 8, 4)[12]
    with pytest.raises(IndexError, match='tile -1 of 12'):
        Tiles(images, 8, 4)[-1]
