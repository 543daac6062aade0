import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from combiner.data import photos


def photograph_of(record: dict) -> str:
    return record['key'].split('/')[0]


@pytest.mark.parametrize(
    ('size', 'all_photographs', 'splits'),
    [
        (16, 9125, {'train': 5912, 'validation': 1360, 'test': 1853}),
        (32, 8369, {'train': 5449, 'validation': 1248, 'test': 1672}),
    ],
)
def test_crop_counts(size, all_photographs, splits):
    assert len(photos.Photos(tuple(photos.PHOTOGRAPHS), size)) == all_photographs
    assert {split: len(photos.Photos(names, size)) for split, names in photos.SPLITS.items()} == splits


def test_splits_share_no_photograph_and_leave_none_out():
    found = {
        split: {photograph_of(record) for record in photos.Photos(names, 32)} for split, names in photos.SPLITS.items()
    }
    assert {split: set(names) for split, names in photos.SPLITS.items()} == found
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other
    assert set().union(*found.values()) == set(photos.PHOTOGRAPHS)


def test_every_crop_is_the_piece_that_its_key_names():
    source = photos.Photos(('chelsea', 'coffee'), 32)
    records = list(source)
    assert len({record['key'] for record in records}) == len(source)
    for record in records:
        name, scale, y, x = record['key'].split('/')
        pixels = photos.load(name)[photos.SCALES.index(int(scale.removeprefix('scale')))]
        top, left = int(y.removeprefix('y')), int(x.removeprefix('x'))
        assert record['image'].shape == (32, 32, 3)
        np.testing.assert_array_equal(record['image'], pixels[top : top + 32, left : left + 32])


def test_scales_are_box_means_of_the_file():
    full, half, quarter = photos.load('astronaut')
    np.testing.assert_array_equal(full, np.asarray(Image.open(photos.locate('astronaut')).convert('RGB')))
    for factor, scaled in ((2, half), (4, quarter)):
        side = 512 // factor
        # Pillow shrinks the rows first and rounds half up after each axis.
        narrow = np.floor(full.reshape(512, side, factor, 3).mean(2) + 0.5)
        np.testing.assert_array_equal(scaled, np.floor(narrow.reshape(side, factor, side, 3).mean(1) + 0.5))


def test_memory_is_modest_and_protected():
    assert sum(plane.nbytes for name in photos.PHOTOGRAPHS for plane in photos.load(name)) < 10e6
    crop = photos.Photos(('flower',), 16)[np.int64(3)]['image']
    with pytest.raises(ValueError, match='read-only'):
        crop[0] = 0


@pytest.mark.parametrize('index', [-1, 1360])
def test_index_out_of_range(index):
    with pytest.raises(IndexError, match=f'{index} of 1360'):
        photos.Photos(('flower',), 16)[index]


def test_unknown_photograph():
    with pytest.raises(ValueError, match=r"'lena'; known: astronaut, chelsea"):
        photos.Photos(('lena',), 16)


def test_package_not_installed(monkeypatch):
    monkeypatch.setattr(photos.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'data/coffee\.png of the package scikit-image.*pip install'):
        photos.locate('coffee')


def test_file_missing_in_package(monkeypatch, tmp_path):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(photos.importlib.util, 'find_spec', lambda name: spec)
    with pytest.raises(FileNotFoundError, match=r"'china'.*scikit-learn has no datasets/images/china\.jpg"):
        photos.locate('china')


def test_does_not_import_the_packages_that_ship_the_photographs():
    program = (
        'import sys; from combiner.data import photos; photos.Photos(tuple(photos.PHOTOGRAPHS), 16); '
        'sys.exit(bool({"skimage", "sklearn"} & set(sys.modules)))'
    )
    assert subprocess.run([sys.executable, '-c', program], check=False).returncode == 0
