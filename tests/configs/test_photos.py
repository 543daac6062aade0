import pytest

from combiner import config as common
from configs import photos


def keys(config, prefix=''):
    for name, value in config.items():
        yield from keys(value, f'{prefix}{name}.') if hasattr(value, 'items') else [prefix + name]


def test_defaults_are_the_quickstart():
    config = photos.get_config()
    assert (config.task, config.model.layers, config.model.width) == ('photos16', 2, 64)
    assert config.model.attention.to_dict() == {'name': 'combiner_axial_rowmajor', 'columns': 48}


def test_argument():
    config = photos.get_config('attention=fixed,size=32,layers=6')
    assert (config.task, config.model.layers) == ('photos32', 6)
    assert config.model.attention.to_dict() == {'name': 'fixed', 'block': 96}
    with pytest.raises(ValueError, match='size=64'):
        photos.get_config('size=64')
    with pytest.raises(ValueError, match='known: attention, size, layers, scale'):
        photos.get_config('atention=full')


def test_scales():
    assert photos.get_config('scale=cpu').to_dict() == photos.get_config().to_dict()
    for scale, layers, width, steps in (('full', 6, 512, 20_000), ('cpu', 2, 64, 1_200), ('quick', 1, 32, 30)):
        config = photos.get_config(f'scale={scale}')
        assert (config.model.layers, config.model.width, config.steps) == (layers, width, steps)
        assert photos.get_config(f'scale={scale},layers=5').model.layers == 5
    with pytest.raises(ValueError, match='scale=tiny: choose full, cpu, small, quick'):
        photos.get_config('scale=tiny')


def test_no_field_beyond_the_common_ones_but_those_of_mechanism_and_head():
    assert {k for k in keys(photos.get_config()) if not k.startswith('model.attention.')} == {
        *(k for k in keys(common.base()) if not k.startswith('model.attention.')),
        'model.tied',
    }


def test_hyper_parameters_in_the_argument():
    attention = photos.get_config('attention=combiner_axial_rowmajor+key=projected+columns=24').model.attention
    assert attention.to_dict() == {'name': 'combiner_axial_rowmajor', 'key': 'projected', 'columns': 24}
    with pytest.raises(ValueError, match=r"write NAME\+HYPER=VALUE, got 'projected'"):
        photos.get_config('attention=combiner_axial_rowmajor+projected')
