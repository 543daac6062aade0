import pytest

from combiner.data import tasks
from configs import text


def test_defaults_are_those_for_a_cpu():
    config = text.get_config()
    assert (config.task, config.steps, config.data.batch_size) == ('prose', 1_000, 16)
    assert (config.model.layers, config.model.width, config.data.options.length) == (4, 128, 512)
    assert text.get_config('scale=cpu').to_dict() == config.to_dict()


@pytest.mark.parametrize(('scale', 'layers', 'width', 'length'), [('full', 12, 768, 2048), ('quick', 2, 32, 128)])
def test_scales(scale, layers, width, length):
    config = text.get_config(f'task=mlm,scale={scale}')
    assert (config.model.layers, config.model.width, config.data.options.length) == (layers, width, length)
    longer = text.get_config(f'task=mlm,scale={scale},length={2 * length},layers=3')
    assert (longer.model.layers, longer.data.options.length) == (3, 2 * length)
    assert 2 * longer.data.batch_size == config.data.batch_size
    assert tasks.make(config.task, **config.data.options).shape == (length,)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match='task=clm: choose lm or mlm'):
        text.get_config('task=clm')
    with pytest.raises(ValueError, match='scale=tiny: choose full, cpu, small, quick'):
        text.get_config('scale=tiny')
