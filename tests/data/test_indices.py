from collections import Counter

import numpy as np
import pytest

from combiner.data.indices import checked, evenly_spaced, spread


@pytest.mark.parametrize('limit', [None, 1, 5, 7, 100, 399, 400, 1_000])
@pytest.mark.parametrize('length', [1, 4, 400])
def test_one_record_of_each_part_is_read(length, limit):
    chosen, count = spread(length, limit), min(length, limit or length)
    parts = [*evenly_spaced(length, limit).tolist(), length]
    assert len(chosen) == count
    assert all(first <= index < end for first, index, end in zip(parts, chosen, parts[1:], strict=False))


@pytest.mark.parametrize(
    ('images', 'tiles', 'limit'), [(10_000, 4, 1_000), (2_000, 4, 400), (276, 4, 276), (500, 16, 500)]
)
def test_tiles_are_read_from_all_places_of_an_image(images, tiles, limit):
    places = Counter((spread(images * tiles, limit) % tiles).tolist())
    assert len(places) == tiles
    assert max(places.values()) - min(places.values()) <= 1 + limit // 20


def test_no_record_beyond():
    assert checked(np.int64(3), 4, 'crop') == 3
    with pytest.raises(IndexError, match='crop 4 of 4'):
        checked(4, 4, 'crop')
